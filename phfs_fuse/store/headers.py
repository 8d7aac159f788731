"""Reads the headers of answers, writes those of requests. Pure; owns no state."""

from __future__ import annotations

import mimetypes
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from functools import lru_cache
from typing import Final

from phfs_fuse.errors import BadAnswer
from phfs_fuse.store.base import ObjectInfo
from phfs_fuse.types import ETag, ObjectKey

META_PREFIX: Final = "x-amz-meta-"
SECOND_NS: Final = 1_000_000_000

_TYPES: Final = mimetypes.MimeTypes()  # the built-in table: the same on every machine


def content_type(key: str) -> str:
    """What browsers and consoles shall take the object for; by its name, as rclone does it."""
    if key.endswith("/"):
        return "application/x-directory"
    return _TYPES.guess_type(f"/{key}")[0] or "application/octet-stream"


def quoted(etag: ETag) -> str:
    return f'"{etag}"'


def etag_of(text: str | None, op: str, key: str) -> ETag:
    """Raises: BadAnswer if the store sent none."""
    if not text:
        raise BadAnswer(op, key, "an answer without ETag")
    return ETag(text.removeprefix("W/").strip('"'))


def http_date_ns(text: str | None) -> int:
    """Nanoseconds since the epoch of a `Date` or `Last-Modified`; now if it is missing or cannot be read."""
    try:
        return _date_ns(text or "")
    except ValueError:
        return time.time_ns() // SECOND_NS * SECOND_NS


@lru_cache(64)  # many answers come within one second
def _date_ns(text: str) -> int:
    return int(parsedate_to_datetime(text).timestamp()) * SECOND_NS


def user_metadata(headers: Mapping[str, str]) -> dict[str, str]:
    """User metadata among `headers`: names in lower case without `x-amz-meta-`."""
    cut = len(META_PREFIX)
    found = {name.lower(): value for name, value in headers.items() if name[:cut].lower() == META_PREFIX}
    return {name[cut:]: _text(value) for name, value in found.items()}


def info_of(key: ObjectKey, headers: Mapping[str, str]) -> ObjectInfo:
    """The answer to a HEAD; names of `headers` in lower case. Raises: BadAnswer."""
    try:
        size = int(headers["content-length"])
    except (KeyError, ValueError) as exc:
        raise BadAnswer("head", key, "an answer without Content-Length") from exc
    return ObjectInfo(
        key=key,
        etag=etag_of(headers.get("etag"), "head", key),
        size=size,
        modified_ns=http_date_ns(headers.get("last-modified")),
        metadata=user_metadata(headers),
    )


def stored_info(key: ObjectKey, size: int, metadata: Mapping[str, str], headers: Mapping[str, str]) -> ObjectInfo:
    """The object that an answered PUT has made; names of `headers` in lower case. Raises: BadAnswer."""
    return ObjectInfo(
        key=key,
        etag=etag_of(headers.get("etag"), "put", key),
        size=size,
        modified_ns=http_date_ns(headers.get("date")),
        metadata={name.lower(): value for name, value in metadata.items()},
    )


def _text(value: str) -> str:
    """A value as the UTF-8 that it most likely is: HTTP libraries read headers as Latin-1."""
    if value.isascii():
        return value
    try:
        return value.encode("latin-1").decode()
    except UnicodeError:
        return value

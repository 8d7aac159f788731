"""Reads the headers of answers, writes those of requests. Pure; owns no state.

A number that is no number or out of range makes the whole answer a `BadAnswer`, but for a time, which is clamped.
"""

from __future__ import annotations

import mimetypes
import re
import time
from collections.abc import Mapping
from datetime import datetime
from email.utils import parsedate_to_datetime
from functools import lru_cache
from typing import Final

from phfs_fuse.errors import BadAnswer
from phfs_fuse.store.base import ObjectInfo
from phfs_fuse.types import SIZE_BYTES_MAX, ETag, ObjectKey, decimal, time_ns

META_PREFIX: Final = "x-amz-meta-"
SECOND_NS: Final = 1_000_000_000

_ETAG: Final = re.compile(r"[!#-~\x80-\xff]{1,1024}")  # Source: RFC 9110, 8.8.3
_TYPES: Final = mimetypes.MimeTypes()  # the built-in table: the same on every machine


def content_type(key: str) -> str:
    """What browsers and consoles shall take the object for; by its name, as rclone does it."""
    if key.endswith("/"):
        return "application/x-directory"
    return _TYPES.guess_type(f"/{key}")[0] or "application/octet-stream"


def quoted(etag: ETag) -> str:
    return f'"{etag}"'


def etag_of(text: str | None, op: str, key: str) -> ETag:
    """Raises: BadAnswer if the store sent none, or one that no condition can name."""
    etag = (text or "").removeprefix("W/").strip('"')
    if not etag:
        raise BadAnswer(op, key, "an answer without ETag")
    if not _ETAG.fullmatch(etag):
        raise BadAnswer(op, key, "an ETag that is none")
    return ETag(etag)


def size_of(text: str | None, op: str, key: str) -> int:
    """The bytes of an object. Raises: BadAnswer."""
    if (size := decimal(text or "", SIZE_BYTES_MAX)) is None:
        raise BadAnswer(op, key, "an answer without a size, or with an impossible one")
    return size


def http_date_ns(text: str | None) -> int:
    """Nanoseconds since the epoch of a `Date` or `Last-Modified`; now if it is missing or cannot be read."""
    try:
        return _date_ns(text or "")
    except Exception:  # the parser of dates raises what it likes, OverflowError and TypeError too
        return time.time_ns() // SECOND_NS * SECOND_NS


@lru_cache(64)  # many answers come within one second
def _date_ns(text: str) -> int:
    return whole_seconds(parsedate_to_datetime(text))


def whole_seconds(at: datetime) -> int:
    """Nanoseconds since the epoch of a time that the store tells, without the fraction that HEAD does not tell, so
    that one version shows one time. Out of range it is clamped. Raises: OverflowError, ValueError."""
    return time_ns(int(at.timestamp()) * SECOND_NS)


def user_metadata(headers: Mapping[str, str]) -> dict[str, str]:
    """User metadata among `headers`: names in lower case without `x-amz-meta-`."""
    cut = len(META_PREFIX)
    found = {name.lower(): value for name, value in headers.items() if name[:cut].lower() == META_PREFIX}
    return {name[cut:]: _text(value) for name, value in found.items()}


def info_of(key: ObjectKey, headers: Mapping[str, str]) -> ObjectInfo:
    """The answer to a HEAD; names of `headers` in lower case. Raises: BadAnswer."""
    return ObjectInfo(
        key=key,
        etag=etag_of(headers.get("etag"), "head", key),
        size=size_of(headers.get("content-length"), "head", key),
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

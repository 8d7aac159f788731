"""Reads the headers of answers, writes those of requests. Pure; owns no state.

A number that is no number or out of range makes the whole answer a `BadAnswer`, but for a time, which is clamped.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from datetime import datetime
from email.utils import parsedate_to_datetime
from functools import lru_cache
from typing import Final

from phfs_fuse.errors import BadAnswer
from phfs_fuse.store.base import META_PREFIX, ObjectInfo, Properties, content_type
from phfs_fuse.types import SIZE_BYTES_MAX, ETag, ObjectKey, decimal, time_ns

STORAGE_CLASS: Final = "x-amz-storage-class"
ENCRYPTION: Final = "x-amz-server-side-encryption"
CUSTOMER_KEY: Final = f"{ENCRYPTION}-customer-algorithm"  # of SSE-C
PLACED: Final = (STORAGE_CLASS, ENCRYPTION, f"{ENCRYPTION}-aws-kms-key-id", f"{ENCRYPTION}-bucket-key-enabled")
"""Where and how the bytes are kept: no copy takes that along. Source: S3 API reference, CopyObject."""
CONTENT: Final = (
    "cache-control",
    "content-disposition",
    "content-encoding",
    "content-language",
    "content-type",
    "expires",
    "x-amz-website-redirect-location",
)
"""What the next reader is told of the bytes. An answer to HEAD and the request that stores them spell it alike."""
SECOND_NS: Final = 1_000_000_000

_ETAG: Final = re.compile(r"[!#-~\x80-\xff]{1,1024}")  # Source: RFC 9110, 8.8.3
TAG_COUNT: Final = "x-amz-tagging-count"
_TOLD: Final = (*CONTENT, *PLACED, TAG_COUNT)
_DIRECTIVE: Final = "x-amz-metadata-directive"


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
    found = date_ns(text or "")
    return this_second_ns() if found is None else found


def this_second_ns() -> int:
    """Default of a time that the store does not tell."""
    return time.time_ns() // SECOND_NS * SECOND_NS


@lru_cache(64)  # many answers come within one second
def date_ns(text: str) -> int | None:
    """Nanoseconds since the epoch of a date in a header; None if it cannot be read."""
    try:
        return whole_seconds(parsedate_to_datetime(text))
    except Exception:  # the parser of dates raises what it likes, OverflowError and TypeError too
        return None


def whole_seconds(at: datetime) -> int:
    """Nanoseconds since the epoch of a time that the store tells, without the fraction that HEAD does not tell, so
    that one version shows one time. Out of range it is clamped. Raises: OverflowError, ValueError."""
    return time_ns(int(at.timestamp()) * SECOND_NS)


def object_headers(key: str, metadata: Mapping[str, str], properties: Properties | None) -> dict[str, str]:
    """Headers of a request that makes an object: what the store is to keep with it, but for its tags."""
    headers = {META_PREFIX + name: value for name, value in metadata.items()}
    if properties is None or "content-type" not in properties.headers:
        headers["content-type"] = content_type(key)
    told = properties.headers if properties else {}
    return headers | {name: value for name, value in told.items() if name != TAG_COUNT}


def copy_headers(key: str, metadata: Mapping[str, str] | None, properties: Properties | None) -> dict[str, str]:
    """Headers of a request that copies an object. `metadata` None: it stays as it is."""
    if metadata is None:
        return {_DIRECTIVE: "COPY"} | placed(properties.headers if properties else {})
    return object_headers(key, metadata, properties) | {_DIRECTIVE: "REPLACE"}


def tag_header(properties: Properties | None) -> dict[str, str]:
    return {"x-amz-tagging": properties.tags} if properties and properties.tags else {}


def placed(headers: Mapping[str, str]) -> dict[str, str]:
    """Those of `headers` that no copy takes along."""
    return {name: headers[name] for name in PLACED if name in headers}


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
        headers={name: _text(headers[name]) for name in _TOLD if name in headers},
    )


def stored_info(
    key: ObjectKey, size: int, metadata: Mapping[str, str] | None, headers: Mapping[str, str]
) -> ObjectInfo:
    """The object that an answered PUT has made; names of `headers` in lower case. Raises: BadAnswer."""
    return ObjectInfo(
        key=key,
        etag=etag_of(headers.get("etag"), "put", key),
        size=size,
        modified_ns=http_date_ns(headers.get("date")),
        metadata=None if metadata is None else {name.lower(): value for name, value in metadata.items()},
    )


def _text(value: str) -> str:
    """A value as the UTF-8 that it most likely is: HTTP libraries read headers as Latin-1."""
    if value.isascii():
        return value
    try:
        return value.encode("latin-1").decode()
    except UnicodeError:
        return value

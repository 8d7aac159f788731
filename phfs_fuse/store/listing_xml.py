"""Reads the XML of one page of ListObjectsV2, with MinIO's extension. Pure; owns no state.

Source: S3 API reference, ListObjectsV2; MinIO answers `metadata=true` with the elements `UserMetadata` (one
element per header, spelled as the header: `X-Amz-Meta-Mode`) and `Internal`, both only where the caller may
read the object. Parsed here and not by botocore, which does not know these elements.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import datetime
from functools import lru_cache
from typing import Final
from urllib.parse import unquote_plus
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from phfs_fuse.errors import BadAnswer
from phfs_fuse.store.base import NO_HEADERS, Listing, ObjectInfo
from phfs_fuse.store.error_codes import reading
from phfs_fuse.store.headers import (
    CUSTOMER_KEY,
    STORAGE_CLASS,
    etag_of,
    placed,
    size_of,
    this_second_ns,
    user_metadata,
    whole_seconds,
)
from phfs_fuse.types import MIB, ETag, ObjectKey

PAGE_BYTES_MAX: Final = 16 * MIB
STANDARD: Final = "STANDARD"  # the storage class of which HEAD says nothing
_NAMESPACE: Final = re.compile(rb'\sxmlns="[^"]*"')  # differs between stores


def parse_listing(prefix: str, body: bytes) -> Listing:
    """The page in `body`. Raises: BadAnswer if it is none. `prefix` is for the message."""
    if len(body) > PAGE_BYTES_MAX:
        raise BadAnswer("list", prefix, f"a page of over {PAGE_BYTES_MAX // MIB} MiB")
    with reading("list", prefix):
        root = ElementTree.fromstring(_NAMESPACE.sub(b"", body, count=1))
        if root.tag != "ListBucketResult":
            raise BadAnswer("list", prefix, f"an answer of type {root.tag[:100]!r}")
        return _page(root)


def is_xml(body: bytes) -> bool:
    try:
        ElementTree.fromstring(body)
    except Exception:  # as in `reading`
        return False
    return True


def _page(root: Element) -> Listing:
    fields = {child.tag: child.text or "" for child in root}
    decode = _decoded if fields.get("EncodingType") == "url" else str
    objects, unreadable = [], []
    for child in root:
        if child.tag == "Contents":
            try:
                objects.append(_object(child, decode))
            except (BadAnswer, LookupError, ValueError, OverflowError):
                unreadable.append(ObjectKey(decode(_texts(child)["Key"])))
    prefixes = [decode(_texts(child)["Prefix"]) for child in root if child.tag == "CommonPrefixes"]
    next_token = fields["NextContinuationToken"] if fields.get("IsTruncated") == "true" else None
    return Listing(objects=objects, prefixes=prefixes, next_token=next_token, unreadable=tuple(unreadable))


def _texts(element: Element) -> dict[str, str]:
    return {child.tag: child.text or "" for child in element}


def _decoded(text: str) -> str:
    return unquote_plus(text) if "%" in text or "+" in text else text


def _object(element: Element, decode: Callable[[str], str]) -> ObjectInfo:
    fields = _texts(element)
    told = {child.tag.lower(): child.text or "" for child in element.iterfind("UserMetadata/*")}
    if (storage_class := fields.get("StorageClass", STANDARD)) != STANDARD:
        told[STORAGE_CLASS] = storage_class
    return ObjectInfo(
        key=ObjectKey(decode(fields["Key"])),
        etag=etag_of(etag, "list", fields["Key"]) if (etag := fields.get("ETag", "").strip('"')) else ETag(""),
        size=size_of(fields["Size"], "list", fields["Key"]),
        modified_ns=this_second_ns() if (at_ns := _iso_ns(fields.get("LastModified", ""))) is None else at_ns,
        metadata=user_metadata(told) if "UserMetadata" in fields else {} if "Internal" in fields else None,
        headers=placed(told) or NO_HEADERS,
        is_sealed=CUSTOMER_KEY in told,
    )


@lru_cache(64)  # objects that were stored together are listed together
def _iso_ns(text: str) -> int | None:
    """None if it is no time."""
    try:
        return whole_seconds(datetime.fromisoformat(text))
    except (ValueError, OverflowError):
        return None

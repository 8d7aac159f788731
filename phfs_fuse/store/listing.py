"""Reads the XML of one page of ListObjectsV2, with MinIO's extension. Pure; owns no state.

Source: S3 API reference, ListObjectsV2; MinIO answers `metadata=true` with the elements `UserMetadata` (one
element per header, spelled as the header: `X-Amz-Meta-Mode`) and `Internal`, both only where the caller may
read the object. Parsed here and not by botocore, which does not know these elements.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from urllib.parse import unquote_plus
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from phfs_fuse.errors import BadAnswer
from phfs_fuse.store.base import Listing, ObjectInfo
from phfs_fuse.store.headers import SECOND_NS, user_metadata
from phfs_fuse.types import ETag, ObjectKey


def parse_listing(prefix: str, body: bytes) -> Listing:
    """The page in `body`. Raises: BadAnswer if it is none. `prefix` is for the message."""
    try:
        root = ElementTree.fromstring(body)
        if _local(root) != "ListBucketResult":
            raise BadAnswer("list", prefix, f"an answer of type {_local(root)!r}")
        return _page(root)
    except (ElementTree.ParseError, KeyError, ValueError) as exc:
        raise BadAnswer("list", prefix, f"no listing: {type(exc).__name__}") from exc


def is_xml(body: bytes) -> bool:
    try:
        ElementTree.fromstring(body)
    except ElementTree.ParseError:
        return False
    return True


def _page(root: Element) -> Listing:
    fields = {_local(child): child.text or "" for child in root}
    decode: Callable[[str], str] = unquote_plus if fields.get("EncodingType") == "url" else str
    objects = [_object(child, decode) for child in root if _local(child) == "Contents"]
    prefixes = [_prefix(child, decode) for child in root if _local(child) == "CommonPrefixes"]
    next_token = fields["NextContinuationToken"] if fields.get("IsTruncated") == "true" else None
    return Listing(objects=objects, prefixes=prefixes, next_token=next_token)


def _local(element: Element) -> str:
    return element.tag.rpartition("}")[2]  # the namespace differs between stores


def _prefix(element: Element, decode: Callable[[str], str]) -> str:
    return decode({_local(child): child.text or "" for child in element}["Prefix"])


def _object(element: Element, decode: Callable[[str], str]) -> ObjectInfo:
    fields = {_local(child): child for child in element}
    etag = fields["ETag"].text or "" if "ETag" in fields else ""
    return ObjectInfo(
        key=ObjectKey(decode(fields["Key"].text or "")),
        etag=ETag(etag.strip('"')),
        size=int(fields["Size"].text or ""),
        modified_ns=_iso_ns(fields["LastModified"].text or ""),
        metadata=_metadata(fields),
    )


def _metadata(fields: Mapping[str, Element]) -> Mapping[str, str] | None:
    if "UserMetadata" in fields:
        return user_metadata({_local(child): child.text or "" for child in fields["UserMetadata"]})
    return {} if "Internal" in fields else None


def _iso_ns(text: str) -> int:
    """Whole seconds, as HEAD answers them: the same version must not show two times."""
    return int(datetime.fromisoformat(text).timestamp()) * SECOND_NS

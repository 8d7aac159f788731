"""XML documents in the bodies of requests and answers, but for listings (`store.listing`). Pure; owns no state."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from phfs_fuse.errors import BadAnswer
from phfs_fuse.store.base import Part
from phfs_fuse.store.error_codes import error_code, error_of, reading
from phfs_fuse.store.headers import quoted


def told_etag(op: str, key: str, body: bytes) -> str:
    """The ETag of what the store has made; "" if it names none. Raises: what the answer means. A request that fails
    after the first byte of its answer is a 200 with an error. Source: S3 API reference, CopyObject."""
    with reading(op, key):
        root = ElementTree.fromstring(body)
    if root.tag.rpartition("}")[2] == "Error":
        raise error_of(op, key, error_code(body), 500)
    return root.findtext("{*}ETag") or ""


def told_upload_id(key: str, body: bytes) -> str:
    """Raises: BadAnswer."""
    with reading("create multipart", key):
        found = ElementTree.fromstring(body).findtext("{*}UploadId")
    if not found:
        raise BadAnswer("create multipart", key, "an answer without UploadId")
    return found


def list_of_parts(parts: Sequence[Part]) -> bytes:
    """The body of CompleteMultipartUpload."""
    rows = (
        f"<Part><ETag>{escape(quoted(part.etag))}</ETag><PartNumber>{part.part_no}</PartNumber></Part>"
        for part in parts
    )
    root = "CompleteMultipartUpload"
    return f'<{root} xmlns="http://s3.amazonaws.com/doc/2006-03-01/">{"".join(rows)}</{root}>'.encode()

"""Lines of MinIO's stream of events."""

from __future__ import annotations

import json

import pytest

from phfs_fuse.errors import BadAnswer
from phfs_fuse.store.base import StoreEvent
from phfs_fuse.store.notifications import parse_events
from phfs_fuse.types import ETag, ObjectKey


def line(name: str, **found: object) -> bytes:
    return json.dumps({"Records": [{"eventName": name, "s3": {"object": found}}]}).encode()


STORED = line(
    "s3:ObjectCreated:Put",
    key='g/a b+c%20é"',
    size=3,
    eTag="e1",
    userMetadata={"X-Amz-Meta-Mode": "0100644", "content-type": "x/y"},
)


@pytest.mark.parametrize(
    ("text", "events"),
    [
        (b"", []),
        (b"  ", []),
        (b'{"Records":null}', []),
        (line("s3:ObjectAccessed:Head", key="g/a"), []),
        (
            STORED,
            [StoreEvent(key=ObjectKey('g/a b+c%20é"'), etag=ETag("e1"), size=3, metadata={"mode": "0100644"})],
        ),
        (
            line("s3:ObjectRemoved:Delete", key="g/a"),
            [StoreEvent(key=ObjectKey("g/a"), etag=None, size=0, metadata={})],
        ),
        (
            line("s3:ObjectCreated:Put", key="g/d/"),  # an empty object has no size, and here no version
            [StoreEvent(key=ObjectKey("g/d/"), etag=ETag(""), size=0, metadata={})],
        ),
    ],
)
def test_lines(text: bytes, events: list[StoreEvent]) -> None:
    assert parse_events(text) == events


@pytest.mark.parametrize("text", [b"{", b"[]", b'{"Records":[{}]}', b'{"Records":[7]}', b"<xml/>", b"\xff"])
def test_nonsense(text: bytes) -> None:
    with pytest.raises(BadAnswer):
        parse_events(text)

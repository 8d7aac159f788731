"""Objects made of parts: sent, copied, completed once, aborted."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

import pytest
import trio

from phfs_fuse.errors import InvalidArgument, NotFound, StoreUnavailable, VersionChanged
from phfs_fuse.store import s3
from phfs_fuse.store.base import Expect, FileRange, Part
from phfs_fuse.types import MIB, S3_PART_BYTES_MIN, ETag
from tests.contract.place import Place

OTHER = ETag("0123456789abcdef0123456789abcdef")
BLOCK = os.urandom(S3_PART_BYTES_MIN)


@pytest.fixture
def file() -> Iterator[int]:
    with tempfile.TemporaryFile() as opened:
        opened.write(BLOCK + b"tail")
        opened.flush()
        yield opened.fileno()


async def test_parts_in_any_order_become_one_object(place: Place, file: int) -> None:
    key = place.key("x")
    upload_id = await place.store.create_multipart(key, {"mode": "0100600"})
    last = await place.store.upload_part(key, upload_id, 2, FileRange(file, S3_PART_BYTES_MIN, 4))
    first = await place.store.upload_part(key, upload_id, 1, FileRange(file, 0, S3_PART_BYTES_MIN))
    assert await place.names() == []
    info = await place.store.complete_multipart(key, upload_id, [last, first], expect=Expect(None))
    assert (info.size, info.metadata) == (len(BLOCK) + 4, {"mode": "0100600"})
    assert (await place.head("x")).etag == info.etag
    assert await place.read("x", 0, info.size, info.etag) == BLOCK + b"tail"


async def test_copied_parts_beside_sent_ones(place: Place) -> None:
    source = await place.put("source", BLOCK + b"old tail")
    key = place.key("x")
    upload_id = await place.store.create_multipart(key, {})
    parts = [
        await place.store.upload_part_copy(key, upload_id, 1, source.key, source.etag, 0, len(BLOCK)),
        await place.store.upload_part(key, upload_id, 2, b"new tail"),
    ]
    info = await place.store.complete_multipart(key, upload_id, parts, expect=None)
    assert await place.read("x", 0, info.size, info.etag) == BLOCK + b"new tail"


async def test_a_part_of_another_version_is_not_copied(place: Place) -> None:
    await place.put("source", BLOCK)
    upload_id = await place.store.create_multipart(place.key("x"), {})
    for name in ("source", "gone"):
        with pytest.raises(VersionChanged):
            await place.store.upload_part_copy(place.key("x"), upload_id, 1, place.key(name), OTHER, 0, len(BLOCK))
    await place.store.abort_multipart(place.key("x"), upload_id)


@pytest.mark.parametrize("there", [True, False])
async def test_completing_under_a_condition_that_fails(place: Place, there: bool) -> None:
    if there:
        await place.put("x", b"first")
    key = place.key("x")
    upload_id = await place.store.create_multipart(key, {})
    part = await place.store.upload_part(key, upload_id, 1, b"second")
    expects = [Expect(OTHER), Expect(None)] if there else [Expect(OTHER)]
    for expect in expects:
        with pytest.raises(VersionChanged):
            await place.store.complete_multipart(key, upload_id, [part], expect=expect)
    assert await place.names() == (["x"] if there else [])
    await place.store.abort_multipart(key, upload_id)


async def test_completing_over_the_expected_version(place: Place) -> None:
    etag = (await place.put("x", b"first")).etag
    key = place.key("x")
    upload_id = await place.store.create_multipart(key, {})
    part = await place.store.upload_part(key, upload_id, 1, b"second")
    info = await place.store.complete_multipart(key, upload_id, [part], expect=Expect(etag))
    assert await place.read("x", 0, 6, info.etag) == b"second"


async def test_completing_again_is_the_same_success(place: Place) -> None:
    """As after a crash between the store's answer and the note of it."""
    key = place.key("x")
    upload_id = await place.store.create_multipart(key, {"mode": "0100644"})
    part = await place.store.upload_part(key, upload_id, 1, b"bytes")
    first = await place.store.complete_multipart(key, upload_id, [part], expect=Expect(None))
    again = await place.store.complete_multipart(key, upload_id, [part], expect=Expect(None))
    assert (again.etag, again.size) == (first.etag, first.size)


async def test_an_upload_that_is_not_there(place: Place) -> None:
    key = place.key("x")
    upload_id = await place.store.create_multipart(key, {})
    part = await place.store.upload_part(key, upload_id, 1, b"bytes")
    await place.store.abort_multipart(key, upload_id)
    await place.store.abort_multipart(key, upload_id)
    wanted = StoreUnavailable if "moto" in place.store_name else NotFound  # moto answers 500
    with pytest.raises(wanted):
        await place.store.upload_part(key, upload_id, 1, b"bytes")
    with pytest.raises(wanted):
        await place.store.complete_multipart(key, upload_id, [part], expect=None)
    assert await place.names() == []


async def test_a_part_that_was_never_sent(place: Place) -> None:
    key = place.key("x")
    upload_id = await place.store.create_multipart(key, {})
    await place.store.upload_part(key, upload_id, 1, b"bytes")
    with pytest.raises(InvalidArgument):
        await place.store.complete_multipart(key, upload_id, [Part(1, OTHER)], expect=None)
    await place.store.abort_multipart(key, upload_id)


async def test_open_uploads_are_listed(place: Place) -> None:
    key = place.key("x")
    upload_id = await place.store.create_multipart(key, {})
    (upload,) = await place.store.list_multipart(key)
    assert (upload.key, upload.upload_id) == (key, upload_id)
    await place.store.abort_multipart(key, upload_id)
    assert list(await place.store.list_multipart(key)) == []


async def test_a_copy_too_big_for_one_request(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "COPY_BYTES_MAX", MIB)
    monkeypatch.setattr(s3, "COPY_PART_BYTES", S3_PART_BYTES_MIN)
    source = await place.put("source", BLOCK + b"tail")
    size = len(BLOCK) + 4
    key = place.key("x")
    copied = await place.store.copy(source.key, source.etag, key, size, {"mode": "0100644"}, expect=Expect(None))
    assert (copied.size, copied.metadata) == (size, {"mode": "0100644"})
    assert await place.read("x", 0, size, copied.etag) == BLOCK + b"tail"
    with pytest.raises(VersionChanged):
        await place.store.copy(source.key, OTHER, place.key("y"), size, {}, expect=None)
    assert await place.names() == ["source", "x"]
    assert list(await place.store.list_multipart(place.key("y"))) == []


async def test_many_parts_at_a_time(place: Place) -> None:
    key = place.key("x")
    upload_id = await place.store.create_multipart(key, {})
    parts: list[Part] = []

    async def send(part_no: int) -> None:
        parts.append(await place.store.upload_part(key, upload_id, part_no, BLOCK))

    async with trio.open_nursery() as nursery:
        for part_no in range(1, 5):
            nursery.start_soon(send, part_no)
    info = await place.store.complete_multipart(key, upload_id, parts, expect=None)
    assert info.size == 4 * len(BLOCK)
    assert await place.read("x", len(BLOCK) - 3, len(BLOCK) + 3) == BLOCK[-3:] + BLOCK[:3]

"""Requests that had their effect, though nobody heard of it."""

from __future__ import annotations

import pytest

from phfs_fuse.errors import BucketNotFound, VersionChanged
from phfs_fuse.store.base import Expect
from phfs_fuse.store.s3 import S3Store
from phfs_fuse.types import S3_PART_BYTES_MIN
from tests.contract.faulty import BIG, SLOW_DOWN, SMALL, is_real, sent, through
from tests.support.proxy import Answer, Forward, Proxy, Request, forward_all

pytestmark = pytest.mark.usefixtures("credentials")


def lose_first(front: Proxy, method: str, part: str = "") -> None:
    """Let the first such request have its effect, and its answer never arrive."""
    to_lose = iter([True])

    def script(request: Request) -> Forward:
        hits = is_real(request, method) and part in request.path
        return Forward(lost=hits and next(to_lose, False))

    front.script = script


@pytest.mark.parametrize("data", [SMALL, BIG], ids=["small", "big"])
@pytest.mark.parametrize("over", [False, True])
async def test_a_put_whose_answer_was_lost(kind: type[S3Store], front: Proxy, data: bytes, over: bool) -> None:
    async with through(kind, front) as place:
        etag = (await place.put("x", b"before")).etag if over else None
        lose_first(front, "PUT", "/p/x")
        info = await place.put("x", data, {"mode": "0100644"}, Expect(etag))
        assert await place.head("x") == info
        assert len(sent(front, "PUT", "/p/x")) == 2 + over


async def test_a_lost_answer_is_no_excuse_for_overwriting(kind: type[S3Store], front: Proxy) -> None:
    async with through(kind, front) as place:
        etag = (await place.put("x", b"before")).etag
        await place.put("x", b"others")
        front.script = lambda request: SLOW_DOWN if len(sent(front, "PUT", "/p/x")) == 3 else Forward()
        with pytest.raises(VersionChanged):
            await place.put("x", b"ours", expect=Expect(etag))
        assert await place.read("x", 0, 6) == b"others"


async def test_a_copy_onto_itself_whose_answer_was_lost(kind: type[S3Store], front: Proxy) -> None:
    async with through(kind, front) as place:
        source = await place.put("x", SMALL, {"mode": "0100644"})
        lose_first(front, "PUT", "/p/x")
        copied = await place.store.copy(
            source.key, source.etag, source.key, 10, {"mode": "0100600"}, expect=Expect(source.etag)
        )
        assert (await place.head("x")).metadata == copied.metadata == {"mode": "0100600"}


async def test_a_completion_whose_answer_was_lost(kind: type[S3Store], front: Proxy) -> None:
    async with through(kind, front) as place:
        key = place.key("x")
        upload_id = await place.store.create_multipart(key, {})
        parts = [
            await place.store.upload_part(key, upload_id, 1, bytes(S3_PART_BYTES_MIN)),
            await place.store.upload_part(key, upload_id, 2, SMALL),
        ]
        lose_first(front, "POST")
        info = await place.store.complete_multipart(key, upload_id, parts, expect=Expect(None))
        assert info.size == S3_PART_BYTES_MIN + len(SMALL)
        assert await place.head("x") == info


async def test_a_delete_whose_answer_was_lost(kind: type[S3Store], front: Proxy) -> None:
    async with through(kind, front) as place:
        etag = (await place.put("x", SMALL)).etag
        lose_first(front, "DELETE")
        await place.store.delete(place.key("x"), expect=Expect(etag))
        assert await place.names() == []


async def test_a_bucket_that_is_away_is_no_object_that_is_gone(kind: type[S3Store], front: Proxy) -> None:
    """HEAD is answered by a bare 404 in both cases."""
    body = b"<Error><Code>NoSuchBucket</Code></Error>"
    async with through(kind, front) as place:
        info = await place.put("x", SMALL)
        await place.put("y", SMALL, expect=Expect(None))  # which conditions are kept is known now
        front.script = lambda _: Answer(404, {"Content-Type": "application/xml"}, body)
        x, metadata = place.key("x"), {"mode": "0100600"}
        with pytest.raises(BucketNotFound):
            await place.store.delete(x, expect=Expect(info.etag))
        with pytest.raises(BucketNotFound):
            await place.store.copy(x, info.etag, x, info.size, metadata, expect=Expect(info.etag))
        with pytest.raises(BucketNotFound):
            await place.store.head(x, surely=True)
        with pytest.raises(BucketNotFound):
            await place.store.properties(x, info.etag)
        front.script = forward_all
        assert await place.names() == ["x", "y"]

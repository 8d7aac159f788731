"""Stores that are away, busy, cut answers off or talk nonsense: one clear error, or none."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio

from phfs_fuse.errors import (
    AccessDenied,
    BadAnswer,
    NotFound,
    PhfsError,
    StoreTimeout,
    StoreUnavailable,
    VersionChanged,
)
from phfs_fuse.store.base import Expect
from phfs_fuse.store.s3 import S3Store
from tests.contract.faulty import BIG, DENIED, OTHER, SLOW_DOWN, SMALL, in_turn, is_real, opened, sent, through
from tests.contract.place import read
from tests.support.proxy import Answer, Forward, Proxy, proxy
from tests.support.servers import Server, silent, unreachable

Call = Callable[[], Awaitable[object]]
pytestmark = pytest.mark.usefixtures("credentials")


# -- away


async def test_nobody_listens(kind: type[S3Store]) -> None:
    with unreachable() as url:
        async with opened(kind, url, attempts_max=2) as place:
            for call in (
                place.store.check_bucket,
                lambda: place.head("x"),
                lambda: place.put("x", SMALL),
                lambda: place.put("x", SMALL, expect=Expect(None)),
                lambda: place.put("x", BIG),
                lambda: place.read("x", 0, 1),
                lambda: place.read("x", 0, len(BIG)),
                lambda: place.store.delete_many({place.key("x"): None}),
            ):
                with pytest.raises(StoreUnavailable):
                    await call()


async def test_a_server_that_says_nothing(kind: type[S3Store]) -> None:
    with silent() as url:
        async with opened(kind, url, attempts_max=1, read_seconds=0.3) as place:
            for call in (
                lambda: place.list(),
                lambda: place.head("x"),
                lambda: place.put("x", SMALL),
                lambda: place.read("x", 0, 1),
                lambda: place.read("x", 0, len(BIG)),
            ):
                with pytest.raises(StoreTimeout):
                    await call()


async def test_reads_can_be_cancelled_while_the_server_says_nothing(kind: type[S3Store]) -> None:
    with silent() as url:
        async with opened(kind, url, attempts_max=1, read_seconds=3) as place:
            for call in (
                lambda: place.list(),
                lambda: place.head("x"),
                lambda: place.read("x", 0, 1),
                lambda: place.read("x", 0, len(BIG)),
            ):
                with trio.move_on_after(0.1) as scope:
                    await call()
                assert scope.cancelled_caught


@pytest.mark.parametrize("data", [SMALL * 10_000, BIG], ids=["small", "big"])
async def test_no_byte_reaches_the_sink_after_a_cancellation(kind: type[S3Store], front: Proxy, data: bytes) -> None:
    async with through(kind, front) as place:
        await place.put("x", data)
        offsets: list[int] = []
        cancelled = trio.Event()
        token = trio.lowlevel.current_trio_token()

        def sink(offset: int, chunk: bytes | memoryview) -> None:
            assert not cancelled.is_set()
            offsets.append(offset)
            token.run_sync_soon(scope.cancel)

        with trio.CancelScope() as scope:
            await place.store.get(place.key("x"), 0, len(data), etag=None, sink=sink)
        cancelled.set()
        count = len(offsets)
        await place.head("x")  # a round trip later
        assert len(offsets) == count >= 1


# -- busy


async def test_a_busy_store_is_asked_again(kind: type[S3Store], front: Proxy) -> None:
    async with through(kind, front) as place:
        await place.put("x", SMALL)
        for call in (
            lambda: place.head("x"),
            lambda: place.read("x", 0, 10),
            lambda: place.put("x", SMALL),
            lambda: place.list(),
            lambda: place.store.delete_many({place.key("x"): None}),
        ):
            front.script = in_turn(SLOW_DOWN, SLOW_DOWN, Forward())
            front.requests.clear()
            await call()
            assert len(front.requests) == 3


async def test_but_not_for_ever(kind: type[S3Store], front: Proxy) -> None:
    async with through(kind, front) as place:
        front.script = lambda _: SLOW_DOWN
        calls: list[Call] = [
            lambda: place.head("x"),
            lambda: place.put("x", SMALL),
            lambda: place.put("x", BIG),
        ]
        for call in calls:
            front.requests.clear()
            with pytest.raises(StoreUnavailable):
                await call()
            assert len(front.requests) == 3


async def test_what_no_second_try_changes_is_tried_once(kind: type[S3Store], front: Proxy) -> None:
    async with through(kind, front) as place:
        front.script = lambda _: DENIED
        calls: list[tuple[Call, list[str]]] = [
            (lambda: place.head("x"), ["HEAD", "GET"]),  # a HEAD has no body that tells rights from credentials
            (lambda: place.put("x", SMALL), ["PUT"]),
            (lambda: place.read("x", 0, 1), ["GET"]),
        ]
        for call, sent_methods in calls:
            front.requests.clear()
            with pytest.raises(AccessDenied):
                await call()
            assert [request.method for request in front.requests] == sent_methods


# -- short answers


@pytest.mark.parametrize("data", [SMALL, BIG], ids=["small", "big"])
async def test_a_body_that_was_cut_goes_on_where_it_ended(kind: type[S3Store], front: Proxy, data: bytes) -> None:
    async with through(kind, front) as place:
        etag = (await place.put("x", data)).etag
        cuts = iter([4, 3])
        front.script = lambda request: Forward(cut=next(cuts, None)) if is_real(request, "GET") else Forward()
        assert await place.read("x", 1, len(data)) == data[1:]
        gets = sent(front, "GET", "/p/x")
        ranges = [request.headers["range"] for request in gets]
        last = len(data) - 1
        assert ranges == [f"bytes=1-{last}", f"bytes=5-{last}", f"bytes=8-{last}"]
        assert [request.headers.get("if-match") for request in gets] == [None, f'"{etag}"', f'"{etag}"']


async def test_bodies_that_are_always_cut(kind: type[S3Store], front: Proxy) -> None:
    async with through(kind, front) as place:
        await place.put("x", SMALL)
        front.script = lambda request: Forward(cut=2)
        got: list[bytes] = []
        with pytest.raises(StoreUnavailable):
            await place.store.get(place.key("x"), 0, 10, etag=None, sink=lambda _, chunk: got.append(bytes(chunk)))
        assert b"".join(got) == SMALL[:6]


async def test_two_versions_are_never_mixed(kind: type[S3Store], front: Proxy) -> None:
    """Not even where the store ignores If-Match on GET."""
    newer = Answer(206, {"ETag": f'"{OTHER}"', "Content-Range": "bytes 2-9/10"}, b"ABCDEFGH")
    async with through(kind, front) as place:
        await place.put("x", SMALL)
        front.script = in_turn(Forward(cut=2), newer)
        got: list[bytes] = []
        with pytest.raises(VersionChanged):
            await place.store.get(place.key("x"), 0, 10, etag=None, sink=lambda _, chunk: got.append(bytes(chunk)))
        assert b"".join(got) == SMALL[:2]


# -- nonsense


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ({"ETag": '"e"', "Content-Range": "bytes 3-12/20"}, SMALL),
        ({"ETag": '"e"', "Content-Range": "bytes 0-4/20"}, SMALL[:5]),
        ({"ETag": '"e"', "Content-Range": "some"}, SMALL),
        ({"ETag": '"e"', "Content-Range": "bytes 0-9/20"}, SMALL + b"more"),
        ({"ETag": '"e"'}, SMALL + b"more"),
        ({"Content-Range": "bytes 0-9/20"}, SMALL),
    ],
    ids=["elsewhere", "shorter", "unreadable", "longer", "whole", "no-etag"],
)
async def test_other_bytes_than_asked_for(
    kind: type[S3Store], front: Proxy, headers: dict[str, str], body: bytes
) -> None:
    async with opened(kind, front.endpoint_url, attempts_max=2) as place:
        front.script = lambda _: Answer(206 if "Content-Range" in headers else 200, headers, body)
        with pytest.raises(BadAnswer):
            await place.read("x", 0, 10)


async def test_an_answer_of_another_version(kind: type[S3Store], front: Proxy) -> None:
    async with opened(kind, front.endpoint_url) as place:
        front.script = lambda _: Answer(206, {"ETag": '"e"', "Content-Range": "bytes 0-9/20"}, SMALL)
        with pytest.raises(VersionChanged):
            await place.read("x", 0, 10, OTHER)


@pytest.mark.parametrize("body", [b"<html>hello</html>", b"<ListBucketResult><Contents>", b"", b"\xff\xfe"])
async def test_a_listing_that_is_none(kind: type[S3Store], front: Proxy, body: bytes) -> None:
    async with opened(kind, front.endpoint_url, attempts_max=2) as place:
        front.script = lambda _: Answer(200, {}, body)
        for call in (lambda: place.list(), place.store.check_bucket):
            with pytest.raises(BadAnswer):
                await call()


async def test_answers_without_an_etag(kind: type[S3Store], front: Proxy) -> None:
    async with opened(kind, front.endpoint_url, attempts_max=2) as place:
        front.script = lambda _: Answer(200, {}, b"")
        calls: list[Call] = [
            lambda: place.head("x"),
            lambda: place.put("x", SMALL),
            lambda: place.put("x", BIG),
        ]
        for call in calls:
            with pytest.raises(BadAnswer):
                await call()


@pytest.mark.parametrize(
    ("status", "error"), [(403, AccessDenied), (404, NotFound), (500, StoreUnavailable), (502, StoreUnavailable)]
)
async def test_errors_without_a_code(kind: type[S3Store], front: Proxy, status: int, error: type[PhfsError]) -> None:
    async with opened(kind, front.endpoint_url, attempts_max=1) as place:
        front.script = lambda _: Answer(status, {}, b"<html>from a gateway</html>")
        for call in (
            lambda: place.head("x"),
            lambda: place.read("x", 0, 10),
            lambda: place.put("x", SMALL),
            lambda: place.list(),
        ):
            with pytest.raises(error):
                await call()


# -- listings with metadata


@pytest.mark.minio
@pytest.mark.parametrize(
    "answer", [DENIED, Answer(200, {}, b"<ListBucketResult><Contents><a!b/></Contents></ListBucketResult>")]
)
async def test_metadata_that_cannot_be_listed(kind: type[S3Store], minio_server: Server, answer: Answer) -> None:
    """Refused to these credentials, or a foreign name in it that XML cannot carry."""
    with proxy(minio_server.endpoint_url) as front:
        async with through(kind, front) as place:
            await place.put("x", SMALL, {"mode": "0100644"})
            assert [info.metadata for info in (await place.list()).objects] == [{"mode": "0100644"}]
            assert place.store.lists_metadata
            front.script = lambda request: answer if "metadata=true" in request.path else Forward()
            (listed,) = (await place.list()).objects
            assert (listed.size, listed.metadata) == (10, None)
        async with opened(kind, front.endpoint_url) as place:
            await place.store.check_bucket()
            assert not place.store.lists_metadata


# -- what others have written


@pytest.mark.minio
async def test_foreign_metadata_does_no_harm(kind: type[S3Store], minio_server: Server) -> None:
    """Headers in raw UTF-8 and Latin-1, as some clients send them."""
    with proxy(minio_server.endpoint_url) as front:
        async with through(kind, front) as place:
            await place.put("x", SMALL, {"mode": "0100644"})
            etag = (await place.head("x")).etag
            headers = {"ETag": f'"{etag}"', "Content-Length": "10"}
            headers["x-amz-meta-name"] = "é😀".encode().decode("latin-1")
            headers["x-amz-meta-odd"] = "\xe9"
            front.script = lambda _: Answer(200, headers, SMALL)
            assert await place.read("x", 0, 10) == SMALL
            metadata = (await place.head("x")).metadata
            assert metadata is not None
            assert metadata["name"] == "é😀"
            assert "odd" in metadata


async def test_a_read_function_sees_a_whole_object(kind: type[S3Store], front: Proxy) -> None:
    """A store that ignores ranges is right where the range is the object."""
    async with opened(kind, front.endpoint_url) as place:
        front.script = lambda _: Answer(200, {"ETag": '"e"'}, SMALL)
        assert await read(place.store, place.key("x"), 0, 10) == SMALL


async def test_an_object_whose_head_is_refused_is_deleted(kind: type[S3Store], front: Proxy) -> None:
    """One that needs a key of its owner (SSE-C): which version is there, a listing tells."""
    refused = Answer(400, {"Content-Type": "application/xml"}, b"<Error><Code>InvalidRequest</Code></Error>")
    async with through(kind, front) as place:
        await place.store.prepare()
        for name in ("x", "y", "z"):
            etag = (await place.put(name, name.encode())).etag
            front.script = lambda request: (
                refused if request.method in ("HEAD", "GET") and "/p/" in request.path else Forward()
            )
            with pytest.raises(VersionChanged):
                await place.store.delete(place.key(name), expect=Expect(OTHER))
            await place.store.delete(place.key(name), expect=Expect(etag))
            front.script = lambda _: Forward()
        assert await place.names() == []

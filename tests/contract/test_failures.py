"""Stores that are away, that hang, lose answers, talk nonsense or ignore conditions: one clear error, or none."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trio

from phfs_fuse.config import StoreConfig
from phfs_fuse.errors import (
    AccessDenied,
    BadAnswer,
    BucketNotFound,
    InvalidArgument,
    NotFound,
    PhfsError,
    StoreTimeout,
    StoreUnavailable,
    VersionChanged,
)
from phfs_fuse.store.base import Expect
from phfs_fuse.store.s3 import S3Store
from phfs_fuse.types import MIB, S3_PART_BYTES_MIN, ETag, ObjectKey
from tests.contract.conftest import BUCKET, KINDS
from tests.contract.place import Place, read
from tests.support.proxy import Answer, Forward, Proxy, Request, Script, forward_all, proxy
from tests.support.servers import ACCESS_KEY, SECRET_KEY, Server, minio_binary, silent, unreachable

OTHER = ETag("0123456789abcdef0123456789abcdef")
SMALL = b"0123456789"
BIG = os.urandom(3 * MIB)  # by the other data path
Call = Callable[[], Awaitable[object]]
CONDITIONS = frozenset({"if-match", "if-none-match", "x-amz-copy-source-if-match"})
SLOW_DOWN = Answer(503, {"Content-Type": "application/xml"}, b"<Error><Code>SlowDown</Code></Error>")
DENIED = Answer(403, {"Content-Type": "application/xml"}, b"<Error><Code>AccessDenied</Code></Error>")

pytestmark = pytest.mark.usefixtures("credentials")


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> type[S3Store]:
    return KINDS[request.param]


@asynccontextmanager
async def opened(
    kind: type[S3Store], url: str, *, bucket: str = BUCKET, attempts_max: int = 3, read_seconds: float = 10
) -> AsyncIterator[Place]:
    config = StoreConfig(
        bucket=bucket,
        endpoint_url=url,
        connect_seconds=2,
        read_seconds=read_seconds,
        attempts_max=attempts_max,
    )
    store = kind(config)
    try:
        yield Place(store, "p/", "proxy")
    finally:
        await store.aclose()


@pytest.fixture
def front(request: pytest.FixtureRequest) -> Iterator[Proxy]:
    """A proxy before a store: MinIO if there is one, it is faster than moto."""
    server: Server = request.getfixturevalue("minio_server" if minio_binary() else "moto_server")
    with proxy(server.endpoint_url) as running:
        yield running


@asynccontextmanager
async def through(kind: type[S3Store], front: Proxy) -> AsyncIterator[Place]:
    """A fresh place behind the proxy, what the set-up sent forgotten."""
    async with opened(kind, front.endpoint_url) as place:
        await place.store.check_bucket(create=True)
        page = await place.list()
        await place.store.delete_many({info.key: None for info in page.objects})
        front.requests.clear()
        yield place


def sent(front: Proxy, method: str, name: str = "") -> list[Request]:
    return [request for request in front.requests if request.method == method and name in request.path]


def in_turn(*actions: Answer | Forward) -> Script:
    queue = iter(actions)
    return lambda _: next(queue)


def is_real(request: Request, method: str) -> bool:
    """Of the test, not one of those by which a store's conditions are tried out."""
    return request.method == method and ".phfs-probe" not in request.path


# -- who may, and where


@pytest.mark.minio
@pytest.mark.parametrize(
    "env", [{"AWS_SECRET_ACCESS_KEY": "not-the-secret"}, {"AWS_ACCESS_KEY_ID": "nobody-knows"}], ids=str
)
async def test_wrong_credentials(
    kind: type[S3Store],
    minio_server: Server,
    env: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    async with opened(kind, minio_server.endpoint_url) as place:
        for call in (
            place.store.check_bucket,
            lambda: place.head("x"),
            lambda: place.put("x", b"1"),
            lambda: place.put("x", b"1", expect=Expect(None)),
            lambda: place.put("x", BIG),
            lambda: place.read("x", 0, 1),
            lambda: place.list(),
        ):
            with pytest.raises(AccessDenied) as caught:
                await call()
            assert not {SECRET_KEY, "not-the-secret"} & set(str(caught.value).split())


async def test_no_credentials_at_all(kind: type[S3Store], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    async with opened(kind, "http://127.0.0.1:9") as place:
        with pytest.raises(AccessDenied, match="AWS_ACCESS_KEY_ID"):
            await place.store.check_bucket()


async def test_a_profile_that_is_not_there(kind: type[S3Store]) -> None:
    store = kind(StoreConfig(bucket=BUCKET, endpoint_url="http://127.0.0.1:9", profile="no-such"))
    with pytest.raises(AccessDenied, match="no-such"):
        await store.check_bucket()


@pytest.mark.minio
async def test_endpoint_and_credentials_of_a_profile(
    kind: type[S3Store], minio_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With credentials that have to be renewed."""
    soon = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    answer = {"Version": 1, "AccessKeyId": ACCESS_KEY, "SecretAccessKey": SECRET_KEY, "Expiration": soon}
    (tmp_path / "answer.json").write_text(json.dumps(answer))
    profile = ["[profile lab]", f"endpoint_url = {minio_server.endpoint_url}"]
    profile.append(f"credential_process = cat {tmp_path}/answer.json")
    (tmp_path / "config").write_text("\n".join(profile))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    store = kind(StoreConfig(bucket=BUCKET, profile="lab"))
    await store.check_bucket(create=True)
    place = Place(store, "profile/", "minio")
    await place.put("x", SMALL)
    assert await place.read("x", 0, 10) == SMALL
    await store.aclose()


async def test_an_endpoint_that_is_no_url(kind: type[S3Store]) -> None:
    async with opened(kind, "not a url") as place:
        with pytest.raises(InvalidArgument):
            await place.store.check_bucket()


@pytest.mark.parametrize("server", ["moto", pytest.param("minio", marks=pytest.mark.minio)])
async def test_a_bucket_that_is_not_there(kind: type[S3Store], server: str, request: pytest.FixtureRequest) -> None:
    url = request.getfixturevalue(f"{server}_server").endpoint_url
    async with opened(kind, url, bucket="no-such-bucket") as place:
        for call in (
            place.store.check_bucket,
            lambda: place.put("x", b"1"),
            lambda: place.put("x", b"1", expect=Expect(None)),
            lambda: place.read("x", 0, 1),
            lambda: place.list(),
        ):
            with pytest.raises(BucketNotFound):
                await call()
        with pytest.raises(NotFound):  # HEAD has no body that could say which of the two
            await place.head("x")


@pytest.mark.parametrize("server", ["moto", pytest.param("minio", marks=pytest.mark.minio)])
async def test_a_bucket_is_made_once(kind: type[S3Store], server: str, request: pytest.FixtureRequest) -> None:
    url = request.getfixturevalue(f"{server}_server").endpoint_url
    async with opened(kind, url, bucket=f"made-by-{kind.__name__.lower()}") as place:
        with pytest.raises(BucketNotFound):
            await place.store.check_bucket()
        await place.store.check_bucket(create=True)
        await place.store.check_bucket(create=True)
        await place.put("x", b"1")


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
        for call in (lambda: place.head("x"), lambda: place.put("x", SMALL), lambda: place.read("x", 0, 1)):
            front.requests.clear()
            with pytest.raises(AccessDenied):
                await call()
            assert len(front.requests) == 1


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


# -- answers that are lost


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
        front.script = forward_all
        assert await place.names() == ["x", "y"]


# -- stores that do not keep conditions


def ignoring(request: Request) -> Forward:
    return Forward(without=CONDITIONS)


def refusing(request: Request) -> Forward | Answer:
    if request.method == "PUT" and CONDITIONS & request.headers.keys():
        return Answer(501, {}, b"<Error><Code>NotImplemented</Code></Error>")
    return Forward()


class ForgettingTheAbsent:
    """As MinIO RELEASE.2025-04-08 to 2025-07-23: If-Match on an object that is not there is no condition."""

    def __init__(self) -> None:
        self.there: set[str] = set()

    def __call__(self, request: Request) -> Forward:
        known = request.path in self.there
        if request.method == "PUT":
            self.there.add(request.path)
        return Forward(without=frozenset() if known else frozenset({"if-match"}))


@pytest.mark.parametrize("make", [lambda: ignoring, ForgettingTheAbsent], ids=["ignoring", "forgetting"])
async def test_conditions_hold_where_the_store_ignores_them(
    kind: type[S3Store], front: Proxy, make: type[ForgettingTheAbsent]
) -> None:
    async with through(kind, front) as place:
        front.script = make()
        first = await place.put("x", b"first", expect=Expect(None))
        second = await place.put("x", b"second", expect=Expect(first.etag))
        for name, expect in (("x", Expect(None)), ("x", Expect(first.etag)), ("gone", Expect(OTHER))):
            with pytest.raises(VersionChanged):
                await place.put(name, b"third", expect=expect)
        with pytest.raises(VersionChanged):
            await place.store.copy(place.key("x"), first.etag, place.key("y"), 6, {}, expect=None)
        upload_id = await place.store.create_multipart(place.key("y"), {})
        with pytest.raises(VersionChanged):
            await place.store.upload_part_copy(place.key("y"), upload_id, 1, place.key("x"), first.etag, 0, 6)
        await place.store.abort_multipart(place.key("y"), upload_id)
        assert (await place.head("x")).etag == second.etag
        assert await place.names() == ["x"]  # and nothing is left of the tries


async def test_conditions_hold_where_the_store_refuses_them(kind: type[S3Store], front: Proxy) -> None:
    async with through(kind, front) as place:
        front.script = refusing
        first = await place.put("x", b"first", expect=Expect(None))
        await place.put("x", b"second", expect=Expect(first.etag))
        with pytest.raises(VersionChanged):
            await place.put("x", b"third", expect=Expect(first.etag))
        copied = await place.store.copy(
            place.key("x"), (await place.head("x")).etag, place.key("y"), 6, {}, expect=Expect(None)
        )
        assert copied.size == 6
        assert await place.names() == ["x", "y"]


async def test_conditions_are_tried_out_once(kind: type[S3Store], front: Proxy) -> None:
    async with through(kind, front) as place, trio.open_nursery() as nursery:
        for name in "abcdef":
            nursery.start_soon(place.put, name, b"1", None, Expect(None))
    probes = {request.path for request in sent(front, "PUT", ".phfs-probe")}
    assert len(probes) == 1
    assert len(sent(front, "DELETE", ".phfs-probe")) == 2  # with a condition, and at the end


async def test_what_a_process_before_left_of_its_trial_goes(kind: type[S3Store], front: Proxy) -> None:
    async with through(kind, front) as place:
        assert isinstance(place.store, S3Store)
        left = ObjectKey(f"{place.store._config.prefix}.phfs-probe-us")
        await place.store.put(left, b"", {}, expect=None)
        place.store._owner = "us"
        await place.put("x", b"1", expect=Expect(None))
        with pytest.raises(NotFound):
            await place.store.head(left)


async def test_probes_that_may_not_be_written(kind: type[S3Store], front: Proxy) -> None:
    async with through(kind, front) as place:
        front.script = lambda request: DENIED if ".phfs-probe" in request.path else Forward()
        first = await place.put("x", b"first", expect=Expect(None))
        for expect in (Expect(None), Expect(OTHER)):
            with pytest.raises(VersionChanged):
                await place.put("x", b"second", expect=expect)
        assert (await place.head("x")).etag == first.etag


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

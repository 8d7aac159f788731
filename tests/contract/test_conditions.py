"""Conditions on stores that do not keep them."""

from __future__ import annotations

import pytest
import trio

from phfs_fuse.errors import NotFound, VersionChanged
from phfs_fuse.store.base import Expect
from phfs_fuse.store.s3 import S3Store
from phfs_fuse.types import ObjectKey
from tests.contract.faulty import DENIED, OTHER, sent, through
from tests.support.proxy import Answer, Forward, Proxy, Request

CONDITIONS = frozenset({"if-match", "if-none-match", "x-amz-copy-source-if-match"})

pytestmark = pytest.mark.usefixtures("credentials")


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
        place.store._trials.name, place.store._trials._is_same = ".phfs-probe-us", True
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

"""The store that fails on demand does so at the call that was named, and nowhere else."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from phfs_fuse.errors import AccessDenied, StoreUnavailable
from phfs_fuse.types import ObjectKey
from tests.support.fake_store import FakeStore
from tests.support.fault_store import FaultStore

KEY = ObjectKey("key")


@pytest.fixture
def fake() -> FakeStore:
    return FakeStore()


@pytest.fixture
def store(fake: FakeStore) -> FaultStore:
    return FaultStore(fake)


async def test_the_nth_call_fails(store: FaultStore) -> None:
    store.fail("put", AccessDenied("put", KEY), nth=2, count=2)
    await store.put(KEY, b"1", {}, expect=None)
    for _ in range(2):
        with pytest.raises(AccessDenied):
            await store.put(KEY, b"2", {}, expect=None)
    await store.put(KEY, b"4", {}, expect=None)
    assert store.calls["put"] == 4


async def test_only_matching_keys_count(store: FaultStore, fake: FakeStore) -> None:
    fake.seed("key")
    fake.seed("other")
    store.fail("head", when=lambda key: key == "other")
    await store.head(KEY)
    with pytest.raises(StoreUnavailable):
        await store.head(ObjectKey("other"))


async def test_a_lost_answer_has_its_effect(store: FaultStore, fake: FakeStore) -> None:
    store.fail("put", after=True)
    with pytest.raises(StoreUnavailable):
        await store.put(KEY, b"1", {}, expect=None)
    assert fake.data("key") == b"1"


async def test_a_store_that_is_away(store: FaultStore, fake: FakeStore) -> None:
    store.down = True
    with pytest.raises(StoreUnavailable):
        await store.put(KEY, b"1", {}, expect=None)
    store.down = False
    await store.put(KEY, b"2", {}, expect=None)
    assert (fake.data("key"), fake.requests["put"]) == (b"2", 1)


async def test_a_cut_download(store: FaultStore, fake: FakeStore) -> None:
    fake.seed("key", b"0123456789")
    got = bytearray()
    store.cut(4)
    with pytest.raises(StoreUnavailable):
        await store.get(KEY, 2, 10, etag=None, sink=lambda _, chunk: got.extend(chunk))
    assert got == b"2345"
    await store.get(KEY, 6, 10, etag=None, sink=lambda _, chunk: got.extend(chunk))
    assert got == b"23456789"


async def test_a_call_is_held_until_the_gate_opens(store: FaultStore, fake: FakeStore) -> None:
    gate = store.hold("put")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: store.put(KEY, b"1", {}, expect=None))
        await gate.entered.wait()
        await wait_all_tasks_blocked()
        assert fake.keys == []
        gate.open.set()
    assert fake.keys == ["key"]


async def test_a_delay_is_by_the_clock_of_trio(store: FaultStore, autojump_clock: MockClock) -> None:
    store.delay("put", 30)
    start = trio.current_time()
    await store.put(KEY, b"1", {}, expect=None)
    assert trio.current_time() - start == 30

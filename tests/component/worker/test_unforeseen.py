"""Exceptions that no code foresees, from any call to the store: what was asked for is tried again, nothing ends."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from phfs_fuse import metrics
from phfs_fuse.config.model import QuotaConfig
from phfs_fuse.namespace.remote_changes import StreamState
from phfs_fuse.quota.counter import QuotaCounter
from phfs_fuse.types import ObjectKey
from phfs_fuse.vfs.vfs import Change
from tests.support.fake_store import FakeStore
from tests.support.fault_store import FaultStore
from tests.support.world import PREFIX, made, running

CALLS = ["put", "copy", "delete", "delete_many", "head", "list", "look", "prepare", "create_multipart", "upload_part"]


@pytest.fixture(autouse=True)
def counted() -> Iterator[None]:
    metrics.UNFORESEEN.values.clear()
    yield
    metrics.UNFORESEEN.values.clear()


def names(store: FakeStore) -> list[str]:
    return sorted(key.removeprefix(PREFIX) for key in store.objects)


@pytest.mark.parametrize("failure", [OverflowError, RecursionError, RuntimeError])
@pytest.mark.parametrize("call", CALLS)
async def test_all_is_stored_in_the_end(
    tmp_path: Path, autojump_clock: MockClock, call: str, failure: type[Exception]
) -> None:
    store = FaultStore(inner := FakeStore())
    async with running(made(store, tmp_path)) as world:
        for name in ("old", "gone", "gone2", "kept"):
            await world.write(name, b"x")
        await world.vfs.mkdir(1, b"d", 0o755, 0, 0)
        await world.settle()
        await world.write("new", b"new")
        await world.write("big", b"b" * (9 << 20))
        await world.vfs.rename(1, b"old", 1, b"moved", 0)
        await world.vfs.setattr((await world.node("kept")).ino, Change(mode=0o600))
        await world.vfs.setattr((await world.node("d")).ino, Change(mode=0o700))
        for name in (b"gone", b"gone2"):
            await world.vfs.unlink(1, name)
        store.fail(call, failure("nobody foresaw it"), count=3)
        await trio.sleep(300)
        await world.settle()
        assert names(inner) == ["big", "d/", "kept", "moved", "new"]
        assert inner.objects[ObjectKey(PREFIX + "moved")].data == b"x"
        assert not world.changes.gone.all()


@pytest.mark.parametrize("call", ["head", "list"])
async def test_a_race_that_is_lost_to_an_unforeseen_answer(
    tmp_path: Path, autojump_clock: MockClock, call: str
) -> None:
    store = FaultStore(inner := FakeStore())
    async with running(made(store, tmp_path)) as world:
        await world.write("f", b"ours")
        await world.store.put(ObjectKey(PREFIX + "f"), b"theirs", {}, expect=None)
        store.fail(call, LookupError("nobody foresaw it"), count=2)
        await trio.sleep(300)
        await world.settle()
        assert inner.objects[ObjectKey(PREFIX + "f")].data == b"theirs"
        assert len(names(inner)) == 2


async def test_a_quota_is_counted_later(tmp_path: Path, autojump_clock: MockClock) -> None:
    store = FaultStore(FakeStore())
    world = made(store, tmp_path)
    keeper = QuotaCounter(
        quotas=world.quotas, store=store, known_sizes=world.changes.known_sizes, journal=world.journal,
        config=QuotaConfig(limits={"": 1000}), prefix=PREFIX,
    )  # fmt: skip
    keeper.begin(resumed=False)
    store.fail("list", LookupError("rot13"), count=2)
    async with running(world), trio.open_nursery() as nursery:
        await nursery.start(keeper.run)
        await trio.sleep(60)
        assert all(quota.counted for quota in world.quotas)
        assert metrics.UNFORESEEN.values["quota count"] == 2
        nursery.cancel_scope.cancel()


async def test_an_event_that_cannot_be_judged_is_one_that_was_missed(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = made(FakeStore(), tmp_path)
    async with running(world), trio.open_nursery() as nursery:
        nursery.start_soon(world.events.run)
        await trio.sleep(1)
        monkeypatch.setattr(world.events, "_judge", lambda _event: {}["x"])
        await world.store.put(ObjectKey(PREFIX + "f"), b"theirs", {}, expect=None)
        await trio.sleep(1)
        assert world.events.state is StreamState.LIVE
        assert world.events.gaps == 1
        nursery.cancel_scope.cancel()


async def test_a_stream_of_events_that_breaks_is_opened_again(tmp_path: Path, autojump_clock: MockClock) -> None:
    store = FaultStore(FakeStore())
    world = made(store, tmp_path)
    store.fail("listen", OverflowError("Infinity"), count=3)
    async with running(world), trio.open_nursery() as nursery:
        nursery.start_soon(world.events.run)
        await trio.sleep(100)
        assert world.events.state is StreamState.LIVE
        nursery.cancel_scope.cancel()

"""Uploads give way to programs that ask much of the mount, for as long as P8 allows."""

from __future__ import annotations

import math
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from phfs_fuse.pending.foreground_load import MANY, MANY_SECONDS, ForegroundLoad
from phfs_fuse.pending.queue import HOLD_SECONDS
from phfs_fuse.types import MIB
from tests.support.fake_store import FakeStore
from tests.support.fault_store import FaultStore
from tests.support.world import PREFIX, World, keys, made, running

QUIET_SECONDS = 0.5  # of the world's config


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with running(made(FakeStore(), tmp_path)) as world:
        yield world


@contextmanager
def busy(world: World, nursery: trio.Nursery) -> Iterator[None]:
    """Programs ask for more than `MANY` things in `MANY_SECONDS` meanwhile."""

    async def ask() -> None:
        with scope:
            while True:
                world.demand.note()
                await trio.sleep(MANY_SECONDS / MANY / 2)

    scope = trio.CancelScope()
    nursery.start_soon(ask)
    yield
    scope.cancel()


async def test_demand_is_high_while_many_requests_come_in_a_short_time(autojump_clock: MockClock) -> None:
    demand = ForegroundLoad()
    assert demand.high_until == -math.inf
    for _ in range(MANY):
        demand.note()
        await trio.sleep(MANY_SECONDS / MANY / 2)
    assert trio.current_time() < demand.high_until
    await trio.sleep(MANY_SECONDS)
    assert trio.current_time() > demand.high_until
    for _ in range(MANY):
        demand.note()
        await trio.sleep(MANY_SECONDS / MANY * 2)
    assert trio.current_time() > demand.high_until


async def test_uploads_wait_for_programs_to_be_calm(
    world: World, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    await world.write("gone", b"x")
    await world.settle()
    with busy(world, nursery):
        await trio.sleep(0.5)
        await world.write("f", b"x")
        await world.vfs.unlink(1, b"gone")
        await trio.sleep(QUIET_SECONDS + HOLD_SECONDS - 0.2)
        assert keys(world) == ["gone"]
    await trio.sleep(2 * MANY_SECONDS)
    assert keys(world) == ["f"]


async def test_nothing_waits_for_longer_than_it_may(
    world: World, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    await world.write("gone", b"x")
    await world.settle()
    with busy(world, nursery):
        await trio.sleep(0.5)
        for number in range(40):
            await world.write(f"f{number}", b"x")
        await world.vfs.unlink(1, b"gone")
        await trio.sleep(QUIET_SECONDS + HOLD_SECONDS + 0.5)
        assert len(keys(world)) == 40
        assert "gone" not in keys(world)


async def test_what_cannot_wait_any_more_goes_up_a_few_at_a_time(
    tmp_path: Path, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    store = FaultStore(FakeStore())
    world = made(store, tmp_path)
    gate = store.hold("put", count=100)
    async with running(world):
        with busy(world, nursery):
            await trio.sleep(0.5)
            for number in range(40):
                await world.write(f"f{number}", b"x")
            await trio.sleep(QUIET_SECONDS + HOLD_SECONDS + 0.5)
            assert store.calls["put"] == 4
        await trio.sleep(2 * MANY_SECONDS)
        assert store.calls["put"] == 16
        gate.open.set()
        await world.settle()


async def test_what_is_waited_for_goes_up_at_once(
    world: World, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    with busy(world, nursery):
        await trio.sleep(0.5)
        await world.write("other", b"x")
        node = await world.write("f", b"x")
        await trio.sleep(QUIET_SECONDS + 0.5)  # both are held back by now
        await world.settling.settle(node)
        assert keys(world) == ["f"]
        with trio.fail_after(0.5):
            assert await world.settling.drain()
        assert keys(world) == ["f", "other"]


async def test_open_and_big_files_do_not_wait(world: World, nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    with busy(world, nursery):
        await trio.sleep(0.5)
        _, fh = await world.vfs.create(1, b"log", 0o644, os.O_RDWR, 0, 0)
        await world.vfs.write(fh, 0, b"line")
        await world.write("big", bytes(2 * MIB))
        await trio.sleep(QUIET_SECONDS + 0.2)
        assert keys(world) == ["big"]
        await trio.sleep(2.5)  # the age of an open file
        assert keys(world) == ["big", "log"]


async def test_a_folder_is_moved_with_few_looks(world: World, autojump_clock: MockClock) -> None:
    await world.vfs.mkdir(1, b"a", 0o755, 0, 0)
    for number in range(300):
        await world.write(f"a/f{number:03}", b"x")
    await world.settle()
    before = world.store.requests.copy()
    await world.vfs.rename(1, b"a", 1, b"b", 0)
    await world.settle()
    cost = world.store.requests - before
    assert keys(world) == [f"b/f{number:03}" for number in range(300)]
    assert cost["copy"] == 300
    assert cost["look"] <= 8  # at a hundred keys each, and what is under way at the end of one
    assert cost["delete_many"] + cost["delete"] <= 12


async def test_who_stores_where_a_folder_is_moved_to_wins(
    world: World, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    await world.vfs.mkdir(1, b"a", 0o755, 0, 0)
    for number in range(30):
        await world.write(f"a/f{number:02}", b"ours")
    await world.settle()
    await world.vfs.rename(1, b"a", 1, b"b", 0)
    world.store.seed(f"{PREFIX}b/f17", b"theirs")
    await world.settle()
    assert world.store.data(f"{PREFIX}b/f17") == b"theirs"
    kept = [key for key in keys(world) if key.startswith("b/f17.conflict-")]
    assert [world.store.data(PREFIX + key) for key in kept] == [b"ours"]
    assert len(keys(world)) == 31
    assert "was changed by somebody else" in caplog.text
    caplog.clear()


async def test_a_look_is_not_believed_for_long(tmp_path: Path, autojump_clock: MockClock) -> None:
    """The first copies take so long that what was seen for the later ones is old: they look again."""
    store = FaultStore(inner := FakeStore())
    world = made(store, tmp_path)
    async with running(world):
        await world.vfs.mkdir(1, b"a", 0o755, 0, 0)
        for number in range(40):
            await world.write(f"a/f{number:02}", b"ours")
        await world.settle()
        gate = store.hold("copy", count=16)
        await world.vfs.rename(1, b"a", 1, b"b", 0)
        await gate.entered.wait()
        await trio.sleep(2)
        inner.seed(f"{PREFIX}b/f30", b"theirs")
        inner.seed(f"{PREFIX}b/f03", b"theirs")
        gate.open.set()
        await world.settle()
    assert inner.data(f"{PREFIX}b/f30") == b"theirs"
    assert inner.data(f"{PREFIX}b/f03") == b"theirs"

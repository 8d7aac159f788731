"""--exclusive-create store: a name is in the store before its maker is told that it has it."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from phfs_fuse.config.model import ExclusiveCreate
from phfs_fuse.errors import Exists, NotFound, StoreUnavailable
from phfs_fuse.store.base import ObjectInfo
from phfs_fuse.tree.node import Node
from phfs_fuse.vfs.directories import RENAME_NOREPLACE
from tests.support.fake_store import FakeStore
from tests.support.fault_store import FaultStore
from tests.support.world import PREFIX, World, made, running

FLAGS = os.O_CREAT | os.O_EXCL | os.O_WRONLY


@pytest.fixture
def store() -> FakeStore:
    found = FakeStore()
    found.has_events = False
    return found


@pytest.fixture
def faults(store: FakeStore) -> FaultStore:
    return FaultStore(store)


def mount(store: FaultStore, directory: Path) -> AbstractAsyncContextManager[World]:
    directory.mkdir()
    return running(made(store, directory, exclusive_create=ExclusiveCreate.STORE))


@pytest.fixture
async def one(faults: FaultStore, tmp_path: Path) -> AsyncIterator[World]:
    async with mount(faults, tmp_path / "one") as world:
        yield world


@pytest.fixture
async def two(faults: FaultStore, tmp_path: Path) -> AsyncIterator[World]:
    async with mount(faults, tmp_path / "two") as world:
        yield world


def names(store: FakeStore) -> list[str]:
    return [key.removeprefix(PREFIX) for key in store.keys]


async def create(world: World, name: bytes) -> None:
    _, fh = await world.vfs.create(1, name, 0o644, FLAGS, 0, 0)
    await world.vfs.write(fh, 0, b"owner")
    world.vfs.release(fh)


async def make_dir(world: World, name: bytes) -> None:
    await world.vfs.mkdir(1, name, 0o755, 0, 0)


async def make_link(world: World, name: bytes) -> None:
    await world.vfs.symlink(1, name, b"host:1234", 0, 0)


async def rename(world: World, name: bytes) -> None:
    source = b"mine of %d" % id(world)
    await world.write(source.decode(), b"owner")
    await world.vfs.rename(1, source, 1, name, RENAME_NOREPLACE)


Make = Callable[[World, bytes], Awaitable[None]]


@pytest.mark.parametrize("make", [create, make_dir, make_link, rename])
async def test_one_of_two_mounts_wins(one: World, two: World, make: Make, autojump_clock: MockClock) -> None:
    for number in range(10):
        won: list[World] = []
        lost: list[World] = []

        async def attempt(world: World, name: bytes, won: list[World], lost: list[World]) -> None:
            try:
                await make(world, name)
                won.append(world)
            except Exists:
                lost.append(world)

        async with trio.open_nursery() as nursery:
            for world in (one, two):
                nursery.start_soon(attempt, world, b"lock%d" % number, won, lost)
        assert (len(won), len(lost)) == (1, 1)
    for world in (one, two):
        await world.settle()
        assert world.journal.conflicts() == []


async def test_what_is_made_is_there_with_one_request(
    one: World, store: FakeStore, autojump_clock: MockClock
) -> None:
    await one.vfs.symlink(1, b"link", b"target", 3, 4)
    assert store.data(PREFIX + "link") == b"target"
    _, fh = await one.vfs.create(1, b"f", 0o640, FLAGS, 3, 4)
    one.vfs.release(fh)
    puts = store.requests["put"]
    await trio.sleep(10)
    assert store.requests["put"] == puts
    node = await one.node("link")
    assert await one.vfs.readlink(node.ino) == b"target"
    info = await store.head(store.keys[0])  # type: ignore[arg-type]
    assert info.metadata is not None
    assert (info.metadata["mode"], info.metadata["uid"]) == ("0100640", "3")


async def test_a_lock_is_made_and_removed_and_made(
    one: World, two: World, store: FakeStore, autojump_clock: MockClock
) -> None:
    for _ in range(3):
        await create(one, b"lock")
        with pytest.raises(Exists):
            await create(two, b"lock")
        await one.vfs.unlink(1, b"lock")
        await create(one, b"lock")  # at once: what is being removed is waited for
        await one.vfs.unlink(1, b"lock")
        await one.settle()
        await trio.sleep(6)
        await create(two, b"lock")
        await two.vfs.unlink(1, b"lock")
        await two.settle()
        await trio.sleep(6)
    assert names(store) == [""]


async def test_a_claim_whose_answer_was_lost_is_removed(
    one: World, store: FakeStore, faults: FaultStore, autojump_clock: MockClock
) -> None:
    faults.fail("put", after=True)
    with pytest.raises(StoreUnavailable):
        await create(one, b"lock")
    assert "lock" in names(store)
    with pytest.raises(NotFound):
        await one.node("lock")
    await trio.sleep(20)
    assert "lock" not in names(store)
    await create(one, b"lock")


@pytest.mark.parametrize("make", [create, make_dir, make_link])
async def test_who_dies_before_the_stores_answer_is_noted_has_the_name(
    one: World, faults: FaultStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Make
) -> None:
    """The kernel asks the next worker for the same."""
    noted = one.changes.created_in_store

    def note(node: Node, info: ObjectInfo) -> None:
        shutil.copytree(tmp_path / "one", tmp_path / "copy")
        noted(node, info)

    monkeypatch.setattr(one.changes, "created_in_store", note)
    await make(one, b"lock")
    after = made(faults, tmp_path / "copy", exclusive_create=ExclusiveCreate.STORE)
    after.changes.recover(())
    async with running(after):
        await make(after, b"lock")
        with pytest.raises(Exists):
            await make(after, b"lock")


async def test_somebody_elses_is_not_removed_with_it(
    one: World, store: FakeStore, faults: FaultStore, autojump_clock: MockClock
) -> None:
    faults.fail("put")
    with pytest.raises(StoreUnavailable):
        await create(one, b"lock")
    store.seed(PREFIX + "lock", b"theirs")
    await trio.sleep(20)
    assert store.data(PREFIX + "lock") == b"theirs"


async def test_looking_at_a_name_while_it_is_made(
    one: World, store: FakeStore, faults: FaultStore, autojump_clock: MockClock
) -> None:
    gate = faults.hold("put", after=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(create, one, b"lock")
        await gate.entered.wait()
        await wait_all_tasks_blocked()
        assert await one.names() == ["lock"]
        gate.open.set()
    await one.settle()
    assert store.data(PREFIX + "lock") == b"owner"
    assert names(store) == ["lock"]


@pytest.mark.parametrize("make", [create, make_dir, make_link, rename])
@pytest.mark.parametrize("theirs", [False, True])
async def test_what_a_dead_worker_claimed_goes_if_nobody_asks_again(
    one: World,
    store: FakeStore,
    faults: FaultStore,
    tmp_path: Path,
    autojump_clock: MockClock,
    make: Make,
    theirs: bool,
) -> None:
    """A new mount, since the kernel's connection has gone too. What others have stored there meanwhile stays."""
    gate = faults.hold("put", when=lambda key: key.startswith(PREFIX + "lock"), after=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(make, one, b"lock")
        await gate.entered.wait()
        await one.journal.room_to_note()
        shutil.copytree(tmp_path / "one", tmp_path / "copy")
        there = dict(store.objects)
        gate.open.set()
    await one.settle()
    store.objects.clear()
    store.objects.update(there)
    (key,) = [key for key in store.keys if key.startswith(PREFIX + "lock")]
    if theirs:
        store.seed(key, b"", {"mode": "0100600"})
    after = made(FaultStore(store), tmp_path / "copy", exclusive_create=ExclusiveCreate.STORE)
    after.changes.recover(())
    after.changes.give_back_claims()
    async with running(after):
        await trio.sleep(20)
        assert (key in store.keys) == theirs
        assert after.journal.claims() == []
        assert [row for row in after.journal.attempts() if row[0] == key] == []

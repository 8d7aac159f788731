"""What a deletion or a move hides until the store has followed: the versions it is about, and nothing of others."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from phfs_fuse.errors import NotFound
from tests.support.fake_store import FakeStore
from tests.support.fault_store import FaultStore
from tests.support.world import PREFIX, World, made, running


@pytest.fixture
def store() -> FakeStore:
    store = FakeStore()
    for number in range(5):
        store.seed(f"{PREFIX}d/f{number}", b"old")
    store.seed(f"{PREFIX}d/s/below", b"old")
    return store


@pytest.fixture
def faults(store: FakeStore) -> FaultStore:
    return FaultStore(store)


@pytest.fixture(params=[False, True], ids=["without events", "with events"])
async def world(faults: FaultStore, tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[World]:
    async with running(made(faults, tmp_path)) as world, trio.open_nursery() as nursery:
        if request.param:
            nursery.start_soon(world.events.run)
            await wait_all_tasks_blocked()
        yield world
        nursery.cancel_scope.cancel()


async def remove_all(world: World, path: str) -> None:
    """As `rm -r` does."""
    folder = await world.node(path)
    for name in await world.names(folder.ino):
        if (await world.node(f"{path}/{name}")).is_dir:
            await remove_all(world, f"{path}/{name}")
        else:
            await world.vfs.unlink(folder.ino, name.encode())
    assert folder.parent is not None
    await world.vfs.rmdir(folder.parent.ino, folder.name)


@pytest.mark.parametrize("name", ["f1", "new", "s/below", "s/new", "new/below"])
async def test_what_others_store_in_a_folder_that_is_being_removed_shows_at_once(
    world: World, store: FakeStore, autojump_clock: MockClock, name: str
) -> None:
    await remove_all(world, "d")
    assert await world.names() == []
    store.seed(f"{PREFIX}d/{name}", b"others")
    if world.events.opened_count == 0:
        await trio.sleep(10)  # what is known of the parent is believed so long
    assert await world.names() == ["d"]
    assert await world.read(f"d/{name}") == b"others"
    await world.settle()
    await trio.sleep(20)
    assert await world.names() == ["d"]
    assert await world.read(f"d/{name}") == b"others"
    assert store.keys == [f"{PREFIX}d/{name}"]


@pytest.mark.parametrize("polls", [False, True])
async def test_what_a_deletion_hid_is_asked_for_when_it_has_ended(
    world: World, store: FakeStore, faults: FaultStore, autojump_clock: MockClock, polls: bool
) -> None:
    """Others store while the deletion is on its way."""
    await remove_all(world, "d")
    gate = faults.hold("delete_many", after=True)
    await gate.entered.wait()
    await wait_all_tasks_blocked()
    store.seed(f"{PREFIX}d/f1", b"others")
    with suppress(NotFound):
        await world.node("d/f1")
    await world.names()
    gate.open.set()
    for _ in range(50):
        await trio.sleep(0.2)
        if polls:
            await world.names()
    assert await world.names() == ["d"]
    assert await world.read("d/f1") == b"others"


@pytest.mark.parametrize("name", ["f1", "new", "s/below", "new/below"])
async def test_what_others_store_under_the_old_name_of_a_folder_shows_while_it_is_moved(
    world: World, store: FakeStore, faults: FaultStore, autojump_clock: MockClock, name: str
) -> None:
    gate = faults.hold("copy", count=100)
    await world.vfs.rename(1, b"d", 1, b"e", 0)
    await gate.entered.wait()
    store.seed(f"{PREFIX}d/{name}", b"others")
    await trio.sleep(10)
    assert await world.names() == ["d", "e"]
    assert await world.read(f"d/{name}") == b"others"
    gate.open.set()
    await world.settle()
    await trio.sleep(20)
    assert await world.names() == ["d", "e"]
    assert await world.read(f"d/{name}") == b"others"
    assert {key for key in store.keys if key.startswith(f"{PREFIX}d/")} == {f"{PREFIX}d/{name}"}
    assert len([key for key in store.keys if key.startswith(f"{PREFIX}e/")]) >= 5


async def test_our_own_version_stays_hidden(
    world: World, store: FakeStore, faults: FaultStore, autojump_clock: MockClock
) -> None:
    """Also one that the store has by an upload without an answer."""
    gate = faults.hold("put", after=True)
    await world.write("d/g", b"ours")
    await gate.entered.wait()
    await remove_all(world, "d")
    for _ in range(3):
        assert await world.names() == []
        await trio.sleep(10)
    gate.open.set()
    await world.settle()
    assert await world.names() == []
    assert not [key for key in store.keys if key.startswith(f"{PREFIX}d/")]


async def test_a_folder_that_shows_again_may_be_used(
    world: World, store: FakeStore, autojump_clock: MockClock
) -> None:
    store.seed(f"{PREFIX}d/", b"", {"mode": "040700"})
    await remove_all(world, "d")
    store.seed(f"{PREFIX}d/f1", b"others")
    await trio.sleep(0.1)
    if world.events.opened_count == 0:
        world.inodes.incomplete(world.inodes.root)
        await trio.sleep(6)
    await world.write("d/mine", b"mine")
    await world.settle()
    await remove_all(world, "d")
    await world.vfs.mkdir(1, b"d", 0o755, 0, 0)
    await world.settle()
    assert store.keys == [f"{PREFIX}d/"]

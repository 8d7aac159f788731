"""A folder is moved while others change it: what was seen is moved, and nobody waits for the others to end."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from phfs_fuse.errors import PhfsError
from tests.support.habits import HabitStore
from tests.support.world import PREFIX, World, made, running

FOLDERS = 20


class BusyStore(HabitStore):
    """Another client stores a file before each listing is answered, while `busy`."""

    busy = False
    stored = 0

    async def list(self, prefix: str, **more: object) -> object:  # type: ignore[override]
        if self.busy:
            self.stored += 1
            self.seed(f"{PREFIX}d/s{self.stored % FOLDERS:02}/new{self.stored}", b"others")
            self.seed(f"{PREFIX}to", b"others") if self.stored % 2 else self.remove(f"{PREFIX}to")
        return await super().list(prefix, **more)  # type: ignore[arg-type]


@pytest.fixture
def store() -> BusyStore:
    store = BusyStore(100)
    for number in range(FOLDERS):
        for file in range(3):
            store.seed(f"{PREFIX}d/s{number:02}/f{file}", b"old")
    return store


@pytest.fixture
async def world(store: BusyStore, tmp_path: Path) -> AsyncIterator[World]:
    async with running(made(store, tmp_path)) as world, trio.open_nursery() as nursery:
        nursery.start_soon(world.events.run)
        await wait_all_tasks_blocked()
        yield world
        nursery.cancel_scope.cancel()


async def test_a_move_ends_while_others_store_in_the_folder_all_the_time(
    world: World, store: BusyStore, autojump_clock: MockClock
) -> None:
    await world.node("d")
    before = store.requests["list"]
    store.busy = True
    with trio.fail_after(600):
        await world.vfs.rename(1, b"d", 1, b"e", 0)
    assert store.requests["list"] - before <= 8 * FOLDERS
    store.busy = False
    store.remove(f"{PREFIX}to")
    await world.settle()
    await trio.sleep(10)
    moved = [f"{PREFIX}e/s{number:02}/f{file}" for number in range(FOLDERS) for file in range(3)]
    assert set(moved) <= set(store.keys)
    new = {key.rsplit("/", 1)[1] for key in store.keys if "/new" in key}
    assert len(new) == store.stored
    assert len([key for key in store.keys if "/new" in key]) == store.stored
    assert not [key for key in store.keys if key.startswith(f"{PREFIX}d/") and "/new" not in key]
    assert await world.names() == ["d", "e"]
    shown = 0
    for top in ("d", "e"):
        for folder in await world.names((await world.node(top)).ino):
            names = await world.names((await world.node(f"{top}/{folder}")).ino)
            shown += len([name for name in names if name.startswith("new")])
    assert shown == store.stored


async def test_a_name_that_others_change_all_the_time_keeps_no_move_waiting(
    world: World, store: BusyStore, autojump_clock: MockClock
) -> None:
    await world.node("d")
    store.busy = True
    with trio.fail_after(600):
        try:
            await world.vfs.rename(1, b"d", 1, b"to", 0)
        except PhfsError:
            return
    assert (await world.node("to")).is_dir

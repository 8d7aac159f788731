"""The marker of a directory that has, or seems to have, nothing left in it."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from phfs_fuse.recovery import Recovery
from phfs_fuse.store.base import Expect, Listing
from phfs_fuse.types import ObjectKey
from tests.support.fake_store import FakeStore
from tests.support.fault_store import FaultStore
from tests.support.world import PREFIX, World, keys, made, running


class Counted(FakeStore):
    """Counts the listings without a delimiter, and holds back their answers until `answer`."""

    def __init__(self) -> None:
        super().__init__()
        self.flat_lists = 0
        self.after_list = trio.Event()
        self.answer = trio.Event()
        self.answer.set()
        self.deleted = trio.Event()

    async def delete(self, key: ObjectKey, *, expect: Expect | None = None) -> None:
        await super().delete(key, expect=expect)
        self.deleted.set()

    async def list(self, prefix: str, *, delimiter: bool, token: str | None = None, count_max: int = 1000) -> Listing:
        page = await super().list(prefix, delimiter=delimiter, token=token, count_max=count_max)
        if not delimiter and count_max > 1:
            self.flat_lists += 1
            self.after_list.set()
            await self.answer.wait()
        return page


@pytest.fixture
def store() -> Counted:
    return Counted()


@pytest.fixture
async def world(store: Counted, tmp_path: Path) -> AsyncIterator[World]:
    async with running(made(store, tmp_path)) as world:
        yield world


async def filled(store: Counted, *names: str) -> None:
    for name in names:
        await store.put(ObjectKey(PREFIX + name), b"x", {}, expect=None)


async def test_a_directory_of_which_one_file_was_known_gets_no_marker_and_is_asked_once(
    world: World, store: Counted, autojump_clock: MockClock
) -> None:
    await filled(store, "d/a", "d/b", "d/c")
    folder = await world.node("d")
    await world.vfs.unlink(folder.ino, b"a")
    await trio.sleep(60)
    assert keys(world) == ["d/b", "d/c"]
    assert store.flat_lists == 1


async def test_the_last_file_of_a_directory_that_was_never_listed_leaves_a_marker(
    world: World, store: Counted, autojump_clock: MockClock
) -> None:
    await filled(store, "d/a", "d/b")
    folder = await world.node("d")
    await world.vfs.unlink(folder.ino, b"a")
    await trio.sleep(5)
    await world.vfs.unlink(folder.ino, b"b")
    await trio.sleep(5)
    assert keys(world) == ["d/"]


async def test_a_listing_that_still_had_what_was_being_removed_hides_no_marker_from_sync(
    world: World, store: Counted, autojump_clock: MockClock
) -> None:
    await filled(store, "d/a")
    folder = await world.node("d")
    store.answer = trio.Event()
    await world.vfs.unlink(folder.ino, b"a")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.settle)
        await store.after_list.wait()
        await store.deleted.wait()
        store.answer.set()
    assert keys(world) == ["d/"]


@pytest.mark.parametrize("dies", [False, True])
async def test_a_marker_whose_answer_was_lost_goes_with_the_first_child(
    tmp_path: Path, autojump_clock: MockClock, dies: bool
) -> None:
    store = FakeStore()
    faults = FaultStore(store)
    world = made(faults, tmp_path / "one" if dies else tmp_path)
    async with running(world):
        folder = await world.vfs.mkdir(1, b"d", 0o755, 0, 0)
        folder.own_attrs = False
        faults.fail("put", after=True, count=1000, when=lambda key: key.endswith("d/"))
        await trio.sleep(1)
        assert PREFIX + "d/" in store.keys
        await world.write("d/x", b"bytes")
        if dies:
            shutil.copytree(tmp_path / "one", tmp_path / "two")
            await world.settle()
            store.seed(PREFIX + "d/")
            world = made(faults, tmp_path / "two")
            recovery = Recovery(world.journal, world.area, world.inodes, world.defaults.directory)
            world.changes.recover(recovery.nodes())
    async with running(world):
        await world.settle()
        await trio.sleep(10)
        assert [key for key in store.keys if key.startswith(PREFIX + "d")] == [PREFIX + "d/x"]

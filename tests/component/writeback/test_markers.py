"""The marker of a directory that has, or seems to have, nothing left in it."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from phfs_fuse.errors import BoundToFolder, NotEmpty
from phfs_fuse.pending.recovery import Recovery
from phfs_fuse.store.base import Expect, Listing
from phfs_fuse.types import ObjectKey
from phfs_fuse.vfs.vfs import Change
from tests.support.fake_store import FakeStore
from tests.support.fault_store import FaultStore
from tests.support.world import PREFIX, World, content, keys, made, running


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

    async def list(
        self,
        prefix: str,
        *,
        delimiter: bool,
        token: str | None = None,
        start_after: str = "",
        count_max: int = 1000,
    ) -> Listing:
        page = await super().list(
            prefix, delimiter=delimiter, token=token, start_after=start_after, count_max=count_max
        )
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


BYTES = b"bytes of an object"


async def test_a_marker_that_holds_bytes_shows_them_as_a_file(world: World, store: Counted) -> None:
    store.seed(PREFIX + "d/", BYTES)
    store.seed(PREFIX + "d/x", b"x")
    store.seed(PREFIX + "empty/")
    folder = await world.node("d")
    assert sorted(await world.names(folder.ino)) == [".phfs-file", "x"]
    assert await world.names((await world.node("empty")).ino) == []
    assert await world.read("d/.phfs-file") == BYTES
    assert (await world.node("d/.phfs-file")).size == len(BYTES)


@pytest.mark.parametrize("listed", [False, True])
async def test_bytes_of_a_marker_stay(world: World, store: Counted, listed: bool, autojump_clock: MockClock) -> None:
    for name in ("rmdir", "child", "move", "chmod", "both"):
        store.seed(f"{PREFIX}{name}/", BYTES, {"project": "alpha"}, {"content-type": "a/b"}, "team=red")
    for name in ("rmdir", "child", "move", "chmod", "both") if listed else ():
        await world.names((await world.node(name)).ino)
    with pytest.raises(NotEmpty):
        await world.vfs.rmdir(1, b"rmdir")
    await world.write("child/x", b"x")
    await world.vfs.rename(1, b"move", 1, b"moved", 0)
    await world.vfs.setattr((await world.node("chmod")).ino, Change(mode=0o700))
    await world.vfs.setattr((await world.node("both")).ino, Change(mode=0o700))
    await world.vfs.rename(1, b"both", 1, b"other", 0)
    await world.settle()
    await trio.sleep(60)
    assert keys(world) == ["child/", "child/x", "chmod/", "moved/", "other/", "rmdir/"]
    for name in ("child", "chmod", "moved", "other", "rmdir"):
        found = store.objects[ObjectKey(f"{PREFIX}{name}/")]
        assert (found.data, found.metadata["project"], found.tags) == (BYTES, "alpha", "team=red"), name
        assert found.headers["content-type"] == "a/b"
        assert await world.read(f"{name}/.phfs-file") == BYTES
    for name in ("chmod", "other"):
        assert store.objects[ObjectKey(f"{PREFIX}{name}/")].metadata["mode"] == "040700"
    assert store.requests["copy"] <= 5


async def test_bytes_of_a_marker_can_be_changed_and_removed_as_a_file(
    world: World, store: Counted, autojump_clock: MockClock
) -> None:
    for name in ("a/", "b/", "c/"):
        store.seed(PREFIX + name, BYTES)
    await world.write("c/x", b"x")
    await world.write_again("a/.phfs-file", b"BYTES")
    for name in ("b", "c"):
        await world.vfs.unlink((await world.node(name)).ino, b".phfs-file")
    with pytest.raises(BoundToFolder):
        await world.vfs.rename((await world.node("a")).ino, b".phfs-file", 1, b"x", 0)
    await world.settle()
    assert keys(world) == ["a/", "b/", "c/x"]
    assert (content(world, "a/"), content(world, "b/")) == (b"BYTES of an object", b"")
    await world.vfs.rmdir(1, b"b")
    await world.settle()
    assert keys(world) == ["a/", "c/x"]


async def test_what_others_put_into_a_marker_is_not_written_over(
    world: World, store: Counted, autojump_clock: MockClock
) -> None:
    """Bytes that come after the last look: a new folder, attributes, a first child, the removal."""
    for name in ("chmod", "child", "rmdir"):
        await world.vfs.mkdir(1, name.encode(), 0o755, 0, 0)
    await trio.sleep(2)
    assert keys(world) == ["child/", "chmod/", "rmdir/"]
    await world.vfs.mkdir(1, b"new", 0o755, 0, 0)
    await world.vfs.rmdir(1, b"rmdir")
    for name in ("new", "chmod", "child", "rmdir"):
        store.seed(f"{PREFIX}{name}/", BYTES)
    await world.vfs.setattr((await world.node("chmod")).ino, Change(mode=0o700))
    await world.write("child/x", b"x")
    await world.settle()
    await trio.sleep(60)
    for name in ("new", "chmod", "child", "rmdir"):
        assert content(world, f"{name}/") == BYTES, name
    assert sorted(await world.names()) == ["child", "chmod", "new", "rmdir"]
    for name in ("new", "chmod", "child", "rmdir"):
        assert await world.read(f"{name}/.phfs-file") == BYTES


async def test_a_marker_keeps_what_others_gave_to_it(world: World, store: Counted, autojump_clock: MockClock) -> None:
    store.seed(PREFIX + "d/", b"", {"project": "alpha"}, {"content-type": "a/b"}, "team=red")
    await world.vfs.setattr((await world.node("d")).ino, Change(mode=0o700))
    await world.settle()
    found = store.objects[ObjectKey(PREFIX + "d/")]
    assert (found.metadata["project"], found.metadata["mode"], found.tags) == ("alpha", "040700", "team=red")
    assert found.headers["content-type"] == "a/b"


async def test_bytes_of_a_marker_outlive_a_death_in_a_move(tmp_path: Path, autojump_clock: MockClock) -> None:
    store = Counted()
    world = made(store, tmp_path)
    store.seed(PREFIX + "d/", BYTES)
    await world.names((await world.node("d")).ino)
    await world.vfs.rename(1, b"d", 1, b"e", 0)
    world.journal.close()
    world = made(store, tmp_path)
    world.changes.recover(Recovery(world.journal, world.area, world.inodes, world.defaults.directory).nodes())
    async with running(world):
        await world.settle()
        assert keys(world) == ["e/"]
        assert content(world, "e/") == BYTES

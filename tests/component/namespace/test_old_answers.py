"""Answers that are older than what the tree knows: pages of a walk that began long ago, and late answers.

Whatever they say, they displace no version, removal or attributes that this mount stored or heard of since.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from phfs_fuse.errors import NotFound
from phfs_fuse.pending import tombstones
from phfs_fuse.tree import questions
from phfs_fuse.tree.node import Node
from phfs_fuse.vfs.attributes import Change
from tests.support.fault_store import FaultStore
from tests.support.habits import HabitStore
from tests.support.world import PREFIX, World, made, running

PAGE = 10
NAMES = [f"f{number:03}" for number in range(6 * PAGE)]
OLD, LATE, LAST = NAMES[3], NAMES[4 * PAGE + 3], NAMES[-1]  # in the first page, in one out of the cached walk


@pytest.fixture
def store() -> HabitStore:
    store = HabitStore(PAGE)
    for name in NAMES:
        store.seed(f"{PREFIX}d/{name}", b"old")
    return store


@pytest.fixture
def faults(store: HabitStore) -> FaultStore:
    return FaultStore(store)


@pytest.fixture
async def world(faults: FaultStore, tmp_path: Path) -> AsyncIterator[World]:
    async with running(made(faults, tmp_path)) as world:
        yield world


@pytest.fixture
async def heard(faults: FaultStore, tmp_path: Path) -> AsyncIterator[World]:
    """A world that hears of what others do."""
    async with running(made(faults, tmp_path)) as world, trio.open_nursery() as nursery:
        nursery.start_soon(world.events.run)
        await wait_all_tasks_blocked()
        yield world
        nursery.cancel_scope.cancel()


class Reader:
    """A program in the middle of a listing of `folder`."""

    def __init__(self, world: World, folder: Node) -> None:
        self._world = world
        self._fh = world.vfs.opendir(folder.ino)
        self._offset = 0
        self.nodes: list[Node] = []

    @property
    def names(self) -> list[str]:
        return [node.name.decode() for node in self.nodes]

    async def read(self, pages: int = 1 << 30) -> list[str]:
        """The names of that many pages more."""
        found: list[Node] = []
        while pages and (page := await self._world.vfs.readdir(self._fh, self._offset)):
            found += [node for _, node in page]
            self._offset = page[-1][0]
            pages -= 1
        self.nodes += found
        return [node.name.decode() for node in found]

    async def rest(self) -> list[str]:
        found = await self.read()
        await self._world.vfs.releasedir(self._fh)
        return found


async def replaced(world: World, path: str, data: bytes) -> Node:
    """Written anew by rename, as editors and rsync do."""
    folder, name = path.split("/")
    node = await world.write(f"{folder}/.new", data)
    parent = (await world.node(folder)).ino
    await world.vfs.rename(parent, b".new", parent, name.encode(), 0)
    return node


async def test_a_late_page_displaces_nothing_that_was_stored_here_meanwhile(
    world: World, store: HabitStore, autojump_clock: MockClock
) -> None:
    reader = Reader(world, await world.node("d"))
    await reader.read(3)
    written = await world.write_again(f"d/{LATE}", b"written")
    moved = await replaced(world, f"d/{LAST}", b"moved over it")
    await world.settle()
    assert store.data(f"{PREFIX}d/{LATE}") == b"written"
    await reader.rest()
    assert reader.names == NAMES
    assert await world.node(f"d/{LATE}") is written
    assert await world.node(f"d/{LAST}") is moved
    assert await world.read(f"d/{LATE}") == b"written"
    await world.vfs.unlink((await world.node("d")).ino, LATE.encode())
    await world.settle()
    assert f"{PREFIX}d/{LATE}" not in store.keys


async def test_a_late_page_brings_back_nothing_that_was_removed_here_meanwhile(
    world: World, store: HabitStore, autojump_clock: MockClock
) -> None:
    folder = await world.node("d")
    reader = Reader(world, folder)
    await reader.read(3)
    await world.vfs.unlink(folder.ino, LATE.encode())
    await world.vfs.rename(folder.ino, LAST.encode(), folder.ino, b"a", 0)
    await world.settle()
    assert LATE not in await reader.rest()
    assert LAST not in reader.names
    assert len(set(reader.names)) == len(reader.names)
    for name in (LATE, LAST):
        with pytest.raises(NotFound):
            await world.node(f"d/{name}")
    assert await world.names(folder.ino) == ["a", *(name for name in NAMES if name not in (LATE, LAST))]
    assert await world.read("d/a") == b"old"


async def test_what_ended_long_before_a_page_came_is_remembered_for_it(
    world: World, store: HabitStore, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More is removed than is remembered of removals otherwise."""
    monkeypatch.setattr(tombstones, "DONE_MAX", 2)
    monkeypatch.setattr(tombstones, "DONE_STEP", 1)
    world.changes.gone._done_max = 2
    folder = await world.node("d")
    reader = Reader(world, folder)
    await reader.read(3)
    removed = NAMES[3 * PAGE + 2 :]
    for name in removed:
        await world.vfs.unlink(folder.ino, name.encode())
    await world.settle()
    await reader.rest()
    assert reader.names == NAMES[: -len(removed)]
    assert await world.names(folder.ino) == reader.names
    for name in NAMES[:4]:
        await world.vfs.unlink(folder.ino, name.encode())
        await world.settle()
    assert len(world.changes.gone._done) <= 3


async def test_a_late_page_takes_back_no_attributes(
    world: World, store: HabitStore, autojump_clock: MockClock
) -> None:
    reader = Reader(world, await world.node("d"))
    await reader.read(3)
    node = await world.node(f"d/{LATE}")
    await world.vfs.setattr(node.ino, Change(mode=0o600))
    await world.settle()
    await reader.rest()
    assert (await world.node(f"d/{LATE}")).mode & 0o777 == 0o600


async def test_a_late_page_displaces_nothing_that_was_forgotten_meanwhile(
    world: World, store: HabitStore, autojump_clock: MockClock
) -> None:
    reader = Reader(world, await world.node("d"))
    await reader.read(3)
    node = await world.write_again(f"d/{LATE}", b"written")
    await world.settle()
    world.vfs.forget([(node.ino, node.lookups)])
    await reader.rest()
    assert reader.names == NAMES
    assert await world.read(f"d/{LATE}") == b"written"


async def test_what_was_kept_for_a_late_page_goes_with_the_walk(
    world: World, store: HabitStore, autojump_clock: MockClock
) -> None:
    folder = await world.node("d")
    reader = Reader(world, folder)
    await reader.read(3)
    node = await world.write_again(f"d/{LATE}", b"written")
    await world.settle()
    world.vfs.forget([(node.ino, node.lookups)])
    assert world.inodes.find(node.ino) is node
    await reader.rest()
    assert world.inodes.find(node.ino) is None
    assert not world.inodes.questions._open


async def test_a_late_page_displaces_nothing_that_was_looked_up_meanwhile(
    world: World, store: HabitStore, autojump_clock: MockClock
) -> None:
    """Others did it, and nobody tells; but this mount has asked since."""
    store.seed(f"{PREFIX}d/x/below", b"1")
    reader = Reader(world, await world.node("d"))
    await reader.read(3)
    await trio.sleep(1)
    store.seed(f"{PREFIX}d/{LATE}", b"stored by others")
    store.remove(f"{PREFIX}d/{LAST}")
    store.remove(f"{PREFIX}d/x/below")
    await trio.sleep(10)
    node = await world.node(f"d/{LATE}")
    for name in (LAST, "x"):
        with pytest.raises(NotFound):
            await world.node(f"d/{name}")
    await reader.rest()
    assert reader.names == NAMES[:-1]
    assert await world.node(f"d/{LATE}") is node
    assert await world.read(f"d/{LATE}") == b"stored by others"


async def test_an_older_walk_adds_nothing_to_a_folder_that_a_later_one_saw_whole(
    world: World, store: HabitStore, autojump_clock: MockClock
) -> None:
    folder = await world.node("d")
    reader = Reader(world, folder)
    await reader.read(3)
    await trio.sleep(1)
    store.remove(f"{PREFIX}d/{LATE}")
    left = [name for name in NAMES if name != LATE]
    assert await world.names(folder.ino) == left
    await reader.rest()
    assert reader.names == left
    assert await world.names(folder.ino) == left


async def test_what_was_heard_during_a_walk_counts_for_all_its_pages(
    heard: World, store: HabitStore, autojump_clock: MockClock
) -> None:
    world = heard
    reader = Reader(world, await world.node("d"))
    await reader.read(3)
    store.seed(f"{PREFIX}d/{LATE}", b"stored by others")
    store.remove(f"{PREFIX}d/{LAST}")
    store.seed(f"{PREFIX}d/{OLD}", b"passed already")
    node = await world.node(f"d/{LATE}")
    await reader.rest()
    assert reader.names == NAMES[:-1]
    assert await world.node(f"d/{LATE}") is node
    assert await world.read(f"d/{LATE}") == b"stored by others"
    assert await world.read(f"d/{OLD}") == b"passed already"
    with pytest.raises(NotFound):
        await world.node(f"d/{LAST}")
    assert await world.names((await world.node("d")).ino) == NAMES[:-1]


async def test_what_a_late_page_says_of_a_name_that_was_heard_of_is_not_believed(
    heard: World, store: HabitStore, autojump_clock: MockClock
) -> None:
    """Nobody has asked for the name since."""
    world = heard
    reader = Reader(world, await world.node("d"))
    await reader.read(3)
    store.seed(f"{PREFIX}d/{LATE}", b"stored by others")
    store.remove(f"{PREFIX}d/{NAMES[5 * PAGE]}")
    store.seed(f"{PREFIX}d/{NAMES[5 * PAGE]}", b"again")
    await reader.rest()
    assert reader.names == NAMES
    assert await world.read(f"d/{LATE}") == b"stored by others"
    assert await world.read(f"d/{NAMES[5 * PAGE]}") == b"again"


@pytest.mark.parametrize("more", [[], [NAMES[3 * PAGE + 1]]])
async def test_the_end_of_a_page_is_not_shown_from_before_it_was_removed(
    heard: World, store: HabitStore, autojump_clock: MockClock, more: list[str]
) -> None:
    """It is held back until the next page: a folder of its name may follow."""
    world = heard
    reader = Reader(world, await world.node("d"))
    await reader.read(3)
    removed = [NAMES[3 * PAGE - 1], *more]
    assert removed[0] not in reader.names
    for name in removed:
        store.remove(f"{PREFIX}d/{name}")
    await reader.rest()
    assert reader.names == [name for name in NAMES if name not in removed]


async def test_a_walk_goes_on_where_others_remove_all_the_time(
    heard: World, store: HabitStore, autojump_clock: MockClock
) -> None:
    world = heard
    left = NAMES[::2]

    def remove(number: int) -> None:
        for name in NAMES[1::2][PAGE // 2 * (number - 1) : PAGE // 2 * number + 1]:
            store.remove(f"{PREFIX}d/{name}")

    folder = await world.node("d")
    reader = Reader(world, folder)
    store.between = remove
    before = store.requests["list"]
    await reader.rest()
    assert store.requests["list"] - before <= 2 * len(NAMES) // PAGE
    store.between = None
    assert set(left) <= set(reader.names)
    for name in NAMES[1::2]:
        store.remove(f"{PREFIX}d/{name}")
    assert await world.names(folder.ino) == left


async def test_a_walk_that_waits_for_long_begins_anew_behind_its_last_name(
    heard: World, store: HabitStore, autojump_clock: MockClock
) -> None:
    world = heard
    for name in NAMES:
        store.seed(f"{PREFIX}d/{name}/below", b"1")  # folders beside files: all are shown by other names
    folder = await world.node("d")
    reader = Reader(world, folder)
    await reader.read(3)
    question = next(world.inodes.questions.about(folder))
    await trio.sleep(questions.WALK_SECONDS_MAX + 1)
    store.seed(f"{PREFIX}d/{LATE}", b"nobody listens for it")
    assert not question.heard
    await world.write("d/.x", b"1")
    await reader.rest()
    assert sorted(reader.names) == sorted([*NAMES, *(name + ".phfs-file" for name in NAMES)])
    assert await world.read(f"d/{LATE}.phfs-file") == b"nobody listens for it"


async def test_a_name_that_is_replaced_in_the_middle_of_a_listing_is_listed_once(
    world: World, store: HabitStore, autojump_clock: MockClock
) -> None:
    first = await world.write(f"d/{LATE}x", b"made here")
    reader = Reader(world, await world.node("d"))
    await reader.read(2)
    second = await replaced(world, f"d/{LATE}x", b"replaced")
    await world.settle()
    await reader.rest()
    assert second is not first
    assert reader.names == sorted([*NAMES, f"{LATE}x"])


async def test_pages_of_a_folder_that_was_moved_meanwhile_say_nothing_of_its_new_place(
    world: World, store: HabitStore, autojump_clock: MockClock
) -> None:
    folder = await world.node("d")
    reader = Reader(world, folder)
    await reader.read(3)
    await world.vfs.rename(1, b"d", 1, b"e", 0)
    store.seed(f"{PREFIX}d/zz", b"others, at the old place")
    await reader.rest()
    assert reader.names == NAMES
    await world.settle()
    assert await world.names(folder.ino) == NAMES
    assert {key for key in store.keys if key.startswith(f"{PREFIX}e/")} == {f"{PREFIX}e/{name}" for name in NAMES}
    assert store.data(f"{PREFIX}d/zz") == b"others, at the old place"


@pytest.mark.parametrize("method", ["head", "list"])
async def test_an_answer_for_one_name_whose_folder_was_moved_meanwhile(
    world: World, store: HabitStore, faults: FaultStore, autojump_clock: MockClock, method: str
) -> None:
    folder = await world.node("d")
    gate = faults.hold(method, when=lambda key: "new" in key, after=True)
    store.seed(f"{PREFIX}d/new", b"at the old place") if method == "head" else store.seed(f"{PREFIX}d/new/x")

    async def look() -> None:
        with pytest.raises(NotFound):
            await world.node("d/new")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(look)
        await gate.entered.wait()
        store.remove(f"{PREFIX}d/new")
        store.remove(f"{PREFIX}d/new/x")
        await world.vfs.rename(1, b"d", 1, b"e", 0)
        gate.open.set()
    assert b"new" not in (folder.kids or {})


async def late_answer(
    world: World,
    faults: FaultStore,
    method: str,
    ask: Callable[[], Awaitable[object]],
    meanwhile: Callable[[], Awaitable[object]],
) -> None:
    """Ask, and do something else before the answer comes."""
    gate = faults.hold(method, after=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        with trio.fail_after(60):
            await gate.entered.wait()
        await meanwhile()
        await world.settle()
        gate.open.set()


async def test_a_doubt_is_not_ended_by_an_answer_that_may_not_tell(
    heard: World, store: HabitStore, faults: FaultStore, autojump_clock: MockClock
) -> None:
    """A file in the folder is stored here while its attributes, which others have changed, are asked for."""
    world = heard
    store.seed(f"{PREFIX}d/", b"", {"mode": "040755"})
    folder = await world.node("d")
    fh = world.vfs.open((await world.node(f"d/{OLD}")).ino, os.O_WRONLY)
    store.seed(f"{PREFIX}d/", b"", {"mode": "040700"})

    async def write() -> None:
        await world.vfs.write(fh, 0, b"new")
        world.vfs.release(fh)

    await late_answer(world, faults, "list", lambda: world.vfs.lookup(1, b"d"), write)
    await trio.sleep(20)  # longer than attr-ttl, shorter than what is heard of is believed
    assert (await world.node("d")).mode & 0o777 == 0o700
    assert folder.mode & 0o777 == 0o700

"""When the kernel may keep the pages of a file over an open: never where bytes may have gone past them."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from phfs_fuse.errors import PhfsError
from phfs_fuse.tree.inodes import Inodes
from phfs_fuse.tree.kernel_log import PAGES, SIZE, KernelLog, LoggedState
from phfs_fuse.tree.node import Node, Pages
from phfs_fuse.tree.resume import restore
from phfs_fuse.types import Fh
from tests.support.fake_store import FakeStore
from tests.support.world import PREFIX, World, made, running

DATABASE = os.O_RDWR | os.O_DIRECT


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


@pytest.fixture
async def world(store: FakeStore, tmp_path: Path) -> AsyncIterator[World]:
    async with running(made(store, tmp_path)) as world:
        await world.write("f", b"stored")
        yield world


@pytest.fixture
async def node(world: World) -> Node:
    return await world.node("f")


def opened(world: World, node: Node, flags: int = os.O_RDONLY) -> tuple[Fh, bool]:
    fh = world.vfs.open(node.ino, flags)
    return fh, world.vfs.keeps_pages(fh)


def keeps(world: World, node: Node) -> bool:
    """At an open by a reader."""
    fh, is_kept = opened(world, node)
    world.vfs.release(fh)
    return is_kept


def noted(world: World, tmp_path: Path) -> tuple[LoggedState, Inodes]:
    """As the next worker finds it."""
    inodes = Inodes(PREFIX, world.inodes.root.attrs, now_ns=0)
    known = KernelLog(tmp_path / "kernel.log", inodes).load()
    restore(inodes, known, [])
    return known, inodes


async def test_pages_of_a_file_are_kept(world: World, node: Node) -> None:
    writer, is_kept = opened(world, node, os.O_RDWR)
    await world.vfs.write(writer, 0, b"cached")
    assert is_kept
    assert keeps(world, node)
    world.vfs.release(writer)
    reader, _ = opened(world, node, os.O_RDONLY | os.O_DIRECT)
    assert keeps(world, node)
    world.vfs.release(reader)


async def test_each_open_drops_them_while_a_handle_writes_past_them(world: World, node: Node) -> None:
    database, _ = opened(world, node, DATABASE)
    assert [keeps(world, node) for _ in range(3)] == [False] * 3
    reader, _ = opened(world, node)
    world.vfs.release(database)
    assert not keeps(world, node)
    assert not keeps(world, node)  # the one before may still be under way
    world.vfs.release(reader)
    assert keeps(world, node)


async def test_the_first_open_after_the_last_of_them_drops_them(world: World, node: Node) -> None:
    one, two = opened(world, node, DATABASE)[0], opened(world, node, DATABASE)[0]
    world.vfs.release(one)
    world.vfs.release(two)
    assert [keeps(world, node) for _ in range(3)] == [False, True, True]
    node, made = await world.vfs.create(1, b"new", 0o644, DATABASE, 0, 0)
    assert not world.vfs.keeps_pages(made)
    world.vfs.release(made)
    assert [keeps(world, node) for _ in range(2)] == [False, True]


async def test_so_does_the_next_worker(world: World, node: Node, tmp_path: Path) -> None:
    other = await world.node("f")
    database, _ = opened(world, node, DATABASE)
    known, inodes = noted(world, tmp_path)
    assert known.refs[other.ino].beliefs == PAGES
    again = inodes.get(node.ino)
    assert again.pages is Pages.DOUBTED
    world.vfs.release(database)
    assert noted(world, tmp_path)[1].get(node.ino).pages is Pages.DOUBTED
    reader, _ = opened(world, node)
    assert noted(world, tmp_path)[1].get(node.ino).pages is Pages.DOUBTED  # its answer may not have been given
    world.vfs.release(reader)
    assert noted(world, tmp_path)[1].get(node.ino).pages is Pages.TRUE
    await world.kernel.compact()
    assert noted(world, tmp_path)[1].get(node.ino).pages is Pages.TRUE


@pytest.mark.parametrize("damaged", [False, True])
async def test_after_a_restart_what_is_not_known_is_doubted(world: World, node: Node, damaged: bool) -> None:
    """An older worker did not note who writes past the pages; a damaged journal may have lost bytes."""
    await world.write("g", b"")
    idle = await world.node("g")
    writer, _ = opened(world, node, os.O_RDWR)
    world.vfs.resume({}, {}, damaged=damaged)
    assert not keeps(world, node)
    assert keeps(world, idle) is not damaged
    world.vfs.release(writer)


async def test_a_refused_write_leaves_no_pages(world: World, node: Node, tmp_path: Path) -> None:
    """The kernel has answered it and has its bytes."""
    world.quotas.limit({PREFIX: 10}, {PREFIX: 6})
    writer, _ = opened(world, node, os.O_RDWR)
    with pytest.raises(PhfsError):
        await world.vfs.write(writer, 0, b"more than ten bytes")
    assert not keeps(world, node)
    assert noted(world, tmp_path)[0].refs[node.ino].beliefs == PAGES | SIZE
    again = noted(world, tmp_path)[1].get(node.ino)
    assert again.misjudged
    world.vfs.release(writer)


async def test_a_change_that_is_given_up_leaves_no_pages(
    world: World, node: Node, store: FakeStore, autojump_clock: MockClock
) -> None:
    """Some bytes of a version were changed that others have replaced: the rest of them cannot be had."""
    await world.settle()
    world.blocks.adopted.clear()
    writer, _ = opened(world, node, os.O_RDWR)
    await world.vfs.write(writer, 2, b"x")
    assert keeps(world, node)
    store.seed(f"{PREFIX}f", b"theirs")
    world.settling._queue.draining = True
    await world.settle()
    assert not keeps(world, node)
    world.vfs.release(writer)
    assert await world.read("f") == b"theirs"


async def test_a_version_of_others_is_a_file_of_its_own(
    world: World, node: Node, store: FakeStore, autojump_clock: MockClock
) -> None:
    await world.settle()
    reader, _ = opened(world, node)
    store.seed(f"{PREFIX}f", b"theirs")
    await trio.sleep(10)
    theirs = await world.node("f")
    assert theirs.ino != node.ino
    assert keeps(world, theirs)
    world.vfs.release(reader)


@pytest.mark.parametrize("is_open", [False, True])
async def test_a_file_that_the_kernel_misjudges_gets_another_number(
    world: World, node: Node, is_open: bool, autojump_clock: MockClock
) -> None:
    """Once nothing of it is open or on its way: the kernel takes neither size nor times of an inode that it knows."""
    world.quotas.limit({PREFIX: 10}, {PREFIX: 6})
    writer, _ = opened(world, node, os.O_RDWR)
    with pytest.raises(PhfsError):
        await world.vfs.write(writer, 0, b"more than ten bytes")
    await world.vfs.write(writer, 0, b"fits")
    world.vfs.release(writer)
    assert (await world.vfs.lookup(1, b"f")).ino == node.ino  # its upload is to come
    reader = opened(world, node)[0] if is_open else None
    await world.settle()
    looked_up = await world.node("f")
    assert (looked_up.ino == node.ino) is is_open
    if reader is not None:
        world.vfs.release(reader)
        looked_up = await world.node("f")
    assert looked_up.ino != node.ino
    assert (looked_up.size, looked_up.misjudged, looked_up.pages) == (6, False, Pages.TRUE)
    assert await world.read("f") == b"fitsed"
    assert [name for name in await world.names() if name == "f"] == ["f"]
    world.vfs.forget([(node.ino, node.lookups)])
    assert world.inodes.find(node.ino) is None


async def test_what_the_kernel_has_forgotten_it_believes_no_more(world: World, node: Node) -> None:
    world.quotas.limit({PREFIX: 10}, {PREFIX: 6})
    writer, _ = opened(world, node, os.O_RDWR)
    with pytest.raises(PhfsError):
        await world.vfs.write(writer, 0, b"more than ten bytes")
    world.vfs.release(writer)
    world.vfs.forget([(node.ino, node.lookups)])
    again = await world.node("f")
    assert (again.misjudged, again.pages) == (False, Pages.TRUE)

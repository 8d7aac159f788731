"""Readers of directories that seek: a place stays valid while names come and go, and costs the store nothing."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from phfs_fuse.errors import PhfsError
from phfs_fuse.tree.inodes import Inodes
from phfs_fuse.tree.kernel_log import KernelLog
from phfs_fuse.tree.node import Node
from phfs_fuse.types import Fh
from tests.support.fake_store import FakeStore
from tests.support.fault_store import FaultStore
from tests.support.world import PREFIX, World, made, running

COUNT = 2500  # names: three pages


@pytest.fixture
def store() -> FakeStore:
    store = FakeStore()
    for number in range(COUNT):
        store.seed(f"{PREFIX}big/f{number:04}{'/x' * (number % 50 == 7)}")
    return store


@pytest.fixture
def faults(store: FakeStore) -> FaultStore:
    return FaultStore(store)


@pytest.fixture
async def world(faults: FaultStore, tmp_path: Path) -> AsyncIterator[World]:
    async with running(made(faults, tmp_path)) as world:
        yield world


@pytest.fixture
async def folder(world: World) -> Node:
    return await world.node("big")


async def read(world: World, fh: Fh, offset: int = 0, *, names_max: int = 1 << 60) -> list[tuple[int, str]]:
    """As the kernel does for a program with a small buffer: each reply is told, and a part of it is used."""
    found: list[tuple[int, str]] = []
    while len(found) < names_max and (page := (await world.vfs.readdir(fh, offset))[:150]):
        world.vfs.told_page(fh, page)
        found += [(cookie, node.name.decode()) for cookie, node in page[:100]]
        offset = found[-1][0]
    return found[:names_max]


async def test_after_names_were_removed_a_reader_goes_on_where_it_was(world: World, folder: Node) -> None:
    fh = world.vfs.opendir(folder.ino)
    found = await read(world, fh, names_max=500)
    for _, name in found[:50]:
        if name not in ("f0007",):
            await world.vfs.unlink(folder.ino, name.encode())
    rest = await read(world, fh, found[99][0])
    assert [name for _, name in rest] == [f"f{number:04}" for number in range(100, COUNT)]


async def test_seeks_in_any_order_show_the_same_and_ask_for_nothing(
    world: World, store: FakeStore, folder: Node, autojump_clock: MockClock
) -> None:
    fh = world.vfs.opendir(folder.ino)
    found = await read(world, fh)
    assert [name for _, name in found] == [f"f{number:04}" for number in range(COUNT)]
    await trio.sleep(60)  # nothing of it would be believed without asking
    before = store.requests.copy()
    order = list(range(COUNT - 1, 0, -50)) + random.Random(1).sample(range(COUNT), 100)
    for index in order:
        assert await read(world, fh, found[index][0], names_max=250) == found[index + 1 : index + 251]
    assert store.requests == before
    assert await read(world, fh) == found  # from the start on it is listed anew
    assert store.requests["list"] > before["list"]


async def test_readers_of_one_directory_have_places_in_common(
    world: World, folder: Node, autojump_clock: MockClock
) -> None:
    one, two = world.vfs.opendir(folder.ino), world.vfs.opendir(folder.ino)
    found = await read(world, one, names_max=1500)
    await world.vfs.unlink(folder.ino, b"f0100")
    await trio.sleep(60)
    assert await read(world, two, found[1000][0], names_max=400) == found[1001:1401]
    everything = await read(world, two)
    assert await read(world, one, found[-1][0]) == everything[1499:]
    await world.vfs.releasedir(one)
    assert await read(world, two, found[50][0], names_max=10) == found[51:61]
    await world.vfs.releasedir(two)


async def test_forgotten_names_are_asked_for_from_there_on(
    world: World, store: FakeStore, folder: Node, autojump_clock: MockClock
) -> None:
    fh = world.vfs.opendir(folder.ino)
    found = await read(world, fh)
    await world.vfs.unlink(folder.ino, b"f0003")
    for number in range(1000, 1200):
        node = (folder.kids or {})[b"f%04d" % number]
        world.vfs.forget([(node.ino, node.lookups)])
    await trio.sleep(60)
    before = store.requests["list"]
    assert await read(world, fh, found[900][0], names_max=300) == found[901:1201]
    assert 1 <= store.requests["list"] - before <= 1 + 6  # each folder of the page is looked into
    assert [name for _, name in await read(world, fh, found[0][0], names_max=5)] == [
        "f0001",
        "f0002",
        "f0004",
        "f0005",
        "f0006",
    ]


async def test_a_listing_that_fails_goes_on_when_it_is_asked_again(
    world: World, store: FakeStore, folder: Node
) -> None:
    fh = world.vfs.opendir(folder.ino)
    found = await read(world, fh, names_max=999)  # a page, but for its last name: its folder may come next
    store.denied = True
    with pytest.raises(PhfsError):
        await world.vfs.readdir(fh, found[-1][0])
    store.denied = False
    rest = await read(world, fh, found[-1][0])
    assert [name for _, name in found + rest] == [f"f{number:04}" for number in range(COUNT)]


async def test_a_file_that_is_replaced_and_stored_while_it_is_listed_shows_once(world: World, folder: Node) -> None:
    await world.write("big/f2100", b"first")
    fh = world.vfs.opendir(folder.ino)
    found = await read(world, fh, names_max=900)
    await world.write("big/new", b"second")
    await world.vfs.rename(folder.ino, b"new", folder.ino, b"f2100", 0)
    await world.settle()
    names = [name for _, name in found + await read(world, fh, found[-1][0])]
    assert sorted(set(names)) == names


async def test_names_that_come_are_shown_by_a_new_reading_and_move_no_place(world: World, folder: Node) -> None:
    fh = world.vfs.opendir(folder.ino)
    found = await read(world, fh)
    for name in ("a", "f0099-between", "z"):
        await world.write(f"big/{name}", b"")
    everything = await read(world, fh)
    assert [name for _, name in everything if name in ("a", "f0099-between", "z")] == ["a", "f0099-between", "z"]
    assert set(found) < set(everything)


async def test_an_empty_directory_shows_what_came(world: World) -> None:
    empty = await world.vfs.mkdir(1, b"empty", 0o755, 0, 0)
    fh = world.vfs.opendir(empty.ino)
    assert await read(world, fh) == []
    await world.write("empty/new", b"")
    assert [name for _, name in await read(world, fh)] == ["new"]


@pytest.mark.parametrize("compacted", [False, True])
async def test_what_a_reader_was_told_is_in_the_log(
    world: World, folder: Node, tmp_path: Path, compacted: bool
) -> None:
    fh, other = world.vfs.opendir(folder.ino), world.vfs.opendir(1)
    found = await read(world, fh, names_max=1500)
    await read(world, other)
    await world.vfs.releasedir(other)
    if compacted:
        await world.kernel.compact()
    again = KernelLog(tmp_path / "kernel.log", Inodes(PREFIX, folder.attrs, now_ns=0))
    positions = again.load().positions
    places = again.places(folder)
    for cookie, name in random.Random(2).sample(found, 100):
        assert places.at(cookie).rstrip(b"/") == name.encode()
    assert list(positions) == [fh]
    assert again.places(world.inodes.root).behind(b"") is None
    await world.vfs.releasedir(fh)
    assert world.kernel._places == {}

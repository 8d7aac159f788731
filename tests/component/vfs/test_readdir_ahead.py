"""A walk over a tree: folders that come next are listed ahead, each once; what nobody was told of is let go of."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from phfs_fuse.errors import NotFound
from phfs_fuse.tree.node import Node
from tests.support.fake_store import FakeStore
from tests.support.world import PREFIX, World, made, running


@pytest.fixture
def store() -> FakeStore:
    store = FakeStore()
    for folder in range(8):
        for file in range(3):
            store.seed(f"{PREFIX}d{folder}/f{file}")
    return store


@pytest.fixture
async def world(store: FakeStore, tmp_path: Path) -> AsyncIterator[World]:
    async with running(made(store, tmp_path)) as world, trio.open_nursery() as nursery:
        await nursery.start(world.vfs.list_ahead)
        yield world
        nursery.cancel_scope.cancel()


async def folders(world: World) -> list[Node]:
    await world.names()
    return [await world.node(f"d{number}") for number in range(8)]


async def test_folders_are_listed_ahead_of_a_walk_and_once_each(
    world: World, store: FakeStore, autojump_clock: MockClock
) -> None:
    known = await folders(world)
    before = store.requests["list"]
    for node in known[:2]:
        await world.names(node.ino)
    await trio.sleep(1)
    assert store.requests["list"] - before == 2 + 4  # the two that were looked at, and what follows
    for node in known:
        assert await world.names(node.ino) == ["f0", "f1", "f2"]
    assert store.requests["list"] - before == 8


async def test_a_single_folder_is_no_walk(world: World, store: FakeStore, autojump_clock: MockClock) -> None:
    known = await folders(world)
    before = store.requests["list"]
    for number in (5, 2, 7):
        await world.names(known[number].ino)
    await trio.sleep(1)
    assert store.requests["list"] - before == 3


async def test_a_listing_ahead_that_fails_is_made_again_by_who_wants_it(
    world: World, store: FakeStore, autojump_clock: MockClock
) -> None:
    known = await folders(world)
    await world.names(known[0].ino)
    await world.names(known[1].ino)
    store.denied = True
    await trio.sleep(1)
    store.denied = False
    await trio.sleep(10)  # also what had come by then is too old
    assert await world.names(known[2].ino) == ["f0", "f1", "f2"]


async def test_what_a_listing_brought_goes_with_its_folder(
    world: World, store: FakeStore, autojump_clock: MockClock
) -> None:
    folder = await world.node("d3")
    count = len(world.inodes)
    assert await world.names(folder.ino) == ["f0", "f1", "f2"]
    assert len(world.inodes) == count + 3
    world.vfs.forget([(folder.ino, 1)])
    assert world.inodes.find(folder.ino) is None
    assert len(world.inodes) == count - 1
    assert await world.read("d3/f1") == b""  # and comes again when it is asked for


async def test_many_names_of_a_folder_asked_for_at_once_cost_one_listing(
    world: World, store: FakeStore, autojump_clock: MockClock
) -> None:
    for number in range(50):
        store.seed(f"{PREFIX}many/f{number}", b"x")
    folder = await world.node("many")
    before = store.requests["list"]
    async with trio.open_nursery() as nursery:
        for number in range(50):
            nursery.start_soon(world.vfs.lookup, folder.ino, b"f%d" % number)
    assert store.requests["list"] - before == 2 + 1  # the first names are asked for one by one
    assert store.requests["head"] <= 2 + 2


BIG = 2500  # names: more than a page


@pytest.fixture
async def big(store: FakeStore, world: World) -> Node:
    """A folder of which all names were known, a while ago."""
    for number in range(BIG):
        store.seed(f"{PREFIX}big/f{number:04}")
    folder = await world.node("big")
    assert len(await world.names(folder.ino)) == BIG
    await trio.sleep(10)
    return folder


async def test_names_of_a_big_folder_that_are_asked_for_in_order_come_by_the_thousand(
    world: World, store: FakeStore, big: Node, autojump_clock: MockClock
) -> None:
    before = store.requests.copy()
    for number in range(BIG):
        await world.vfs.unlink(big.ino, f"f{number:04}".encode())
    asked = store.requests - before
    assert asked["head"] + asked["list"] <= 30
    assert await world.names(big.ino) == []


async def test_names_that_are_asked_for_anyhow_are_asked_for_singly(
    world: World, store: FakeStore, big: Node, autojump_clock: MockClock
) -> None:
    for number in range(3):  # it is found to be too big for one page, whose names are known then
        await world.vfs.lookup(big.ino, f"f{number:04}".encode())
    pages = store.requests["list"]
    heads = store.requests["head"]
    for number in range(1100, 1800, 100):
        await world.vfs.lookup(big.ino, f"f{number + 700:04}".encode())
        await world.vfs.lookup(big.ino, f"f{number:04}".encode())
    assert store.requests["head"] - heads == 14  # and a listing of one key each, whether it is a folder
    assert store.requests["list"] - pages == 14


async def test_a_page_of_a_walk_shows_what_others_did(
    world: World, store: FakeStore, big: Node, autojump_clock: MockClock
) -> None:
    known = {name: await world.node(f"big/{name}") for name in ("f0000", "f0001", "f0002")}
    await trio.sleep(10)
    store.seed(f"{PREFIX}big/f0010", b"new")
    store.remove(f"{PREFIX}big/f0011")
    store.seed(f"{PREFIX}big/f0012/below", b"now a folder as well")
    store.seed(f"{PREFIX}big/f0014.rclonelink", b"f0001")
    for number in range(10):
        await world.vfs.lookup(big.ino, f"f{number:04}".encode())
    assert await world.node("big/f0001") is known["f0001"]
    assert (await world.node("big/f0010")).size == 3
    with pytest.raises(NotFound):
        await world.node("big/f0011")
    assert (await world.node("big/f0012")).is_dir
    assert (await world.node("big/f0012.phfs-file")).is_file
    assert (await world.node("big/f0014")).is_file


async def test_what_is_being_deleted_does_not_show_as_a_folder(
    world: World, store: FakeStore, autojump_clock: MockClock
) -> None:
    """MinIO has removed a part of the object when it reads the folder."""
    folder = await world.node("d3")
    await world.names(folder.ino)
    await trio.sleep(10)
    await world.vfs.unlink(folder.ino, b"f0")  # by this mount
    store.remove(f"{PREFIX}d3/f1")  # by somebody else
    store.half_deleted = {f"{PREFIX}d3/f0", f"{PREFIX}d3/f1"}
    assert await world.names(folder.ino) == ["f2"]
    store.half_deleted = set()
    await world.vfs.unlink(folder.ino, b"f2")
    await world.vfs.rmdir(1, b"d3")
    await world.settle()
    assert not [key for key in store.keys if "d3" in key]


async def test_new_names_in_a_big_folder_are_not_taken_for_a_walk(
    world: World, store: FakeStore, big: Node, autojump_clock: MockClock
) -> None:
    before = store.requests.copy()
    for number in range(400):
        await world.write(f"big/e{number:04}", b"")
        await trio.sleep(10)
    asked = store.requests - before
    assert asked["list"] <= 2 * 400 + 16  # for each name: whether it is a folder, and that of the folder itself


async def test_forgotten_names_of_a_big_folder_come_by_the_thousand_too(
    world: World, store: FakeStore, autojump_clock: MockClock
) -> None:
    for number in range(BIG):
        store.seed(f"{PREFIX}big/f{number:04}")
    folder = await world.node("big")
    before = store.requests.copy()
    for number in range(BIG):
        await world.vfs.lookup(folder.ino, f"f{number:04}".encode())
    asked = store.requests - before
    assert asked["head"] + asked["list"] <= 30

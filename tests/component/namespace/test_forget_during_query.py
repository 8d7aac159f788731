"""The kernel gives inodes back while the store is being asked: no file may be missing because of that."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from phfs_fuse.tree.node import Node
from tests.support.fake_store import FakeStore
from tests.support.fault_store import FaultStore
from tests.support.world import PREFIX, World, made, running


@pytest.fixture
def faults() -> FaultStore:
    return FaultStore(FakeStore())


@pytest.fixture
async def world(faults: FaultStore, tmp_path: Path) -> AsyncIterator[World]:
    async with running(made(faults, tmp_path)) as world:
        yield world


def seed(world: World, *names: str) -> None:
    inner = world.store.inner  # type: ignore[attr-defined]
    for name in names:
        inner.seed(PREFIX + name, b"stored")


def forget(world: World, node: Node) -> None:
    world.vfs.forget([(node.ino, node.lookups)])


async def test_a_name_forgotten_while_its_directory_is_listed(
    world: World, faults: FaultStore, autojump_clock: MockClock
) -> None:
    seed(world, *(f"f{i:04}" for i in range(1100)))  # two pages
    node = await world.node("f0001")
    gate = faults.hold("list", nth=2)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.names)
        await gate.entered.wait()
        forget(world, node)
        gate.open.set()
    assert await world.read("f0001") == b"stored"


async def test_a_listed_name_is_forgotten_before_it_is_shown(world: World, autojump_clock: MockClock) -> None:
    seed(world, "a", "b", "c")
    fh = world.vfs.opendir(1)
    page = await world.vfs.readdir(fh, 0)
    assert [node.name for _, node in page] == [b"a", b"b", b"c"]
    forget(world, await world.node("b"))
    assert [node.name for _, node in await world.vfs.readdir(fh, page[0][0])] == [b"b", b"c"]
    await world.vfs.releasedir(fh)


async def test_a_new_version_is_stored_and_forgotten_while_its_name_is_asked_for(
    world: World, faults: FaultStore, autojump_clock: MockClock
) -> None:
    answer = faults.hold("head", when=lambda key: key.endswith("/f"), after=True)
    lookups: list[Node] = []

    async def look_up() -> None:
        lookups.append(await world.node("f"))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(look_up)
        await answer.entered.wait()  # the store has said that there is none
        node = await world.write("f", b"written meanwhile")
        await world.settle()
        assert node.dirty is None
        forget(world, node)
        answer.open.set()
    assert lookups[0].size == len(b"written meanwhile")
    assert await world.read("f") == b"written meanwhile"


async def test_a_new_version_is_stored_and_forgotten_while_its_directory_is_listed(
    world: World, faults: FaultStore, autojump_clock: MockClock
) -> None:
    seed(world, "f")
    page = faults.hold("list", when=lambda key: key == PREFIX, after=True)
    names: list[str] = []

    async def list_all() -> None:
        names.extend(await world.names())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(list_all)
        await page.entered.wait()  # the page has the old version of f, and no g
        f = await world.write_again("f", b"written meanwhile")
        g = await world.write("g", b"new")
        await world.settle()
        forget(world, f)
        forget(world, g)
        page.open.set()
    assert names[0] == "f"
    assert await world.read("f") == b"written meanwhile"
    assert await world.read("g") == b"new"


async def test_a_file_that_is_not_known_moves_with_a_folder_whose_marker_is_not_wanted_any_more(
    world: World, autojump_clock: MockClock
) -> None:
    seed(world, "d/sub/unknown", "d/sub/known")
    sub = await world.node("d/sub")
    known = await world.node("d/sub/known")
    await world.vfs.unlink(sub.ino, b"known")  # as far as known the folder is empty: its marker is to be stored
    assert sub.dirty is not None
    forget(world, known)
    forget(world, sub)
    await world.vfs.rename(1, b"d", 1, b"e", 0)  # finds the other file, and no use for the marker
    assert await world.read("e/sub/unknown") == b"stored"
    await world.settle()
    assert world.store.inner.keys == [PREFIX + "e/sub/unknown"]  # type: ignore[attr-defined]

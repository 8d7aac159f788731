"""A mount of a whole bucket does not list the records of the CSI plugin, and changes none."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from phfs_fuse.errors import ReadOnly
from phfs_fuse.vfs.attributes import Change
from tests.support.fake_store import FakeStore
from tests.support.world import World, made, running

RECORD = ".phfs/volumes/pvc-1.json"
KEYS = [".phfs2", RECORD, "groups/.phfs/a"]


@pytest.fixture
def store() -> FakeStore:
    store = FakeStore()
    for key in KEYS:
        store.seed(key, b"{}")
    return store


@pytest.fixture
async def world(store: FakeStore, tmp_path: Path) -> AsyncIterator[World]:
    async with running(made(store, tmp_path, prefix="")) as world:
        yield world
        await world.settle()
        assert sorted(store.keys) == sorted(KEYS)


async def test_they_are_not_listed(world: World) -> None:
    assert await world.names() == [".phfs2", "groups"]
    assert await world.read(RECORD) == b"{}"
    assert await world.names() == [".phfs2", "groups"]
    assert await world.read("groups/.phfs/a") == b"{}"


@pytest.mark.parametrize("parent", ["", ".phfs", ".phfs/volumes"])
async def test_nothing_is_made_there(world: World, parent: str) -> None:
    ino = (await world.node(parent)).ino if parent else 1
    name = b"new" if parent else b".phfs"
    vfs = world.vfs
    with pytest.raises(ReadOnly):
        await vfs.create(ino, name, 0o644, os.O_RDWR, 0, 0)
    with pytest.raises(ReadOnly):
        await vfs.mkdir(ino, name, 0o755, 0, 0)
    with pytest.raises(ReadOnly):
        await vfs.symlink(ino, name, b"groups", 0, 0)
    with pytest.raises(ReadOnly):
        await vfs.rename(1, b"groups", ino, name, 0)


async def test_no_record_is_changed(world: World) -> None:
    node, folder = await world.node(RECORD), await world.node(".phfs/volumes")
    vfs = world.vfs
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC):
        with pytest.raises(ReadOnly):
            vfs.open(node.ino, flags)
    for one in (node, folder):
        with pytest.raises(ReadOnly):
            await vfs.setattr(one.ino, Change(mode=0o777))
        with pytest.raises(ReadOnly):
            await vfs.setxattr(one.ino, b"user.x", b"y")
    with pytest.raises(ReadOnly):
        await vfs.unlink(folder.ino, b"pvc-1.json")
    with pytest.raises(ReadOnly):
        await vfs.rmdir(1, b".phfs")
    with pytest.raises(ReadOnly):
        await vfs.rename(folder.ino, b"pvc-1.json", 1, b"got", 0)
    with pytest.raises(ReadOnly):
        await vfs.rename(1, b".phfs", 1, b"got", 0)
    with pytest.raises(ReadOnly):
        await vfs.rename(1, b".phfs2", folder.ino, b"pvc-1.json", 0)


async def test_a_folder_of_that_name_elsewhere_is_its_users(store: FakeStore, tmp_path: Path) -> None:
    async with running(made(store, tmp_path, prefix="groups/")) as world:
        assert await world.names() == [".phfs"]
        await world.write(".phfs/b", b"new")
        await world.settle()
    assert "groups/.phfs/b" in store.keys

"""Changes that the store would refuse: refused at the call, before anything has changed."""

from __future__ import annotations

import os
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from trio.testing import MockClock

from phfs_fuse.errors import Exists, IllegalName, NameTooLong, NoSpace, PhfsError, TooLarge
from phfs_fuse.store.base import Limits
from phfs_fuse.types import ObjectKey
from phfs_fuse.vfs.attributes import Change
from tests.support.fake_store import FakeStore
from tests.support.world import PREFIX, World, content, keys, made, running

GBK = "数据分析报告".encode("gbk") * 5
LIMIT = 1 << 20


@pytest.fixture
def store() -> FakeStore:
    """As MinIO."""
    store = FakeStore()
    store.segment_bytes_max, store.marker_extra_bytes = 255, 9
    store.limits = Limits(object_bytes_max=LIMIT)
    return store


@pytest.fixture
async def world(store: FakeStore, tmp_path: Path, autojump_clock: MockClock) -> AsyncIterator[World]:
    async with running(made(store, tmp_path)) as world:
        yield world


def create(world: World, name: bytes) -> Awaitable[object]:
    return world.vfs.create(1, name, 0o644, os.O_RDWR, 0, 0)


def mknod(world: World, name: bytes) -> Awaitable[object]:
    return world.vfs.mknod(1, name, stat.S_IFIFO | 0o644, 0, 0, 0)


def symlink(world: World, name: bytes) -> Awaitable[object]:
    return world.vfs.symlink(1, name, b"target", 0, 0)


def mkdir(world: World, name: bytes) -> Awaitable[object]:
    return world.vfs.mkdir(1, name, 0o755, 0, 0)


async def rename(world: World, name: bytes) -> None:
    await world.write("old", b"1")
    await world.vfs.rename(1, b"old", 1, name, 0)


async def rename_folder(world: World, name: bytes) -> None:
    await world.vfs.mkdir(1, b"old", 0o755, 0, 0)
    await world.write("old/x", b"1")
    await world.vfs.rename(1, b"old", 1, name, 0)


FILES = (create, mknod, symlink, rename)
FOLDERS = (mkdir, rename_folder)
Make = Callable[[World, bytes], Awaitable[object]]


@pytest.mark.parametrize("make", FILES)
async def test_a_name_that_the_store_refuses_is_refused_when_it_is_made(make: Make, world: World) -> None:
    for name in (GBK, b"\xff" * 52, "‛A0".encode() * 40):  # noqa: RUF001
        with pytest.raises(NameTooLong):
            await make(world, name)
        await world.vfs.unlink(1, b"old") if make is rename else None
    await make(world, b"\xff" * 51)
    await make(world, b"n" * 255)
    await world.settle()
    assert all(len(key.encode()) <= 255 for key in keys(world))


@pytest.mark.parametrize("make", FOLDERS)
async def test_a_folder_whose_marker_the_store_refuses_is_refused(make: Make, world: World) -> None:
    for name in (GBK, b"n" * 247):
        with pytest.raises(NameTooLong):
            await make(world, name)
        if make is rename_folder:
            await world.vfs.unlink((await world.node("old")).ino, b"x")
            await world.vfs.rmdir(1, b"old")
    await make(world, b"n" * 246)
    await world.settle()
    assert {key.split("/")[0] for key in keys(world)} == {"n" * 246}


async def test_a_name_that_is_taken_is_first_of_all_taken(world: World) -> None:
    world.store.seed(PREFIX + "n" * 250 + "/x", b"1")
    with pytest.raises(Exists):
        await world.vfs.mkdir(1, b"n" * 250, 0o755, 0, 0)


async def test_a_folder_is_not_moved_where_a_key_would_be_too_long(world: World) -> None:
    at, path = 1, ""
    for _ in range(4):
        at = (await world.vfs.mkdir(at, b"d" * 200, 0o755, 0, 0)).ino
        path += "d" * 200 + "/"
    await world.write(path + "f" * 180, b"1")
    with pytest.raises(NameTooLong):
        await world.vfs.rename(1, b"d" * 200, 1, b"e" * 246, 0)
    await world.vfs.rename(1, b"d" * 200, 1, b"e" * 230, 0)
    await world.settle()
    assert max(len((PREFIX + key).encode()) for key in keys(world)) <= 1024


@pytest.mark.parametrize("name", [b"x__XLDIR__", b"__XLDIR__"])
async def test_a_name_that_minio_takes_for_a_folder_is_refused(name: bytes, world: World) -> None:
    for make in (*FILES, *FOLDERS):
        with pytest.raises(IllegalName):
            await make(world, name)
        await world.vfs.unlink(1, b"old") if make is rename else None


# ---- attributes ----


async def fill(world: World, path: str, *, value: bytes = b"") -> int:
    """Set short attributes until there is no room; returns how many there are."""
    ino = (await world.node(path)).ino
    count = 0
    with pytest.raises(NoSpace):  # noqa: PT012
        while True:
            await world.vfs.setxattr(ino, b"user.%d" % (100 + count), value)
            count += 1
    return count


@pytest.mark.parametrize("folder", [False, True])
async def test_attributes_are_taken_as_long_as_the_object_has_room(folder: bool, world: World) -> None:
    await (mkdir(world, b"x") if folder else world.write("x", b"1"))
    count = await fill(world, "x", value=b"v")
    assert count > 20
    await world.settle()
    assert [name for name in await world.names() if name == "x"]
    stored = world.store.objects[ObjectKey(PREFIX + "x" + "/" * folder)].metadata
    assert sum(name.startswith("xattr-") for name in stored) == count


async def test_each_change_of_attributes_needs_room(world: World) -> None:
    node = await world.write("x", b"1")
    await fill(world, "x")
    await world.vfs.setxattr(node.ino, b"user.100", b"")  # no more than before
    last = None
    for length in range(1, 100):  # to the last byte
        try:
            await world.vfs.setxattr(node.ino, b"user.100", b"v" * length)
        except NoSpace:
            break
        last = length
    before = node.attrs
    for change in (Change(uid=1000000), Change(gid=1000000), Change(mtime_ns=-(10**9) * 10**10)):
        with pytest.raises(NoSpace):
            await world.vfs.setattr(node.ino, change)
    assert node.attrs == before
    await world.vfs.setattr(node.ino, Change(mode=0o600))  # takes no more room
    world.vfs.removexattr(node.ino, b"user.101")
    await world.vfs.setattr(node.ino, Change(uid=1000000))
    await world.settle()
    assert last is None or last < 100
    assert world.store.objects[ObjectKey(PREFIX + "x")].metadata["uid"] == "1000000"


@pytest.mark.parametrize(
    "metadata", [{"--symlink-target": "t" * 1990}, {"xattr-757365722e61": "v" * 1990}, {"colour": "v" * 1990}]
)
async def test_an_object_of_others_that_has_no_room_for_our_attributes(
    metadata: dict[str, str], world: World
) -> None:
    world.store.seed(PREFIX + "x", b"1", metadata)
    node = await world.node("x")
    with pytest.raises(NoSpace):
        await world.vfs.setattr(node.ino, Change(uid=1))
    if not node.is_symlink:
        with pytest.raises(NoSpace):
            world.vfs.open(node.ino, os.O_WRONLY)
        with pytest.raises(NoSpace):
            await world.vfs.setattr(node.ino, Change(size=2))
        world.vfs.release(world.vfs.open(node.ino, os.O_RDONLY))
    assert node.dirty is None
    if "colour" in metadata:  # which does not stay with bytes that are written anew
        world.vfs.release(world.vfs.open(node.ino, os.O_RDWR | os.O_TRUNC))
        await world.vfs.setattr(node.ino, Change(uid=1))
        await world.settle()
        assert "colour" not in world.store.objects[ObjectKey(PREFIX + "x")].metadata


async def test_a_folder_of_others_that_can_have_no_marker(world: World) -> None:
    name = "n" * 250
    world.store.seed(PREFIX + name + "/x", b"1")
    node = await world.node(name)
    for change in (Change(mode=0o700), Change(uid=1), Change(mtime_ns=1)):
        with pytest.raises(NoSpace):
            await world.vfs.setattr(node.ino, change)
    with pytest.raises(NoSpace):
        await world.vfs.setxattr(node.ino, b"user.a", b"")
    await world.write(f"{name}/y", b"2")
    for child in (b"x", b"y"):
        await world.vfs.unlink(node.ino, child)
    await world.settle()
    assert keys(world) == []
    assert await world.settling.drain()
    await world.vfs.rmdir(1, name.encode())
    assert await world.names() == []


# ---- sizes ----


async def test_a_size_that_no_object_can_have_is_refused_at_once_where_the_program_is_told(world: World) -> None:
    node = await world.write("x", b"1")
    with pytest.raises(TooLarge):
        await world.vfs.setattr(node.ino, Change(size=LIMIT + 1))
    direct = world.vfs.open(node.ino, os.O_RDWR | os.O_DIRECT)
    with pytest.raises(TooLarge):
        await world.vfs.write(direct, LIMIT, b"x")
    await world.vfs.flush(direct)
    world.vfs.release(direct)
    assert node.size == 1
    await world.vfs.setattr(node.ino, Change(size=LIMIT))
    assert node.size == LIMIT


@pytest.mark.parametrize("tell", ["flush", "fsync"])
async def test_a_write_that_the_kernel_has_answered_is_refused_at_close_or_fsync(tell: str, world: World) -> None:
    node = await world.write("x", b"1")
    await world.settle()
    reader, writer = world.vfs.open(node.ino, os.O_RDONLY), world.vfs.open(node.ino, os.O_RDWR)
    assert await world.vfs.write(writer, LIMIT, b"xyz") == 3
    with pytest.raises(TooLarge):
        await getattr(world.vfs, tell)(writer)
    await world.vfs.flush(writer)  # told once
    assert world.vfs.misjudged(reader) is None
    assert world.vfs.misjudged(writer) is node  # the kernel has to look again
    assert world.vfs.release(reader) is None
    assert world.vfs.release(writer) is node
    assert (node.size, content(world, "x")) == (1, b"1")


# ---- names that are made by the mount ----


@pytest.mark.parametrize("name", ["n" * 255, "名" * 85, os.fsdecode(b"\xff" * 51)])
async def test_the_name_of_a_conflict_is_shortened(name: str, world: World) -> None:
    raw = os.fsencode(name)
    node, fh = await world.vfs.create(1, raw, 0o644, os.O_RDWR, 0, 0)
    await world.vfs.write(fh, 0, b"ours")
    world.store.seed(str(world.inodes.key(node)), b"theirs")
    world.vfs.release(fh)
    await world.settle()
    names = [each for each in keys(world) if ".conflict-" in each]
    assert len(names) == 1
    assert len(names[0].encode()) <= 255
    assert content(world, names[0]) == b"ours"
    assert names[0][0] == keys(world)[0][0]  # the beginning of the name is kept


async def test_a_refused_name_of_an_earlier_version_can_be_removed(world: World) -> None:
    """Taken before this version looked at what the store takes."""
    store = world.store
    store.segment_bytes_max = 1024
    await create(world, GBK)
    store.segment_bytes_max = 255
    await world.vfs.unlink(1, GBK)
    assert await world.settling.drain()


async def test_a_name_is_refused_as_one_is_while_the_store_is_away(world: World) -> None:
    await world.names()
    world.store.is_away = True
    await create(world, b"n" * 200)
    with pytest.raises(PhfsError):
        await create(world, GBK)

"""What a known file costs, of which there may be a million, and that it is given back."""

from __future__ import annotations

import gc
import platform
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from phfs_fuse.attrs import Attrs, to_metadata
from phfs_fuse.tree.inodes import Inodes
from phfs_fuse.tree.node import Base, Node
from phfs_fuse.types import ETag, ObjectKey
from phfs_fuse.worker import memory
from phfs_fuse.worker.memory import FORGOTTEN_MIN, Memory
from tests.support.fake_store import FakeStore
from tests.support.world import PREFIX, World, made

FILE = Attrs(mode=0o100640, uid=1000, gid=1000, mtime_ns=time.time_ns())
FOLDER = replace(FILE, mode=0o040755)
NODE_BYTES_MAX = 520  # with its name, its numbers and its places in the two dicts
MD5 = ETag("0f" * 16)


async def list_for_kernel(world: World, node: Node) -> list[Node]:
    """As `ls -l`: the kernel has a reference to all that it was shown."""
    found = []
    fh = world.vfs.opendir(node.ino)
    offset = 0
    while page := await world.vfs.readdir(fh, offset):
        world.vfs.told_page(fh, page)
        offset = page[-1][0]
        found += [node for _, node in page]
    await world.vfs.releasedir(fh)
    return found


async def test_a_listed_file_is_small(tmp_path: Path) -> None:
    store = FakeStore()
    for folder in range(4):
        for number in range(1000):
            own = replace(FILE, mtime_ns=FILE.mtime_ns + number)
            store.seed(f"{PREFIX}{folder}/file-{number}.bin", b"%d" % number * 300, to_metadata(own))
    world = made(store, tmp_path)
    first, *folders = await list_for_kernel(world, world.inodes.root)
    await list_for_kernel(world, first)  # makes what is made once
    tracemalloc.start()
    try:
        for folder in folders:
            await list_for_kernel(world, folder)
        gc.collect()  # the pages of the listings
        used, _peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    count = sum(len(folder.kids or ()) for folder in folders)
    assert count == 3000
    assert used / count <= NODE_BYTES_MAX


async def test_a_walk_keeps_nothing_that_was_forgotten(tmp_path: Path) -> None:
    """Each folder has room for the names it had."""
    store = FakeStore()
    for number in range(20):
        store.seed(f"{PREFIX}walked-{number:02}/file", b"")
    world = made(store, tmp_path)
    async with trio.open_nursery() as nursery:
        await nursery.start(world.vfs.list_ahead)
        folders = await list_for_kernel(world, world.inodes.root)
        files = [file for folder in folders for file in await list_for_kernel(world, folder)]
        assert len(files) == 20
        world.vfs.forget([(node.ino, node.lookups) for node in files + folders])
        del files, folders
        nursery.cancel_scope.cancel()
    assert len(world.inodes) == 1
    alive = [found for found in gc.get_objects() if isinstance(found, Node) and found.name.startswith(b"walked-")]
    assert alive == []


def tree(files: int = 0) -> tuple[Inodes, list[Node]]:
    inodes = Inodes(PREFIX, FOLDER, now_ns=0)
    nodes = [inodes.new(FILE, ctime_ns=0) for _ in range(files)]
    for number, node in enumerate(nodes):
        inodes.attach(inodes.root, b"%d" % number, node)
        node.lookups = 1
    return inodes, nodes


@pytest.mark.parametrize("etag", [MD5, MD5.upper(), MD5 + "-3", "0" * 32, MD5 + "\n", "odd", ""])
@pytest.mark.parametrize("name", ["0", "other", "\udcff"])
def test_a_version_is_kept_as_it_was(name: str, etag: str) -> None:
    """However it is packed, and also when the file gets another name meanwhile."""
    inodes, [node] = tree(1)
    base = Base(ObjectKey(f"{PREFIX}sub/{name}"), ETag(etag), 5)
    node.base = base
    assert node.base == base
    inodes.move(node, inodes.root, b"renamed")
    assert node.base == base
    node.base = None
    assert node.base is None


def test_what_few_files_have_takes_room_only_while_they_have_it() -> None:
    _, [node, other] = tree(2)
    node.writers += 1
    node.misjudged = True
    node.xattrs = {b"user.a": b"1"}
    assert (node.writers, node.misjudged, node.xattrs) == (1, True, {b"user.a": b"1"})
    assert (other.writers, other.misjudged, other.xattrs) == (0, False, None)
    node.writers -= 1
    node.misjudged = False
    node.xattrs = None
    assert (node.writers, node.misjudged, node.xattrs, node._few) == (0, False, None, None)


async def test_memory_is_given_back_once_after_many_were_forgotten() -> None:
    inodes, nodes = tree(2 * FORGOTTEN_MIN)
    given: list[int] = []
    keeper = Memory(inodes, lambda: given.append(len(inodes)))
    await keeper.look()
    for node in nodes[: FORGOTTEN_MIN + 5]:
        inodes.forget(node.ino, 1)
    await keeper.look()
    assert given == []  # more may follow
    for node in nodes[FORGOTTEN_MIN + 5 : FORGOTTEN_MIN + 10]:
        inodes.forget(node.ino, 1)
    await keeper.look()
    assert given == []
    for _ in range(3):
        await keeper.look()
    assert given == [len(inodes)]
    assert inodes.get(nodes[-1].ino) is nodes[-1]


async def test_little_is_not_worth_it() -> None:
    inodes, nodes = tree(100)
    given: list[int] = []
    keeper = Memory(inodes, lambda: given.append(len(inodes)))
    for node in nodes:
        await keeper.look()
        inodes.forget(node.ino, 1)
    for _ in range(3):
        await keeper.look()
    assert given == []


def test_the_numbers_shrink_with_what_is_known() -> None:
    """A dict keeps its table, however many entries it loses."""
    inodes, nodes = tree(FORGOTTEN_MIN * 2)
    for node in nodes:
        inodes.forget(node.ino, 1)
    del node
    nodes.clear()
    tracemalloc.start()
    try:
        inodes.shrink()
        used, _peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert used < 1000


def test_the_c_library_is_asked() -> None:
    assert memory.trim() or platform.libc_ver()[0] != "glibc"

"""The disk of the local state has no byte left, not even the reserve, which others took: what is refused has no
effect, what is answered is in the journal.

The disk is filled just after the mount has looked whether it has room, since that look cannot see what follows.
"""

from __future__ import annotations

import errno
import math
import os
import shutil
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import trio
from trio.testing import MockClock

from phfs_fuse.config.model import ExclusiveCreate, StoreConfig
from phfs_fuse.errors import LocalStateError
from phfs_fuse.pending.recovery import Recovery
from phfs_fuse.state import log_space
from phfs_fuse.state.journal import Journal
from phfs_fuse.tree.node import Node
from phfs_fuse.types import KIB, MIB, ObjectKey
from phfs_fuse.vfs.vfs import Change
from phfs_fuse.worker.wiring import EPOCH_INODES, Mount
from tests.support.disks import BALLAST, fill, free, small_disk
from tests.support.fake_store import FakeStore
from tests.support.world import PREFIX, World, made, running

COUNT = 300  # more changes than the log has room for ahead
SECONDS = 600  # of the tests' clock


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount a file system that is small")
    with small_disk(tmp_path / "disk", 48 * MIB):
        yield tmp_path / "disk"


def take_all(world: World, disk: Path) -> None:
    """Others take the last byte, unseen."""
    world.journal.reserve.give_up()
    fill(disk)
    world.journal.reserve.is_held = True
    world.journal.reserve._plenty_until = math.inf


def give_back(world: World, disk: Path) -> None:
    world.journal.reserve._plenty_until = 0.0
    free(disk)


async def tree(world: World, ino: int = 1, path: str = "") -> dict[str, tuple[object, ...]]:
    found: dict[str, tuple[object, ...]] = {}
    for name in await world.names(ino):
        node = await world.vfs.lookup(ino, name.encode())
        if node.is_dir:
            node.lookups += 1
            found[f"{path}{name}/"] = (oct(node.mode), node.uid, node.xattrs)
            found |= await tree(world, node.ino, f"{path}{name}/")
        else:
            found[f"{path}{name}"] = (oct(node.mode), node.uid, node.xattrs, node.size, node.mtime_ns)
    return found


async def tree_after_death(world: World, directory: Path, to: Path) -> dict[str, tuple[object, ...]]:
    """What the next process makes of the local state as it is now."""
    shutil.copytree(directory, to, ignore=shutil.ignore_patterns("*-shm", BALLAST, "reserve"))
    after = made(world.store, to)
    after.inodes._next = EPOCH_INODES  # as another process has them
    recovery = Recovery(after.journal, after.area, after.inodes, after.defaults.directory)
    after.changes.recover(recovery.nodes())
    assert recovery.saved == []
    found = await tree(after)
    after.journal.close()
    shutil.rmtree(to)
    return found


async def _node(world: World, name: str) -> Node:
    return await world.vfs.lookup(1, name.encode())


async def _release(world: World, number: int) -> None:
    node, fh = await world.vfs.create(1, b"n%d" % number, 0o644, os.O_WRONLY, 0, 0)
    await world.vfs.unlink(1, node.name)
    world.vfs.release(fh)


async def _chmod(world: World, number: int, kind: str = "f") -> None:
    await world.vfs.setattr((await _node(world, f"{kind}{number}")).ino, Change(mode=0o600))


async def _truncate(world: World, number: int, size: int = 0) -> None:
    await world.vfs.setattr((await _node(world, f"f{number}")).ino, Change(size=size, mode=0o600))


async def _open_truncated(world: World, number: int) -> None:
    world.vfs.release(world.vfs.open((await _node(world, f"f{number}")).ino, os.O_WRONLY | os.O_TRUNC))


async def _setxattr(world: World, number: int) -> None:
    await world.vfs.setxattr((await _node(world, f"f{number}")).ino, b"user.a", b"b")


async def _replace(world: World, number: int) -> None:
    await world.vfs.unlink(1, b"f%d" % number)
    await world.vfs.create(1, b"f%d" % number, 0o644, os.O_RDWR, 0, 0)


async def _enlarge_displaced(world: World, number: int) -> None:
    """An open file that others have replaced."""
    node = await _node(world, f"f{number}")
    node.lookups += 1
    world.vfs.open(node.ino, os.O_RDWR)
    world.store.seed(f"{PREFIX}f{number}", b"theirs")
    world.inodes.displace(node)
    world.inodes.incomplete(world.inodes.root)
    await _node(world, f"f{number}")
    await world.vfs.setattr(node.ino, Change(size=9, mode=0o600))


async def _no_replace(world: World, number: int) -> None:
    await world.vfs.rename(1, b"f%d" % number, 1, b"m%d" % number, 1)


CALLS: dict[str, Callable[[World, int], Awaitable[object]]] = {
    "create": lambda world, number: world.vfs.create(1, b"n%d" % number, 0o644, os.O_RDWR, 0, 0),
    "mknod": lambda world, number: world.vfs.mknod(1, b"n%d" % number, 0o100644, 0, 0, 0),
    "mkdir": lambda world, number: world.vfs.mkdir(1, b"n%d" % number, 0o700, 0, 0),
    "mkdir in": lambda world, number: world.vfs.mkdir(2, b"n%d" % number, 0o755, 0, 0),
    "symlink": lambda world, number: world.vfs.symlink(1, b"n%d" % number, b"target", 0, 0),
    "unlink": lambda world, number: world.vfs.unlink(1, b"f%d" % number),
    "rmdir": lambda world, number: world.vfs.rmdir(1, b"d%d" % number),
    "rename": lambda world, number: world.vfs.rename(1, b"f%d" % number, 1, b"m%d" % number, 0),
    "rename over": lambda world, number: world.vfs.rename(1, b"f%d" % (2 * number), 1, b"f%d" % (2 * number + 1), 0),
    "rename folder": lambda world, number: world.vfs.rename(1, b"p%d" % number, 1, b"m%d" % number, 0),
    "rename new": _no_replace,
    "chmod": _chmod,
    "chmod folder": lambda world, number: _chmod(world, number, "d"),
    "truncate": _truncate,
    "replace": _replace,
    "enlarge displaced": _enlarge_displaced,
    "enlarge": lambda world, number: _truncate(world, number, 9),
    "open truncated": _open_truncated,
    "setxattr": _setxattr,
    "close unlinked": _release,
}
NEED_BYTES = ("symlink", "truncate", "open truncated")  # in the staging area: refused at once


@pytest.mark.parametrize("call", CALLS)
async def test_a_change_is_in_the_journal_or_is_not_there(
    disk: Path, tmp_path: Path, autojump_clock: MockClock, call: str
) -> None:
    store = FakeStore()
    for number in range(COUNT):
        store.seed(f"{PREFIX}f{number}", b"bytes")
        store.seed(f"{PREFIX}d{number}/", b"")
    for number in range(COUNT if call == "rename folder" else 0):
        for kid in range(10):
            store.seed(f"{PREFIX}p{number}/{kid}", b"bytes")
    world = made(store, disk)
    with trio.fail_after(SECONDS):
        await refused_without_effect(world, disk, tmp_path, call)


async def refused_without_effect(world: World, disk: Path, tmp_path: Path, call: str) -> None:
    await world.vfs.mkdir(1, b"first", 0o700, 0, 0)
    take_all(world, disk)
    done = 0
    while (code := await answer(CALLS[call](world, done))) == 0:
        done += 1
    assert code == errno.ENOSPC
    assert done > 3 or call in NEED_BYTES
    now = await tree(world)
    assert await tree_after_death(world, disk, tmp_path / "copy") == now
    assert await answer(CALLS[call](world, done)) == errno.ENOSPC
    assert await tree(world) == now
    give_back(world, disk)
    await CALLS[call](world, done + 1)
    assert await tree_after_death(world, disk, tmp_path / "copy") == await tree(world)
    world.journal.close()


async def answer(call: Awaitable[object]) -> int:
    try:
        await call
    except OSError as exc:
        return exc.errno or 0
    return 0


CLAIMS: dict[str, Callable[[World, int], Awaitable[object]]] = {
    "create": lambda world, number: world.vfs.create(1, b"n%d" % number, 0o644, os.O_RDWR | os.O_EXCL, 0, 0),
    "mkdir": CALLS["mkdir"],
    "rename new": CALLS["rename new"],
}


@pytest.mark.parametrize("call", CLAIMS)
async def test_what_the_store_was_given_for_it_goes_again(
    disk: Path, tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """With `--exclusive-create store`."""
    store = FakeStore()
    for number in range(COUNT):
        store.seed(f"{PREFIX}f{number}", b"bytes")
    monkeypatch.setitem(CALLS, call, CLAIMS[call])
    world = made(store, disk, exclusive_create=ExclusiveCreate.STORE)
    with trio.fail_after(SECONDS):
        await refused_without_effect(world, disk, tmp_path, call)


async def _come_and_gone(world: World, number: int) -> None:
    await world.vfs.mkdir(1, b"n%d" % number, 0o755, 0, 0)
    await world.vfs.rmdir(1, b"n%d" % number)


async def _closed_last(world: World, number: int) -> None:
    await world.write(f"n{number}", b"bytes")
    await world.vfs.unlink(1, b"n%d" % number)


WORK: dict[str, Callable[[World, int], Awaitable[object]]] = {
    "write": lambda world, number: world.write(f"n{number}", b"bytes"),
    "write and unlink": _closed_last,
    "mkdir": CALLS["mkdir"],
    "mkdir and rmdir": _come_and_gone,
    "unlink": CALLS["unlink"],
    "rename": CALLS["rename"],
    "chmod": _chmod,
}


@pytest.mark.parametrize("work", WORK)
async def test_what_the_store_lacks_waits_for_room(
    disk: Path, tmp_path: Path, autojump_clock: MockClock, work: str
) -> None:
    store = FakeStore()
    for number in range(COUNT):
        store.seed(f"{PREFIX}f{number}", b"bytes")
    async with running(made(store, disk)) as world:
        with trio.fail_after(SECONDS):
            for number in range(COUNT):
                await WORK[work](world, number)
            now = await tree(world)
            take_all(world, disk)
            await trio.sleep(60)
            assert await tree_after_death(world, disk, tmp_path / "copy") == now
            give_back(world, disk)
            await world.settle()
            assert await tree(world) == now
            await trio.sleep(1)
        assert await tree(made(store, tmp_path / "new")) == now
        assert world.journal.present() == world.journal.gone() == world.journal.attempts() == []


async def test_a_folder_that_is_moved_takes_no_more_than_was_asked_for(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FakeStore()
    folder = "p/" + f"{'d' * 250}/" * 3
    for number in range(1500):
        store.seed(f"{PREFIX}{folder}{number:0200}", b"bytes", {"mode": "0100600", "xattrs": "x" * 1500})
    world = made(store, tmp_path / "state")
    asked: list[int] = []
    batch = world.journal.batch

    def noted(log_bytes: int = 0) -> AbstractContextManager[None]:
        asked.append(log_bytes)
        return batch(log_bytes)

    monkeypatch.setattr(world.journal, "batch", noted)
    before = world.journal.log_bytes
    await world.vfs.rename(1, b"p", 1, b"q", 0)
    assert MIB < world.journal.log_bytes - before < max(asked)
    log = os.stat(f"{world.journal.path}-wal")
    assert MIB < log.st_blocks * 512 - log.st_size < 2 * MIB  # the rest was given back
    world.journal.close()


@pytest.mark.parametrize("size", [MIB, 24 * MIB])  # of the bigger one the log needs a longer index too
def test_a_transaction_that_has_begun_ends(disk: Path, size: int) -> None:
    journal = Journal(disk, "volume")
    with journal.batch(size):
        journal.reserve.give_up()
        fill(disk)
        for number in range(count := size // (5 * KIB)):
            journal.put_upload(f"{number}" + "x" * 3000, ObjectKey("key"))
    assert len(journal.uploads()) == count
    journal.close()


def test_a_file_system_that_gives_no_blocks_ahead_is_used_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(fd: int, mode: int, offset: int, length: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(log_space, "fallocate", refuse)
    journal = Journal(tmp_path, "volume")
    with journal.batch(64 * MIB):
        journal.put_upload("id", ObjectKey("key"))
    assert journal.uploads() == [("id", "key")]
    journal.close()


async def test_a_trial_of_the_store_that_cannot_be_noted_is_told_in_one_line(tmp_path: Path) -> None:
    class Full(FakeStore):
        async def check_bucket(self, *, create: bool = False) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    config = SimpleNamespace(store=StoreConfig(bucket="b"), writeback=SimpleNamespace(directory=tmp_path))
    mount = cast(Mount, SimpleNamespace(config=config, store=Full()))
    with pytest.raises(LocalStateError) as told:
        await Mount.check(mount)
    assert str(told.value) == f"state directory {tmp_path}: No space left on device"

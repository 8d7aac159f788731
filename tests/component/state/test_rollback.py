"""A change that fails at any row of the journal, or right before its commit, leaves tree and journal as they were."""

from __future__ import annotations

import errno
import os
import sqlite3
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from phfs_fuse.state.database import Database
from phfs_fuse.state.journal import Journal
from phfs_fuse.state.schema import ENDED, TABLES
from phfs_fuse.state.staging import Layer
from phfs_fuse.tree.node import Node
from phfs_fuse.types import Act, ObjectKey
from phfs_fuse.vfs.vfs import Change
from tests.support.fake_store import FakeStore
from tests.support.world import PREFIX, World, content, made, running

ACT = Act(7, "op", 1, b"x")
WRITES = ("BEGIN", "INSERT", "UPDATE", "DELETE", "COMMIT")
FAILURES = [OverflowError, OSError]


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """Files that are stored (`s...`), changed since (`d...`) and new, in the root and in a folder."""
    store = FakeStore()
    await store.put(ObjectKey(PREFIX + "foreign/f"), b"theirs", {}, expect=None)
    async with running(made(store, tmp_path)) as world:
        for name in (b"dir", b"empty", b"empty2"):
            (await world.vfs.mkdir(1, name, 0o755, 0, 0)).lookups += 1
        for name in ("s", "s2", "sopen", "d", "dopen", "dir/s", "dir/d"):
            await world.write(name, b"stored")
        await world.settle()
        await world.names((await world.node("foreign")).ino)
        world.quotas.limit({PREFIX: 1 << 30, f"{PREFIX}dir/": 1 << 20})
        for name in ("d", "dopen", "dir/d"):
            await world.write_again(name, b"newer")
        await world.write("new", b"new")
        await world.write("dir/new", b"new")
        yield world


def shown(world: World) -> dict[int, object]:
    """The tree, and how far the bytes of each file are."""

    def node_of(node: Node) -> object:
        dirty, staged = node.dirty, node.staged
        return (
            node.name,
            node.parent.ino if node.parent else 0,
            node.detached,
            world.inodes.key(node),
            sorted(node.kids or ()),
            node.attrs,
            (node.atime_ns, node.ctime_ns, node.size, node.base),
            (node.marker, node.own_attrs, node.subdirs, node.unseen),
            (dirty.state, dirty.over, dirty.attrs, dirty.changes, dirty.stored, dirty.target) if dirty else None,
            [(layer.id, layer.size, layer.seen) for layer in staged.layers] if staged else None,
            staged.frozen if staged else None,
            world.inodes.is_displaced(node),
        )

    return {node.ino: node_of(node) for node in world.inodes.all()}


def state(world: World) -> dict[str, object]:
    db = world.journal._db
    changes = world.changes
    but = {"layer": f" WHERE ino!={ENDED}"}  # whose files are gone
    return {
        "tree": shown(world),
        "journal": {
            table: sorted(map(repr, db.execute(f"SELECT * FROM {table}{but.get(table, '')}")))
            for table in (*TABLES, "act")
        },
        "dirty": sorted(node.ino for node in changes.files.waiting()),
        "gone": sorted((gone.key, gone.etag, gone.request) for gone in changes.gone.all()),
        "below": {key for key, count in changes.gone._below.items() if count},
        "users": sorted((node.ino, key) for node, key in changes.users._key_of.items()),
        "attempts": {key: list(sent) for key, sent in changes.attempts._sent.items()},
        "quotas": world.quotas.used(),
        "staging": sorted(path.name for path in world.area.path(1).parent.iterdir()),
        "held": world.area.held_bytes,
    }


@contextmanager
def failing(nth: int, failure: type[Exception]) -> Iterator[list[str]]:
    """The `nth` statement that writes fails; yields those that did not."""
    done: list[str] = []
    inner = Database._execute

    def execute(self: Database, sql: str, values: Sequence[object]) -> sqlite3.Cursor:
        if sql.startswith(WRITES):
            if len(done) + 1 == nth:
                done.append("failed")
                raise failure(errno.EIO, "made to fail")
            done.append(sql)
        return inner(self, sql, values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Database, "_execute", execute)
        yield done


async def setattr_of(world: World, path: str, change: Change) -> None:
    await world.vfs.setattr((await world.node(path)).ino, change)


def opened(world: World, path: str) -> Callable[[], Awaitable[None]]:
    """Have a file open meanwhile."""

    async def call() -> None:
        world.vfs.open((await world.node(path)).ino, os.O_RDWR)

    return call


async def write(world: World, path: str) -> None:
    fh = world.vfs.open((node := await world.node(path)).ino, os.O_WRONLY)
    try:
        await world.vfs.write(fh, 2, b"bytes")
    finally:
        node.misjudged = False  # else the kernel is given another number for what it believes wrongly
        world.vfs.release(fh)


async def truncating_open(world: World, path: str) -> None:
    world.vfs.release(world.vfs.open((await world.node(path)).ino, os.O_WRONLY | os.O_TRUNC))


async def create(world: World, name: bytes = b"made") -> None:
    _node, fh = await world.vfs.create(1, name, 0o644, os.O_RDWR, 0, 0, act=ACT)
    world.vfs.release(fh)


Operation = Callable[[World], Awaitable[object]]
ODD = stat.S_IFIFO | 0o600
LONG_AGO = Change(mtime_ns=1, atime_ns=2, mode=0o600, uid=7, gid=8)
OPERATIONS: dict[str, Operation] = {
    "create": create,
    "mkdir": lambda w: w.vfs.mkdir(1, b"made", 0o700, 1, 2, act=ACT),
    "mkdir where one is removed": lambda w: w.vfs.mkdir(1, b"removed", 0o700, 1, 2, act=ACT),
    "mknod": lambda w: w.vfs.mknod(1, b"made", ODD, 0, 1, 2, act=ACT),
    "symlink": lambda w: w.vfs.symlink(1, b"made", b"target", 1, 2, act=ACT),
    **{
        f"unlink {name}": lambda w, name=name: w.vfs.unlink(1, name.encode(), act=ACT)
        for name in ("s", "sopen", "d", "dopen", "new")
    },
    "rmdir": lambda w: w.vfs.rmdir(1, b"empty", act=ACT),
    **{
        f"rename {source} to {target}": lambda w, source=source, target=target: w.vfs.rename(
            1, source.encode(), 1, target.encode(), 0, act=ACT
        )
        for source in ("s", "d", "new", "sopen", "dopen")
        for target in ("made", "s2", "dopen" if source != "dopen" else "sopen", "removed")
    },
    "rename a folder": lambda w: w.vfs.rename(1, b"dir", 1, b"made", 0, act=ACT),
    "rename a folder over one": lambda w: w.vfs.rename(1, b"dir", 1, b"empty", 0, act=ACT),
    "rename a foreign folder": lambda w: w.vfs.rename(1, b"foreign", 1, b"empty2", 0, act=ACT),
    **{
        f"setattr {name}": lambda w, name=name: setattr_of(w, name, LONG_AGO)
        for name in ("s", "d", "new", "sopen", "dir", "empty", "foreign", "foreign/f")
    },
    **{
        f"truncate {name} to {size}": lambda w, name=name, size=size: setattr_of(
            w, name, Change(size=size, mtime_ns=5)
        )
        for name in ("s", "d", "new", "sopen", "foreign/f")
        for size in (0, 3, 100)
    },
    **{f"write {name}": lambda w, name=name: write(w, name) for name in ("s", "d", "sopen", "foreign/f")},
    **{f"open {name} anew": lambda w, name=name: truncating_open(w, name) for name in ("s", "d", "sopen")},
}


async def prepared(world: World) -> None:
    for name in ("sopen", "dopen"):
        await opened(world, name)()
    await world.vfs.mkdir(1, b"removed", 0o700, 0, 0)
    await world.vfs.rmdir(1, b"removed")


async def fails_anywhere(
    world: World, operation: Operation, failure: type[Exception], *, before: dict[str, object] | None = None
) -> int:
    """Let each row of `operation` fail once, then none; returns how many there are."""
    before = before or state(world)
    for nth in range(1, 1000):
        with failing(nth, failure) as done:
            try:
                await operation(world)
            except Exception:
                if "failed" not in done:
                    raise
        if "failed" not in done:
            return len(done)
        found = state(world)
        for part in before:
            assert found[part] == before[part], (nth, done[-1], part)
    raise AssertionError("no end")


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("name", OPERATIONS)
async def test_a_change_of_a_program(
    world: World, autojump_clock: MockClock, name: str, failure: type[Exception]
) -> None:
    await prepared(world)
    rows = await fails_anywhere(world, OPERATIONS[name], failure)
    assert rows or name.startswith(("truncate", "write", "open"))  # bytes of what is staged already
    world.settling.end_drain()
    with trio.fail_after(600):
        assert await world.settling.drain()


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("nth", [*range(1, 16), 20, 25, 30, 40, 50])
async def test_what_follows_from_answers_of_the_store(
    world: World, autojump_clock: MockClock, nth: int, failure: type[Exception]
) -> None:
    """Uploads, deletions, copies, markers and a lost race that cannot be noted are done once more."""
    await prepared(world)
    await world.vfs.rename(1, b"dir", 1, b"moved", 0)
    await world.vfs.rename(1, b"s", 1, b"s3", 0)
    await setattr_of(world, "s2", LONG_AGO)
    await setattr_of(world, "empty2", LONG_AGO)
    for name in (b"sopen", b"dopen"):
        await world.vfs.unlink(1, name)
    await world.vfs.rmdir(1, b"empty")
    await world.store.put(ObjectKey(PREFIX + "new"), b"theirs", {}, expect=None)
    with failing(nth, failure) as done:
        await trio.sleep(300)
    assert "failed" in done
    await world.settle()
    assert world.settling.pending().files == world.settling.pending().deletes == 0
    found = {key.removeprefix(PREFIX): bytes(stored.data) for key, stored in world.store.objects.items()}
    (ours,) = (name for name in found if name.startswith("new.conflict-"))
    assert found.pop(ours) == b"new"
    assert found == {
        "d": b"newerd",
        "empty2/": b"",
        "foreign/f": b"theirs",
        "moved/d": b"newerd",
        "moved/new": b"new",
        "moved/s": b"stored",
        "new": b"theirs",
        "s2": b"stored",
        "s3": b"stored",
    }
    assert all(node.detached for node in world.inodes.all() if node.dirty is not None)


@pytest.mark.parametrize("step", ["write", "truncate"])
async def test_bytes_that_the_disk_refuses(
    world: World, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """The file is as it was, and nothing waits for bytes that never came."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Layer, step, refuse)
    for name in ("s", "d"):
        with pytest.raises(OSError, match="No space"):
            await (write(world, name) if step == "write" else truncating_open(world, name))
    monkeypatch.undo()
    with trio.fail_after(600):
        assert await world.settling.drain()
    assert content(world, "s") == b"stored"
    assert content(world, "d") == b"newerd"


async def test_a_part_that_fails_is_not_left_out(tmp_path: Path, autojump_clock: MockClock) -> None:
    """Whoever catches what a part of a transaction raises does not get the rest alone into the journal."""
    journal = Journal(tmp_path, "volume")
    done: list[str] = []

    def inner() -> None:
        with journal.batch():
            journal.set_note("b", "2")
            raise LookupError

    def outer() -> None:
        with journal.batch():
            journal.set_note("a", "1")
            journal.transaction.undo(lambda: done.append("undone"))
            journal.after(lambda: done.append("after"))
            with suppress(LookupError):
                inner()

    with pytest.raises(OSError, match="a part of the transaction has failed"):
        outer()
    assert journal.note("a") is journal.note("b") is None
    assert done == ["undone"]
    journal.set_note("a", "3")
    assert journal.note("a") == "3"


async def test_a_journal_that_is_damaged_meanwhile_is_told(tmp_path: Path) -> None:
    """So that the worker ends, and the next one carries over what can be read."""
    journal = Journal(tmp_path, "volume")
    for number in range(500):
        journal.put_upload(f"{number}" * 50, ObjectKey("k" * 200))
    journal.checkpoint()
    told: list[str] = []
    journal.on_damage = told.append
    size = journal.path.stat().st_size
    with journal.path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * (size - 4096))
    journal._db.execute("PRAGMA cache_size=0")
    with suppress(OSError):
        for number in range(500):
            journal.put_upload(f"other {number}", ObjectKey("k"))
    assert told

"""Bytes that could be stored nowhere: what is kept in `saved/`, up to its limit, and how they come back."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from phfs_fuse.errors import AccessDenied, NoSpace, PhfsError
from phfs_fuse.host.saved_files import Entry
from phfs_fuse.pending.recovery import Recovery
from phfs_fuse.types import KIB
from tests.support.fake_store import FakeStore
from tests.support.fault_store import FaultStore
from tests.support.world import PREFIX, World, made, running

FOREVER = 10**6
BYTES = b"x" * 64 * KIB
LIMIT = 100 * KIB  # room for one of them


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with running(made(FakeStore(), tmp_path, saved_bytes_max=LIMIT)) as world:
        yield world


async def lose_base(world: World, name: str) -> None:
    """A change of a few bytes of a version that another client replaces before it is uploaded."""
    world.store.seed(PREFIX + name, b"0" * 512 * KIB)
    node = await world.node(name)
    fh = world.vfs.open(node.ino, os.O_WRONLY)
    await world.vfs.write(fh, 4 * KIB, BYTES)
    world.store.seed(PREFIX + name, b"theirs")
    world.vfs.release(fh)
    await trio.sleep(5)


def entries(world: World) -> list[Entry]:
    return world.area.saved.entries()


async def test_what_is_kept_says_what_it_was(world: World, autojump_clock: MockClock) -> None:
    await lose_base(world, "f")
    (kept,) = entries(world)
    assert (kept.note["path"], kept.note["key"]) == ("f", PREFIX + "f")
    assert kept.note["ranges"] == [[4 * KIB, 4 * KIB + len(BYTES)]]
    assert kept.note["version"]["size"] == 512 * KIB
    assert kept.note["reason"]
    assert kept.is_whole is False
    assert not kept.is_waiting
    assert world.area.saved.usage == (1, kept.bytes)
    assert kept.data.read_bytes()[4 * KIB : 4 * KIB + len(BYTES)] == BYTES
    assert await world.read("f") == b"theirs"


async def test_what_finds_no_room_waits_and_the_next_change_is_refused_at_the_call(
    world: World, autojump_clock: MockClock
) -> None:
    await lose_base(world, "a")
    await lose_base(world, "b")
    assert len(entries(world)) == 1
    assert [refusal.path for refusal in world.settling.refused()] == [b"b"]
    assert not await world.settling.drain()  # ends
    world.settling.end_drain()
    world.store.seed(PREFIX + "c", b"0" * 512 * KIB)
    node = await world.node("c")
    fh = world.vfs.open(node.ino, os.O_WRONLY)
    with pytest.raises(NoSpace, match="phfs saved") as caught:
        await world.vfs.write(fh, 0, BYTES)
    assert caught.value.errno == errno.ENOSPC
    world.vfs.release(fh)
    await world.write("whole", BYTES)  # goes to no such place
    await world.write_again("whole", BYTES[:9])
    world.area.saved.drop(entries(world))
    await world.write_again("c", b"now")
    await trio.sleep(300)
    assert [kept.note["path"] for kept in entries(world)] == ["b"]
    assert world.settling.refused() == []


@pytest.mark.parametrize("cut", ["", "at the note", "between both files"])
async def test_what_is_refused_waits_there_while_nothing_is_mounted(
    tmp_path: Path, autojump_clock: MockClock, cut: str
) -> None:
    inner = FakeStore()
    store = FaultStore(inner)
    store.fail("put", AccessDenied("put", "f", "AccessDenied"), count=FOREVER)
    async with running(made(store, tmp_path)) as world:
        inner.seed(PREFIX + "part", b"0" * 512 * KIB)
        await world.write("whole", b"bytes")
        await world.write_again("part", BYTES)
        with pytest.raises(PhfsError):
            await world.settle()
    kept = world.aside.keep_refused()
    assert [path.suffix for path in kept] == [".data"] * 2
    assert sorted(one.note["path"] for one in entries(world)) == ["part", "whole"]
    assert all(one.is_waiting and "AccessDenied" in one.note["reason"] for one in entries(world))
    assert not list((tmp_path / "staging").iterdir())
    if cut:
        for one in entries(world):
            layer_id, _ = one.note["layer"]
            for suffix in (".data",) if cut == "between both files" else (".data", ".ext"):
                if one.data.with_suffix(suffix).exists():
                    one.data.with_suffix(suffix).rename(tmp_path / "staging" / f"{layer_id}{suffix}")
    world.journal.close()
    world.area.close()
    again = made(inner, tmp_path)
    recovery = Recovery(again.journal, again.area, again.inodes, again.defaults.directory)
    again.changes.recover(recovery.nodes())
    assert recovery.saved == []
    assert not list((tmp_path / "saved").iterdir())
    async with running(again):
        await again.settle()
        assert inner.data(PREFIX + "whole") == b"bytes"
        assert inner.data(PREFIX + "part") == BYTES + b"0" * (512 * KIB - len(BYTES))


async def test_what_its_user_has_dropped_is_not_stored(tmp_path: Path, autojump_clock: MockClock) -> None:
    inner = FakeStore()
    store = FaultStore(inner)
    store.fail("put", AccessDenied("put", "f", "AccessDenied"), count=FOREVER)
    async with running(made(store, tmp_path)) as world:
        await world.write("f", b"bytes")
        with pytest.raises(PhfsError):
            await world.settle()
    world.aside.keep_refused()
    world.area.saved.drop(entries(world))
    world.journal.close()
    world.area.close()
    again = made(inner, tmp_path)
    again.changes.recover(Recovery(again.journal, again.area, again.inodes, again.defaults.directory).nodes())
    async with running(again):
        await again.settle()
        assert PREFIX + "f" not in inner.keys


async def test_bytes_without_room_stay_where_they_are(tmp_path: Path, autojump_clock: MockClock) -> None:
    store = FaultStore(FakeStore())
    store.fail("put", AccessDenied("put", "f", "AccessDenied"), count=FOREVER)
    async with running(made(store, tmp_path, saved_bytes_max=LIMIT)) as world:
        for name in ("a", "b"):
            await world.write(name, BYTES)
        with pytest.raises(PhfsError):
            await world.settle()
    assert len(world.aside.keep_refused()) == 1
    assert len(list((tmp_path / "staging").glob("*.data"))) == 1


def test_an_entry_of_an_older_version_is_listed(tmp_path: Path) -> None:
    world = made(FakeStore(), tmp_path)
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved/20260101T000000Z-7.data").write_bytes(b"bytes")
    (kept,) = entries(world)
    assert (kept.id, dict(kept.note), kept.is_whole, kept.is_waiting) == ("20260101T000000Z-7", {}, None, False)
    world.area.saved.export(kept, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"bytes"
    with pytest.raises(FileExistsError):
        world.area.saved.export(kept, tmp_path / "copy")

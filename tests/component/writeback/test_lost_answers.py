"""Uploads of which nobody knows whether the store has them: no answer, or no process any more to hear it."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from phfs_fuse.errors import StaleVersion
from phfs_fuse.pending.recovery import Recovery
from phfs_fuse.types import ObjectKey
from phfs_fuse.vfs.vfs import Change
from tests.support.fake_store import FakeStore
from tests.support.fault_store import FaultStore
from tests.support.world import PREFIX, World, made, running

FIRST_TRY_SECONDS = 0.7  # after the quiet time, before the second one


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


@pytest.fixture
def faults(store: FakeStore) -> FaultStore:
    return FaultStore(store)


@pytest.fixture
async def world(faults: FaultStore, tmp_path: Path) -> AsyncIterator[World]:
    (tmp_path / "state").mkdir()
    async with running(made(faults, tmp_path / "state")) as world:
        yield world


def stored(store: FakeStore) -> dict[str, bytes]:
    return {str(key).removeprefix(PREFIX): bytes(found.data) for key, found in store.objects.items()}


async def recovered(store: FakeStore | FaultStore, directory: Path) -> World:
    """A process that takes up what is in a copy of the state."""
    world = made(store, directory)
    recovery = Recovery(world.journal, world.area, world.inodes, world.defaults.directory)
    world.changes.recover(recovery.nodes())
    assert recovery.saved == []
    return world


async def test_a_file_changed_after_its_lost_answer_is_no_conflict(
    world: World, store: FakeStore, faults: FaultStore, autojump_clock: MockClock
) -> None:
    faults.fail("put", after=True)
    await world.write("f", b"first")
    await trio.sleep(FIRST_TRY_SECONDS)
    await world.write_again("f", b"second version")
    await world.settle()
    assert stored(store) == {"f": b"second version"}
    assert world.journal.conflicts() == []
    assert world.journal.attempts() == []


async def test_a_file_removed_after_its_lost_answer_does_not_come_back(
    world: World, store: FakeStore, faults: FaultStore, autojump_clock: MockClock
) -> None:
    faults.fail("put", after=True, count=2)
    await world.write("f", b"bytes")
    await world.vfs.mkdir(1, b"d", 0o700, 0, 0)
    await trio.sleep(FIRST_TRY_SECONDS)
    await world.vfs.unlink(1, b"f")
    await world.vfs.rmdir(1, b"d")
    await world.settle()
    assert stored(store) == {"": b""}  # the directory of the mount itself, now empty
    assert world.journal.attempts() == []


async def test_a_name_used_again_after_a_lost_answer_is_no_conflict(
    world: World, store: FakeStore, faults: FaultStore, autojump_clock: MockClock
) -> None:
    faults.fail("put", after=True)
    await world.write("f", b"first")
    await trio.sleep(FIRST_TRY_SECONDS)
    await world.vfs.unlink(1, b"f")
    await world.write("f", b"another file")
    await world.settle()
    assert stored(store) == {"f": b"another file"}
    assert world.journal.conflicts() == []


async def test_a_process_that_died_while_it_uploaded_is_followed_by_one_that_knows(
    world: World, store: FakeStore, faults: FaultStore, tmp_path: Path, autojump_clock: MockClock
) -> None:
    sent = faults.hold("put", after=True)
    await world.write("f", b"first")
    await sent.entered.wait()
    shutil.copytree(tmp_path / "state", tmp_path / "copy")
    two = await recovered(store, tmp_path / "copy")
    await two.write_again("f", b"second version")
    async with running(two):
        await two.settle()
        assert stored(store) == {"f": b"second version"}
        assert two.journal.conflicts() == []


async def test_a_file_renamed_during_its_upload_is_whole_after_a_crash(
    world: World, store: FakeStore, faults: FaultStore, tmp_path: Path, autojump_clock: MockClock
) -> None:
    await world.write("f", b"old bytes")
    await world.settle()
    held = faults.hold("put")
    await world.write_again("f", b"new")
    await held.entered.wait()
    await world.vfs.rename(1, b"f", 1, b"g", 0)
    await world.vfs.rename(1, b"g", 1, b"f", 0)
    shutil.copytree(tmp_path / "state", tmp_path / "copy")
    two = await recovered(store, tmp_path / "copy")
    async with running(two):
        await two.settle()
        assert stored(store) == {"f": b"new bytes"}


async def test_a_folder_is_not_missed_while_its_first_file_lands(
    world: World, faults: FaultStore, autojump_clock: MockClock
) -> None:
    folder = await world.vfs.mkdir(1, b"d", 0o755, 0, 0)
    folder.lookups += 1
    await world.write("d/f", b"bytes")
    held = faults.hold("list", when=lambda key: key == f"{PREFIX}d/", after=True)
    folder.checked_at = float("-inf")
    found = []

    async def look_up() -> None:
        found.append(await world.vfs.lookup(1, b"d"))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(look_up)
        await held.entered.wait()  # the store has said that there is nothing
        await world.settle()
        held.open.set()
    assert found == [folder]


async def test_what_is_written_during_an_upload_that_fails_is_stored_too(
    world: World, store: FakeStore, faults: FaultStore, autojump_clock: MockClock
) -> None:
    held = faults.hold("put")
    faults.fail("put")
    await world.write("f", b"first bytes")
    await held.entered.wait()
    node = await world.write_again("f", b"OTHER")
    held.open.set()
    await world.settle()
    assert stored(store) == {"f": b"OTHER bytes"}
    assert node.staged is None
    assert await world.read("f") == b"OTHER bytes"


async def test_what_is_written_while_attributes_are_on_their_way_outlives_a_lost_race(
    world: World, store: FakeStore, faults: FaultStore, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """The attributes were for a version that is no more; the bytes are kept beside the winner."""
    node = await world.write("f", b"base")
    await world.settle()
    gate = faults.hold("copy")
    await world.vfs.setattr(node.ino, Change(mode=0o755))
    await gate.entered.wait()
    fh = world.vfs.open(node.ino, os.O_WRONLY)
    await world.vfs.write(fh, 4, b" and more")
    world.vfs.release(fh)
    store.seed(f"{PREFIX}f", b"theirs")
    gate.open.set()
    await world.settle()
    assert sorted(stored(store).values()) == [b"base and more", b"theirs"]
    assert stored(store)["f"] == b"theirs"
    caplog.clear()


@pytest.mark.parametrize("how", ["unlinked", "replaced"])
async def test_a_file_that_went_during_its_upload_is_gone_after_a_crash(
    world: World, store: FakeStore, faults: FaultStore, tmp_path: Path, how: str, autojump_clock: MockClock
) -> None:
    await world.write("z", b"newer")
    await world.settle()
    held = faults.hold("put")
    await world.write("f", b"first")
    await held.entered.wait()
    if how == "unlinked":
        await world.vfs.unlink(1, b"f")
    else:
        await world.vfs.rename(1, b"z", 1, b"f", 0)
    shutil.copytree(tmp_path / "state", tmp_path / "copy")
    two = await recovered(store, tmp_path / "copy")
    async with running(two):
        await two.settle()
        assert stored(store) == ({"z": b"newer"} if how == "unlinked" else {"f": b"newer"})


async def test_what_somebody_else_stored_before_a_deletion_is_kept(
    world: World, store: FakeStore, autojump_clock: MockClock
) -> None:
    """Removed or renamed here, within the quiet time."""
    for name in ("removed", "renamed", "ours"):
        await world.write(name, b"bytes")
    await world.settle()
    for name in ("removed", "renamed"):
        store.seed(ObjectKey(PREFIX + name), b"stored meanwhile")
    for name in (b"removed", b"ours"):
        await world.vfs.unlink(1, name)
    await world.vfs.rename(1, b"renamed", 1, b"moved", 0)
    await world.settle()
    found = stored(store)
    assert (found["removed"], found["renamed"]) == (b"stored meanwhile", b"stored meanwhile")
    assert "ours" not in found


async def test_what_somebody_else_stored_while_a_deletion_waited_is_kept(
    world: World, store: FakeStore, faults: FaultStore, autojump_clock: MockClock
) -> None:
    for name in ("theirs", "ours"):
        await world.write(name, b"bytes")
    await world.settle()
    faults.down = True
    for name in (b"theirs", b"ours"):
        await world.vfs.unlink(1, name)
    await trio.sleep(30)
    store.seed(ObjectKey(PREFIX + "theirs"), b"stored meanwhile")
    faults.down = False
    await world.settle()
    found = stored(store)
    found.pop("", None)  # the directory may have been taken for empty meanwhile
    assert found == {"theirs": b"stored meanwhile"}
    await trio.sleep(10)
    assert await world.read("theirs") == b"stored meanwhile"


async def test_what_somebody_else_stored_within_the_quiet_time_is_kept(
    world: World, store: FakeStore, autojump_clock: MockClock
) -> None:
    for name in ("one", "two", "three", "four"):
        await world.write(name, b"bytes")
    await world.settle()
    for name in (b"one", b"two", b"three"):  # in one batch
        await world.vfs.unlink(1, name)
    store.seed(ObjectKey(PREFIX + "two"), b"theirs")
    await world.settle()
    assert stored(store) == {"two": b"theirs", "four": b"bytes"}
    await world.vfs.unlink(1, b"four")  # alone
    store.seed(ObjectKey(PREFIX + "four"), b"theirs")
    await world.settle()
    assert stored(store) == {"two": b"theirs", "four": b"theirs"}
    assert world.writeback.spared == 2
    assert await world.read("two") == b"theirs"
    assert await world.names() == ["four", "two"]


async def test_the_source_of_a_rename_that_somebody_else_replaced_is_kept(
    world: World, store: FakeStore, faults: FaultStore, autojump_clock: MockClock
) -> None:
    await world.write("a", b"ours")
    await world.settle()
    gate = faults.hold("copy", after=True)
    await world.vfs.rename(1, b"a", 1, b"b", 0)
    await gate.entered.wait()
    await trio.sleep(1)
    store.seed(ObjectKey(PREFIX + "a"), b"theirs")
    gate.open.set()
    await world.settle()
    assert stored(store) == {"a": b"theirs", "b": b"ours"}
    assert await world.read("a") == b"theirs"


async def test_a_name_that_is_made_anew_over_what_somebody_else_stored_is_a_conflict(
    world: World, store: FakeStore, autojump_clock: MockClock
) -> None:
    await world.write("f", b"bytes")
    await world.settle()
    await world.vfs.unlink(1, b"f")
    store.seed(ObjectKey(PREFIX + "f"), b"theirs")
    await world.write("f", b"ours again")
    await world.settle()
    found = stored(store)
    assert found.pop("f") == b"theirs"
    assert list(found.values()) == [b"ours again"]


async def test_a_version_that_no_program_has_seen_is_not_removed_or_moved(
    world: World, store: FakeStore, autojump_clock: MockClock
) -> None:
    """The kernel goes by what it looked up last: told so, it looks again."""
    await world.write("f", b"seen")
    await world.settle()
    store.seed(ObjectKey(PREFIX + "f"), b"unseen")
    await trio.sleep(60)
    with pytest.raises(StaleVersion):
        await world.vfs._names.unlink(1, b"f")
    with pytest.raises(StaleVersion):
        await world.vfs._names.rename(1, b"f", 1, b"g", 0)
    await world.settle()
    assert stored(store) == {"f": b"unseen"}
    await world.vfs.unlink(1, b"f")
    await world.settle()
    assert "f" not in stored(store)


async def test_bytes_of_a_link_that_was_not_made_yet_are_not_put_aside(
    world: World, store: FakeStore, tmp_path: Path
) -> None:
    """The process dies before the transaction of the link: nobody was told of it, and it is asked for again."""
    world.changes.new_layer(b"target")
    shutil.copytree(tmp_path / "state", tmp_path / "copy")
    after = await recovered(store, tmp_path / "copy")
    assert list((tmp_path / "copy" / "staging").iterdir()) == []
    after.journal.close()

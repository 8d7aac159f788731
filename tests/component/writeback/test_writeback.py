"""The tree and the write-back over a fake store: what reaches the store, with how many requests, after what."""

from __future__ import annotations

import errno
import os
import random
import socket
import time
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from phfs_fuse.errors import Exists, IllegalName, NotEmpty, NotFound, PhfsError, StoreUnavailable
from phfs_fuse.pending.recovery import Recovery
from phfs_fuse.store.base import Expect
from phfs_fuse.types import MIB, ObjectKey
from phfs_fuse.vfs.vfs import Change
from tests.support.fake_store import FakeStore
from tests.support.fault_store import FaultStore
from tests.support.world import PREFIX, World, content, keys, made, running


async def test_written_bytes_reach_the_store_with_attributes(world: World, autojump_clock: MockClock) -> None:
    node = await world.write("f", b"hello")
    await world.settle()
    assert content(world, "f") == b"hello"
    info = await world.store.head(ObjectKey(PREFIX + "f"))
    assert info.metadata is not None
    assert info.metadata["mode"] == "0100644"
    assert node.dirty is None
    assert node.staged is None
    assert await world.read("f") == b"hello"


async def test_temporary_file_renamed_over_costs_one_put(world: World, autojump_clock: MockClock) -> None:
    await world.write("f", b"old")
    await world.settle()
    before = world.store.requests["put"]
    await world.write("f.tmp", b"new")
    await world.vfs.rename(1, b"f.tmp", 1, b"f", 0)
    await world.settle()
    assert keys(world) == ["f"]
    assert content(world, "f") == b"new"
    assert world.store.requests["put"] == before + 1
    assert world.store.requests["copy"] == 0
    assert world.store.requests["delete"] + world.store.requests["delete_many"] == 0


async def test_file_removed_before_its_upload_costs_nothing(world: World, autojump_clock: MockClock) -> None:
    await world.write("other", b"")
    await world.settle()
    counts = dict(world.store.requests)
    await world.write("f", b"x")
    await world.vfs.unlink(1, b"f")
    await trio.sleep(5)
    for method in ("put", "delete", "delete_many", "copy"):
        assert world.store.requests[method] == counts.get(method, 0)


async def test_chmod_after_close_is_in_the_same_put(world: World, autojump_clock: MockClock) -> None:
    node = await world.write("f", b"x")
    await world.vfs.setattr(node.ino, Change(mode=0o755))
    await world.settle()
    info = await world.store.head(ObjectKey(PREFIX + "f"))
    assert info.metadata is not None
    assert info.metadata["mode"] == "0100755"
    assert world.store.requests["put"] == 1
    assert world.store.requests["copy"] == 0


async def test_a_file_that_was_left_alone_is_stored_soon_and_then_at_leisure(
    world: World, autojump_clock: MockClock
) -> None:
    await world.write("f", b"one")
    await world.settle()
    await trio.sleep(6)
    await world.write("f", b"two")
    await trio.sleep(0.1)
    assert content(world, "f") == b"two"
    await world.write("f", b"three")
    await trio.sleep(0.4)
    assert content(world, "f") == b"two"
    await trio.sleep(0.2)
    assert content(world, "f") == b"three"


async def test_a_big_new_file_is_stored_soon_and_then_at_leisure(world: World, autojump_clock: MockClock) -> None:
    big = b"x" * 8 * MIB
    await world.write("small", b"x")
    await world.write("big.tmp", big)
    await world.vfs.rename(1, b"big.tmp", 1, b"big", 0)
    await trio.sleep(0.1)
    assert keys(world) == ["big"]
    assert content(world, "big") == big
    assert world.store.requests["copy"] == 0
    await world.write("big", b"y" * 8 * MIB)
    await trio.sleep(0.4)
    assert content(world, "big") == big


async def test_a_multipart_upload_that_cannot_be_noted_is_aborted(
    world: World, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted = world.journal.put_upload

    def refused(upload_id: str, key: ObjectKey) -> None:
        monkeypatch.setattr(world.journal, "put_upload", noted)
        raise OSError(errno.EIO, "journal")

    monkeypatch.setattr(world.journal, "put_upload", refused)
    await world.write("big", b"x" * 8 * MIB)
    await world.settle()
    assert content(world, "big") == b"x" * 8 * MIB
    assert world.store.requests["create_multipart"] == 2
    assert not world.store.uploads


async def test_the_first_change_has_the_store_looked_at_before_it_is_due(
    world: World, autojump_clock: MockClock
) -> None:
    with pytest.raises(NotFound):
        await world.vfs.lookup(1, b"f")
    await trio.sleep(10)
    assert not world.store.is_prepared
    await world.write("f", b"x")
    await trio.sleep(0.1)
    assert world.store.is_prepared
    assert keys(world) == []


async def test_a_file_left_alone_that_is_replaced_by_rename_is_stored_soon(
    world: World, autojump_clock: MockClock
) -> None:
    await world.write("f", b"one")
    await world.settle()
    await trio.sleep(6)
    await world.write("f.tmp", b"two")
    await world.vfs.rename(1, b"f.tmp", 1, b"f", 0)
    await trio.sleep(0.1)
    assert content(world, "f") == b"two"
    await world.write("f.tmp", b"three")
    await world.vfs.rename(1, b"f.tmp", 1, b"f", 0)
    await trio.sleep(0.4)
    assert content(world, "f") == b"two"


async def test_attributes_that_change_wait_for_others(world: World, autojump_clock: MockClock) -> None:
    node = await world.write("f", b"x")
    await world.settle()
    await trio.sleep(6)
    counts = dict(world.store.requests)
    await world.vfs.setattr(node.ino, Change(mode=0o755))
    await trio.sleep(0.4)
    await world.vfs.setattr(node.ino, Change(mtime_ns=10**18))
    await trio.sleep(0.4)
    assert dict(world.store.requests) == counts


@pytest.mark.parametrize("seconds", [-62_135_596_800, 99_999_999_999, 253_402_300_799])
async def test_times_that_do_not_fit_are_clamped(world: World, autojump_clock: MockClock, seconds: int) -> None:
    """Whether a program sets them, or somebody else has stored them."""
    await world.store.put(ObjectKey(PREFIX + "d/far"), b"x", {"mtime": str(seconds)}, expect=None)
    node = await world.write("f", b"x")
    await world.vfs.setattr(node.ino, Change(mtime_ns=seconds * 10**9, atime_ns=seconds * 10**9))
    assert (await world.node("d/far")).mtime_ns == node.mtime_ns == node.atime_ns
    assert abs(node.mtime_ns) >= 2**63 - 1
    await world.vfs.rename(1, b"d", 1, b"e", 0)
    await world.settle()
    assert keys(world) == ["e/far", "f"]


async def test_rename_of_a_stored_file_is_a_copy_and_a_delete(world: World, autojump_clock: MockClock) -> None:
    await world.write("a", b"x")
    await world.settle()
    await world.vfs.rename(1, b"a", 1, b"b", 0)
    with pytest.raises(NotFound):
        await world.vfs.lookup(1, b"a")
    assert await world.read("b") == b"x"
    await world.settle()
    assert keys(world) == ["b"]
    assert world.store.requests["put"] == 1
    assert await world.read("b") == b"x"


async def test_ring_of_renames(world: World, autojump_clock: MockClock) -> None:
    await world.write("a", b"was a")
    await world.write("b", b"was b")
    await world.settle()
    world.blocks.adopted.clear()
    await world.vfs.rename(1, b"a", 1, b"t", 0)
    await world.vfs.rename(1, b"b", 1, b"a", 0)
    await world.vfs.rename(1, b"t", 1, b"b", 0)
    with trio.fail_after(100):
        await world.settle()
    assert keys(world) == ["a", "b"]
    assert content(world, "a") == b"was b"
    assert content(world, "b") == b"was a"


async def test_renamed_away_and_written_anew(world: World, autojump_clock: MockClock) -> None:
    await world.write("log", b"one")
    await world.settle()
    world.blocks.adopted.clear()
    await world.vfs.rename(1, b"log", 1, b"log.1", 0)
    await world.write("log", b"two")
    with trio.fail_after(100):
        await world.settle()
    assert content(world, "log") == b"two"
    assert content(world, "log.1") == b"one"


async def test_directory_rename_moves_everything(world: World, autojump_clock: MockClock) -> None:
    await world.vfs.mkdir(1, b"d", 0o755, 0, 0)
    folder = await world.node("d")
    await world.vfs.mkdir(folder.ino, b"sub", 0o755, 0, 0)
    for path in ("d/1", "d/2", "d/sub/3"):
        await world.write(path, path.encode())
    await world.settle()
    await world.write("d/late", b"late")
    await world.vfs.rename(1, b"d", 1, b"e", 0)
    assert await world.names() == ["e"]
    await world.settle()
    assert keys(world) == ["e/1", "e/2", "e/late", "e/sub/3"]
    assert content(world, "e/sub/3") == b"d/sub/3"
    with pytest.raises(NotFound):
        await world.vfs.lookup(1, b"d")


async def test_markers_come_and_go(world: World, autojump_clock: MockClock) -> None:
    await world.vfs.mkdir(1, b"d", 0o755, 0, 0)
    folder = await world.node("d")
    await world.settle()
    assert keys(world) == ["d/"]
    await world.write("d/f", b"x")
    await world.settle()
    assert keys(world) == ["d/f"]
    await world.vfs.unlink(folder.ino, b"f")
    await world.settle()
    assert keys(world) == ["d/"]
    await world.vfs.rmdir(1, b"d")
    await world.settle()
    await trio.sleep(2)
    assert [key for key in keys(world) if key] == []
    assert await world.names() == []


async def test_attributes_of_a_folder_outlive_a_child_that_comes(world: World, autojump_clock: MockClock) -> None:
    await world.vfs.mkdir(1, b"d", 0o777, 0, 0)
    node = await world.node("d")
    await world.settle()
    await world.vfs.setattr(node.ino, Change(uid=4093))
    await world.write("d/f", b"x")
    await world.settle()
    info = await world.store.head(ObjectKey(PREFIX + "d/"))
    assert info.metadata is not None
    assert (info.metadata["uid"], info.metadata["mode"]) == ("4093", "040777")


async def test_folder_with_a_child_before_its_marker_costs_no_marker(world: World, autojump_clock: MockClock) -> None:
    await world.vfs.mkdir(1, b"d", 0o755, 0, 0)
    await world.write("d/f", b"x")
    await world.settle()
    assert keys(world) == ["d/f"]
    assert world.store.requests["put"] == 1


async def test_rename_onto_a_folder_that_is_not_empty(world: World, autojump_clock: MockClock) -> None:
    await world.vfs.mkdir(1, b"a", 0o755, 0, 0)
    await world.vfs.mkdir(1, b"b", 0o755, 0, 0)
    await world.write("b/f", b"x")
    with pytest.raises(NotEmpty):
        await world.vfs.rename(1, b"a", 1, b"b", 0)
    with pytest.raises(Exists):
        await world.vfs.rename(1, b"a", 1, b"b", 1)


async def test_unlinked_file_stays_readable_while_open(world: World, autojump_clock: MockClock) -> None:
    node = await world.write("f", b"still here")
    await world.settle()
    world.blocks.adopted.clear()
    fh = world.vfs.open(node.ino, os.O_RDWR)
    await world.vfs.unlink(1, b"f")
    await trio.sleep(5)
    assert "f" not in keys(world)
    assert await world.vfs.read(fh, 0, 100) == b"still here"
    await world.vfs.write(fh, 0, b"STILL")
    assert await world.vfs.read(fh, 0, 100) == b"STILL here"
    world.vfs.release(fh)
    node.lookups = 1
    world.vfs.forget([(node.ino, 1)])
    assert world.area.held_bytes == 0
    with pytest.raises(PhfsError):
        world.vfs.getattr(node.ino)


async def test_write_during_the_upload_makes_a_second_one(world: World, autojump_clock: MockClock) -> None:
    node, fh = await world.vfs.create(1, b"f", 0o644, os.O_RDWR, 0, 0)
    await world.vfs.write(fh, 0, b"a" * 6 * MIB)
    await world.vfs.write(fh, 6 * MIB, b"b" * 6 * MIB)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.vfs.fsync, fh)
        while not (node.dirty and node.dirty.uploading):
            await trio.lowlevel.checkpoint()
        await world.vfs.write(fh, 0, b"X")
    assert content(world, "f")[:1] in (b"a", b"X")
    world.vfs.release(fh)
    await world.settle()
    assert content(world, "f") == b"X" + b"a" * (6 * MIB - 1) + b"b" * 6 * MIB


async def test_small_change_in_a_big_object_sends_little(world: World, autojump_clock: MockClock) -> None:
    body = os.urandom(1 << 20) * 40
    await world.store.put(ObjectKey(PREFIX + "big"), body, {}, expect=None)
    node = await world.node("big")
    fh = world.vfs.open(node.ino, os.O_RDWR)
    await world.vfs.write(fh, 20 * MIB, b"changed")
    await world.vfs.setattr(node.ino, Change(size=40 * MIB - 3))
    world.vfs.release(fh)
    await world.settle()
    assert content(world, "big") == (body[: 20 * MIB] + b"changed" + body[20 * MIB + 7 :])[:-3]
    assert world.store.requests["upload_part_copy"] >= 1


async def test_foreign_version_is_a_new_inode_and_the_old_one_keeps_its_bytes(
    world: World, autojump_clock: MockClock
) -> None:
    node = await world.write("f", b"ours")
    await world.settle()
    fh = world.vfs.open(node.ino, os.O_RDONLY)
    await world.store.put(ObjectKey(PREFIX + "f"), b"theirs!", {}, expect=None)
    await trio.sleep(6)
    again = await world.node("f")
    assert again.ino != node.ino
    assert again.size == 7
    assert await world.vfs.read(fh, 0, 100) == b"ours"


async def test_conflict_keeps_both(world: World, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture) -> None:
    await world.write("f", b"base")
    await world.settle()
    fh = world.vfs.open((await world.node("f")).ino, os.O_RDWR)
    await world.vfs.write(fh, 0, b"ours")
    await world.store.put(ObjectKey(PREFIX + "f"), b"theirs", {}, expect=None)
    world.vfs.release(fh)
    await world.settle()
    await trio.sleep(100)
    assert content(world, "f") == b"theirs"
    (kept,) = [key for key in keys(world) if ".conflict-" in key]
    assert content(world, kept) == b"ours"
    assert len(world.journal.conflicts()) == 1
    caplog.clear()


async def test_conflicts_of_one_name_while_the_clock_stands(
    world: World, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it does when it is set back. The first copy was made by another mount on a host of the same name."""
    monkeypatch.setattr(time, "gmtime", lambda: time.struct_time((2026, 3, 29, 1, 59, 59, 6, 88, 0)))
    taken = ObjectKey(f"{PREFIX}f.conflict-{socket.gethostname()}-20260329T015959Z")
    await world.store.put(taken, b"ours 0", {}, expect=None)
    await world.write("f", b"base")
    await world.settle()
    for number in (1, 2):
        fh = world.vfs.open((await world.node("f")).ino, os.O_RDWR)
        await world.vfs.write(fh, 0, b"ours, longer %d" % number)
        await world.store.put(ObjectKey(PREFIX + "f"), b"theirs %d" % number, {}, expect=None)
        world.vfs.release(fh)
        await world.settle()
        await trio.sleep(100)
    kept = {content(world, key) for key in keys(world) if ".conflict-" in key}
    assert kept == {b"ours 0", b"ours, longer 1", b"ours, longer 2"}
    caplog.clear()


@pytest.mark.parametrize("act", ["create and unlink", "rename over and away"])
async def test_an_upload_that_lands_where_nobody_is_any_more(
    tmp_path: Path, autojump_clock: MockClock, act: str
) -> None:
    store = FakeStore()
    faults = FaultStore(store)
    async with running(made(faults, tmp_path)) as world:
        gate = faults.hold("put")
        await world.write("k", b"first")
        await gate.entered.wait()
        await world.vfs.rename(1, b"k", 1, b"moved", 0)
        if act == "create and unlink":
            await world.write("k", b"second")
            await world.vfs.unlink(1, b"k")
        else:
            await world.write("other", b"second")
            await world.vfs.rename(1, b"other", 1, b"k", 0)
            await world.vfs.rename(1, b"k", 1, b"away", 0)
        gate.open.set()
        await trio.sleep(20)
        assert bytes(store.objects[ObjectKey(PREFIX + "moved")].data) == b"first"
        assert ObjectKey(PREFIX + "k") not in store.objects
        await world.write("k", b"third")
        await trio.sleep(20)
        assert bytes(store.objects[ObjectKey(PREFIX + "k")].data) == b"third"
        assert not world.journal.conflicts()


async def test_odd_names_leave_the_rest_of_a_listing_alone(world: World) -> None:
    long = "y" * 250
    for key in ("..rclonelink", f"{long}/z", long, "q", "q.rclonelink", "link.rclonelink", "d/f", "d"):
        world.store.seed(ObjectKey(PREFIX + key), b"target")
    assert sorted(await world.names()) == sorted(["d", "d.phfs-file", "link", "q", long])
    for name in (b"q.phfs-file", b"link.rclonelink", b"..rclonelink"):
        with pytest.raises(NotFound):
            await world.vfs.lookup(1, name)
    assert (await world.node("link")).is_symlink
    assert await world.read("d.phfs-file") == b"target"


@pytest.mark.parametrize("name", [b"new.rclonelink", b"new.phfs-file"])
async def test_names_that_would_show_as_something_else_are_refused(
    world: World, name: bytes, autojump_clock: MockClock
) -> None:
    with pytest.raises(IllegalName):
        await world.vfs.create(1, name, 0o644, os.O_RDWR, 0, 0)
    with pytest.raises(IllegalName):
        await world.vfs.mkdir(1, name, 0o755, 0, 0)
    await world.write("f", b"bytes")
    with pytest.raises(IllegalName):
        await world.vfs.rename(1, b"f", 1, name, 0)
    await world.settle()
    assert keys(world) == ["f"]


async def test_names_go_on_while_the_store_is_away(world: World, autojump_clock: MockClock) -> None:
    world.store.seed(ObjectKey(PREFIX + "d/f"), b"x")
    folder = await world.node("d")
    assert await world.names(folder.ino) == ["f"]
    world.store.is_away = True
    await trio.sleep(100)
    await world.write("d/new", b"made meanwhile")
    assert sorted(await world.names(folder.ino)) == ["f", "new"]
    with pytest.raises(NotFound):
        await world.vfs.lookup(folder.ino, b"other")
    await world.vfs.mkdir(folder.ino, b"sub", 0o755, 0, 0)
    await world.vfs.unlink(folder.ino, b"f")
    with pytest.raises(StoreUnavailable):
        await world.vfs.lookup(1, b"never seen")
    world.store.is_away = False
    await trio.sleep(100)
    assert keys(world) == ["d/new", "d/sub/"]


async def test_restart_finds_everything(tmp_path: Path, autojump_clock: MockClock) -> None:
    store = FakeStore()
    async with running(made(store, tmp_path)) as one:
        await one.write("stored", b"0123456789")
        await one.write("gone", b"x")
        await one.settle()
        await one.vfs.mkdir(1, b"d", 0o700, 5, 5)
        await one.write("d/new", b"new bytes")
        fh = one.vfs.open((await one.node("stored")).ino, os.O_RDWR)
        await one.vfs.write(fh, 3, b"ABC")
        await one.vfs.unlink(1, b"gone")
        one.journal.close()
    async with running(made(store, tmp_path)) as two:
        recovery = Recovery(two.journal, two.area, two.inodes, two.defaults.directory)
        two.changes.recover(recovery.nodes())
        assert sorted(await two.names()) == ["d", "stored"]
        assert await two.read("stored") == b"012ABC6789"
        assert await two.read("d/new") == b"new bytes"
        await two.settle()
        assert keys(two) == ["d/", "d/new", "stored"]
        assert content(two, "stored") == b"012ABC6789"
        assert recovery.saved == []
    assert not list((tmp_path / "staging").iterdir())


async def test_a_folder_that_is_moved_during_a_request_for_its_marker_is_moved_after_a_restart(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    store = FakeStore()
    faults = FaultStore(store)
    async with running(made(faults, tmp_path)) as one:
        await one.vfs.mkdir(1, b"d", 0o755, 0, 0)
        gate = faults.hold("put", when=lambda key: key.endswith("d/"))
        await gate.entered.wait()
        await one.write("d/f", b"bytes")
        await one.vfs.rename(1, b"d", 1, b"e", 0)
        one.journal.close()
    async with running(made(store, tmp_path)) as two:
        two.changes.recover(Recovery(two.journal, two.area, two.inodes, two.defaults.directory).nodes())
        assert await two.names() == ["e"]
        assert await two.read("e/f") == b"bytes"
        with trio.fail_after(600):
            await two.settle()
        assert keys(two) == ["e/f"]


async def test_listing_during_changes(world: World, autojump_clock: MockClock) -> None:
    for number in range(2500):
        await world.store.put(ObjectKey(f"{PREFIX}f{number:04d}"), b"", {}, expect=Expect(None))
    fh = world.vfs.opendir(1)
    found = []
    offset = 0
    page = await world.vfs.readdir(fh, 0)
    await world.vfs.unlink(1, b"f2400")
    while page:
        found += [node.name for _, node in page]
        offset = page[-1][0]
        page = await world.vfs.readdir(fh, offset)
    assert len(found) == len(set(found)) == 2499


def test_errno_of_not_empty() -> None:
    assert NotEmpty.errno == errno.ENOTEMPTY


@pytest.mark.parametrize("seed", range(30))
async def test_a_ring_of_renames_leaves_no_bytes_behind(tmp_path: Path, autojump_clock: MockClock, seed: int) -> None:
    """Whenever the answers come: bytes that are fetched for a copy belong to the upload that follows."""
    store, delays = FakeStore(), random.Random(seed)
    faults = FaultStore(store)
    async with running(made(faults, tmp_path)) as world:
        for name in ("a", "b"):
            await world.write(name, name.encode())
        await world.settle()
        for method in ("properties", "copy", "put", "get", "delete"):
            for nth in range(1, 5):
                faults.delay(method, delays.choice([0.0, 0.1, 1.0, 5.0]), nth=nth)
        for source, target in ((b"a", b"t"), (b"b", b"a"), (b"t", b"b")):
            await world.vfs.rename(1, source, 1, target, 0)
            await trio.sleep(delays.choice([0.0, 0.0, 0.5, 2.0]))
        await world.settle()
        await trio.sleep(60)
        assert {name: store.data(f"{PREFIX}{name}") for name in ("a", "b")} == {"a": b"b", "b": b"a"}
        assert world.area.orphans(lambda _: False) == []

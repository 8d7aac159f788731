"""Changes that the store refuses for good: what the tree shows then, who is told, and what is tried again."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from phfs_fuse.config.model import OnConflict
from phfs_fuse.errors import (
    AccessDenied,
    CredentialsRefused,
    InvalidArgument,
    NotADirectory,
    NotFound,
    NotSupported,
    PhfsError,
    StoreUnavailable,
)
from phfs_fuse.pending.recovery import Recovery
from phfs_fuse.state.refusal import Operation
from phfs_fuse.types import ObjectKey
from phfs_fuse.vfs.vfs import Change
from tests.support.fake_store import FakeStore
from tests.support.fault_store import FaultStore
from tests.support.world import PREFIX, World, made, running

FOREVER = 10**6
WRITES = ("put", "copy", "create_multipart")
DELETES = ("delete", "delete_many")


def denied(key: str = "") -> AccessDenied:
    return AccessDenied("request", key, "AccessDenied")


class Policy(FakeStore):
    """A store whose user may not do some things."""

    def __init__(self) -> None:
        super().__init__()
        self.refuse: Callable[[str, str], PhfsError | None] = lambda _method, _key: None

    def deny(self, *methods: str, below: str = "", error: PhfsError | None = None) -> None:
        def refuse(method: str, key: str) -> PhfsError | None:
            return (error or denied(key)) if method in methods and key.startswith(PREFIX + below) else None

        self.refuse = refuse

    def allow(self) -> None:
        self.refuse = lambda _method, _key: None

    async def _request(self, method: str, key: str) -> None:
        await super()._request(method, key)
        if (exc := self.refuse(method, key)) is not None:
            raise exc

    async def delete_many(self, versions):  # type: ignore[no-untyped-def]
        """Judged key by key, as S3 does it."""
        failed = {key: exc for key in versions if (exc := self.refuse("delete", key)) is not None}
        return {**await super().delete_many({k: v for k, v in versions.items() if k not in failed}), **failed}


@pytest.fixture
def store() -> Policy:
    return Policy()


@pytest.fixture
async def world(store: Policy, tmp_path: Path) -> AsyncIterator[World]:
    async with running(made(store, tmp_path)) as world:
        yield world


async def seeded(world: World, *names: str) -> None:
    for name in names:
        world.store.seed(PREFIX + name, name.encode())
    for name in names:
        await world.node(name)


def refused(world: World) -> list[tuple[str, str]]:
    return [(refusal.operation.value, refusal.path.decode()) for refusal in world.settling.refused()]


def keys(world: World) -> list[str]:
    """Of the store, but for the marker of the root."""
    return [key for each in world.store.keys if (key := each.removeprefix(PREFIX))]


async def told(world: World) -> PhfsError:
    """What a sync of everything fails with."""
    with pytest.raises(PhfsError) as caught:
        await world.settle()
    return caught.value


async def test_a_refused_deletion_shows_the_name_again(
    world: World, store: Policy, autojump_clock: MockClock
) -> None:
    await seeded(world, "f")
    store.deny(*DELETES)
    await world.vfs.unlink(1, b"f")
    with pytest.raises(NotFound):
        await world.node("f")
    assert (await told(world)).errno == errno.EACCES
    assert await world.read("f") == b"f"
    assert refused(world) == [("delete", "f")]
    assert world.settling.store_state == "refuses changes"
    await world.settle()  # told once
    assert await world.settling.drain()


async def test_many_refused_deletions_are_judged_one_by_one(
    world: World, store: Policy, autojump_clock: MockClock
) -> None:
    await seeded(world, *(f"f{number}" for number in range(8)))
    store.deny("delete", below="f3")
    for number in range(8):
        await world.vfs.unlink(1, b"f%d" % number)
    await told(world)
    assert keys(world) == ["f3"]
    assert await world.names() == ["f3"]


async def test_a_store_that_deletes_one_at_a_time_only(
    world: World, store: Policy, autojump_clock: MockClock
) -> None:
    await seeded(world, "a", "b", "c")
    fault = FaultStore(store)
    world.writeback._deletes._store = fault
    fault.fail("delete_many", NotSupported("delete", "", "NotImplemented"), count=FOREVER)
    for name in (b"a", b"b", b"c"):
        await world.vfs.unlink(1, name)
    await world.settle()
    assert keys(world) == []
    assert refused(world) == []


async def test_a_folder_comes_back_with_what_could_not_be_removed_of_it(
    world: World, store: Policy, autojump_clock: MockClock
) -> None:
    store.seed(PREFIX + "d/", b"", {"mode": "040700"})
    await seeded(world, "d/x", "d/y")
    store.deny("delete", below="d/x")
    d = await world.node("d")
    await world.vfs.unlink(d.ino, b"x")
    await world.vfs.unlink(d.ino, b"y")
    await world.vfs.rmdir(1, b"d")
    await told(world)
    assert keys(world) == ["d/", "d/x"]
    assert await world.names() == ["d"]
    found = await world.node("d")
    assert found.mode & 0o777 == 0o700
    assert await world.names(found.ino) == ["x"]


async def test_a_deletion_that_is_repeated_and_works_is_no_longer_listed(
    world: World, store: Policy, autojump_clock: MockClock
) -> None:
    await seeded(world, "f")
    store.deny(*DELETES)
    await world.vfs.unlink(1, b"f")
    await told(world)
    store.allow()
    await trio.sleep(1000)
    assert keys(world) == ["f"]  # only its user repeats it
    await world.vfs.unlink(1, b"f")
    await world.settle()
    assert keys(world) == []
    assert refused(world) == []
    assert world.settling.store_state == "ok"


async def test_a_refused_rename_is_undone(world: World, store: Policy, autojump_clock: MockClock) -> None:
    await seeded(world, "a", "b")
    store.deny(*WRITES)
    node = await world.node("a")
    await world.vfs.rename(1, b"a", 1, b"b", 0)
    assert await world.read("b") == b"a"
    assert (await told(world)).errno == errno.EACCES
    assert world.journal.present() == []  # nothing for a restart to take up
    assert await world.read("a") == b"a"
    assert await world.read("b") == b"b"
    assert await world.node("a") is node
    assert node.dirty is None
    assert refused(world) == [("rename", "a")]
    assert await world.settling.drain()
    assert keys(world) == ["a", "b"]


async def test_a_rename_whose_source_may_not_be_deleted_leaves_both(
    world: World, store: Policy, autojump_clock: MockClock
) -> None:
    await seeded(world, "a")
    store.deny(*DELETES)
    await world.vfs.rename(1, b"a", 1, b"b", 0)
    await told(world)
    assert await world.read("a") == await world.read("b") == b"a"
    assert refused(world) == [("delete", "a")]


async def test_a_refused_rename_meets_a_new_file_of_the_old_name(
    world: World, store: Policy, autojump_clock: MockClock
) -> None:
    await seeded(world, "a")
    store.deny("copy")
    await world.vfs.rename(1, b"a", 1, b"b", 0)
    await world.write("a", b"new")
    await told(world)
    assert await world.read("a") == b"a"
    (copy,) = [name for name in await world.names() if name != "a"]
    assert copy.startswith("a.conflict-")
    assert await world.read(copy) == b"new"


async def test_bytes_written_after_a_refused_rename_go_on_under_the_old_name(
    world: World, store: Policy, autojump_clock: MockClock
) -> None:
    await seeded(world, "aaaa")
    store.deny(*WRITES, below="b")
    await world.vfs.rename(1, b"aaaa", 1, b"b", 0)
    await world.write_again("b", b"X")
    await told(world)
    await world.settle()
    assert keys(world) == ["aaaa"]
    assert store.data(PREFIX + "aaaa") == b"Xaaa"


@pytest.mark.parametrize("kept", ["x", "sub/y"])
async def test_each_child_of_a_renamed_folder_is_judged_by_itself(
    world: World, store: Policy, autojump_clock: MockClock, kept: str
) -> None:
    await seeded(world, "d/x", "d/sub/y", "d/z")
    store.deny(*WRITES, below=f"e/{kept}")
    await world.vfs.rename(1, b"d", 1, b"e", 0)
    await told(world)
    assert sorted(keys(world)) == sorted([f"d/{kept}", *(f"e/{n}" for n in ("x", "sub/y", "z") if n != kept)])
    assert await world.read(f"d/{kept}") == f"d/{kept}".encode()
    assert await world.read("e/z") == b"d/z"
    assert await world.settling.drain()


async def test_a_folder_none_of_which_could_be_moved_is_where_it_was(
    world: World, store: Policy, autojump_clock: MockClock
) -> None:
    store.seed(PREFIX + "d/sub/", b"", {"mode": "040700"})
    await seeded(world, "d/x", "d/sub/y")
    store.deny(*WRITES)
    await world.vfs.rename(1, b"d", 1, b"e", 0)
    await told(world)
    assert await world.names() == ["d"]
    assert sorted(await world.names((await world.node("d")).ino)) == ["sub", "x"]
    assert (await world.node("d/sub")).mode & 0o777 == 0o700
    assert await world.read("d/sub/y") == b"d/sub/y"
    assert await world.settling.drain()
    assert sorted(keys(world)) == ["d/sub/", "d/sub/y", "d/x"]


async def test_a_ring_of_renames_that_is_refused_loses_nothing(
    world: World, store: Policy, autojump_clock: MockClock
) -> None:
    await seeded(world, "a", "b")
    store.deny(*WRITES)
    await world.vfs.rename(1, b"a", 1, b"t", 0)
    await world.vfs.rename(1, b"b", 1, b"a", 0)
    await world.vfs.rename(1, b"t", 1, b"b", 0)
    await told(world)
    await world.settling.drain()
    assert {key: store.data(PREFIX + key) for key in keys(world)} == {"a": b"a", "b": b"b"}
    contents = [await world.read(name) for name in await world.names()]
    assert {b"a", b"b"} <= set(contents)


async def test_a_refused_upload_waits_is_shown_and_tried_again(
    world: World, store: Policy, autojump_clock: MockClock
) -> None:
    store.deny(*WRITES)
    await world.write("f", b"bytes")
    assert (await told(world)).errno == errno.EACCES
    assert refused(world) == [("upload", "f")]
    assert not await world.settling.drain()  # ends
    world.settling.end_drain()
    assert await world.read("f") == b"bytes"
    tries = store.requests["put"]
    assert (await told(world)).errno == errno.EACCES  # each time, and without a request
    assert store.requests["put"] == tries
    store.allow()
    await trio.sleep(200)
    assert store.data(PREFIX + "f") == b"bytes"
    assert refused(world) == []
    await world.settle()


async def test_another_try_can_be_asked_for(world: World, store: Policy, autojump_clock: MockClock) -> None:
    store.deny(*WRITES)
    await world.write("f", b"bytes")
    await told(world)
    store.allow()
    world.settling.retry_refused()
    await world.settle()
    assert keys(world) == ["f"]


async def test_fsync_of_a_refused_file_fails_for_each_who_asks(
    world: World, store: Policy, autojump_clock: MockClock
) -> None:
    store.deny(*WRITES)
    _, fh = await world.vfs.create(1, b"f", 0o644, os.O_RDWR, 0, 0)
    failed: list[int] = []

    async def fsync() -> None:
        with pytest.raises(PhfsError) as caught:
            await world.vfs.fsync(fh)
        failed.append(caught.value.errno)

    await world.vfs.write(fh, 0, b"x")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(fsync)
        nursery.start_soon(fsync)
    assert failed == [errno.EACCES] * 2


async def test_a_refused_file_under_another_name_is_tried_at_once(
    world: World, store: Policy, autojump_clock: MockClock
) -> None:
    store.deny(*WRITES, below="denied")
    await world.write("denied", b"bytes")
    await told(world)
    await world.vfs.rename(1, b"denied", 1, b"allowed", 0)
    await world.settle()
    assert keys(world) == ["allowed"]
    assert refused(world) == []


async def test_refused_attributes_wait(world: World, store: Policy, autojump_clock: MockClock) -> None:
    await seeded(world, "f")
    store.deny(*WRITES, error=InvalidArgument("copy", "f", "InvalidRequest"))
    node = await world.node("f")
    await world.vfs.setattr(node.ino, Change(mode=0o600))
    assert (await told(world)).errno == errno.EINVAL
    assert refused(world) == [("attributes", "f")]
    store.allow()
    await trio.sleep(200)
    assert (await world.store.head(ObjectKey(PREFIX + "f"))).metadata == {
        **dict((await world.store.head(ObjectKey(PREFIX + "f"))).metadata or {}),
        "mode": "0100600",
    }
    assert refused(world) == []


async def test_a_refused_folder_waits(world: World, store: Policy, autojump_clock: MockClock) -> None:
    store.deny(*WRITES)
    await world.vfs.mkdir(1, b"d", 0o755, 0, 0)
    await told(world)
    assert refused(world) == [("mkdir", "d")]
    assert not await world.settling.drain()


async def test_a_marker_that_may_not_be_deleted_is_kept(
    world: World, store: Policy, autojump_clock: MockClock
) -> None:
    await world.vfs.mkdir(1, b"d", 0o755, 0, 0)
    await world.settle()
    store.deny(*DELETES)
    await world.write("d/f", b"x")
    await world.settle()
    assert sorted(keys(world)) == ["d/", "d/f"]
    assert refused(world) == []
    assert await world.settling.drain()


async def test_credentials_that_are_not_accepted_settle_nothing(
    world: World, store: Policy, autojump_clock: MockClock
) -> None:
    await seeded(world, "old", "moved")
    store.deny(*WRITES, *DELETES, error=CredentialsRefused("put", "f", "ExpiredToken"))
    await world.write("f", b"x")
    await world.vfs.unlink(1, b"old")
    await world.vfs.rename(1, b"moved", 1, b"new", 0)
    await trio.sleep(30)
    assert refused(world) == []
    assert world.settling.store_state == "refuses the credentials"
    assert sorted(await world.names()) == ["f", "new"]
    store.allow()
    await world.settle()
    assert sorted(keys(world)) == ["f", "new"]


async def test_what_is_in_the_way_for_a_moment_is_no_refusal(
    world: World, store: Policy, autojump_clock: MockClock
) -> None:
    store.deny("put", error=NotADirectory("put", "f", "XMinioParentIsObject"))
    await world.write("f", b"x")
    await trio.sleep(3)
    assert refused(world) == []
    store.allow()
    await world.settle()
    store.deny("put", error=NotADirectory("put", "f", "XMinioParentIsObject"))
    await world.write("g", b"x")
    await trio.sleep(120)
    assert refused(world) == [("upload", "g")]


async def test_an_away_store_ends_what_was_refused_before(
    world: World, store: Policy, autojump_clock: MockClock
) -> None:
    store.deny(*WRITES)
    await world.write("f", b"x")
    await told(world)
    store.allow()
    store.is_away = True
    await trio.sleep(400)
    assert refused(world) == []
    assert world.settling.store_state == "unavailable"
    store.is_away = False
    await world.settle()


async def test_a_conflict_that_is_to_fail_is_a_refusal(tmp_path: Path, autojump_clock: MockClock) -> None:
    store = Policy()
    async with running(made(store, tmp_path, on_conflict=OnConflict.FAIL)) as world:
        await seeded(world, "f")
        await world.write_again("f", b"ours")
        store.seed(PREFIX + "f", b"theirs")
        await told(world)
        assert refused(world) == [("upload", "f")]
        assert not await world.settling.drain()
        assert store.data(PREFIX + "f") == b"theirs"


async def test_a_restart_keeps_what_was_refused(tmp_path: Path, autojump_clock: MockClock) -> None:
    store = Policy()
    async with running(made(store, tmp_path)) as world:
        await seeded(world, "removed")
        store.deny(*WRITES, *DELETES)
        await world.write("f", b"bytes")
        await world.vfs.unlink(1, b"removed")
        await told(world)
        before = world.settling.refused()
    world.journal.close()
    world.area.close()
    again = made(store, tmp_path)
    again.changes.recover(Recovery(again.journal, again.area, again.inodes, again.defaults.directory).nodes())
    assert sorted(r.operation.value for r in before) == ["delete", "upload"]
    assert sorted(again.settling.refused(), key=str) == sorted(before, key=str)
    async with running(again):
        assert sorted(await again.names()) == ["f", "removed"]
        store.allow()
        with pytest.raises(PhfsError):  # of the deletion, which nobody was told of by this process
            await again.settle()
        assert store.data(PREFIX + "f") == b"bytes"
        assert [r.operation for r in again.settling.refused()] == [Operation.DELETE]


async def test_a_store_that_is_away_is_waited_for(world: World, store: Policy, autojump_clock: MockClock) -> None:
    fault = StoreUnavailable("put", "f", "InternalError")
    store.deny(*WRITES, error=fault)
    await world.write("f", b"x")
    with trio.move_on_after(100) as scope:
        await world.settling.drain()
    assert scope.cancelled_caught
    assert refused(world) == []


async def test_an_open_file_whose_bytes_may_not_be_read_holds_up_no_deletion(
    world: World, store: Policy, autojump_clock: MockClock
) -> None:
    await seeded(world, "f")
    fh = world.vfs.open((await world.node("f")).ino, os.O_RDONLY)
    await world.vfs.unlink(1, b"f")
    store.deny("get")
    await world.settle()
    assert keys(world) == []
    world.vfs.release(fh)


async def test_a_ring_of_renames_of_files_that_may_not_be_read(
    world: World, store: Policy, autojump_clock: MockClock
) -> None:
    await seeded(world, "a", "b")
    store.deny("get", "head", "properties", "copy", "put")
    await world.vfs.rename(1, b"a", 1, b"t", 0)
    await world.vfs.rename(1, b"b", 1, b"a", 0)
    await world.vfs.rename(1, b"t", 1, b"b", 0)
    await told(world)
    assert await world.settling.drain()
    store.allow()
    assert {name: store.data(PREFIX + name) for name in keys(world)} == {"a": b"a", "b": b"b"}
    assert sorted(await world.names()) == ["a", "b"]

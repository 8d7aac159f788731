"""Quotas over a fake store: each kind of change is counted as what the store has in the end, and refused in time."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from phfs_fuse.config.model import QuotaConfig
from phfs_fuse.errors import ConfigError, Exists, NoSpace, PhfsError, QuotaExceeded, StoreUnavailable
from phfs_fuse.pending.recovery import Recovery
from phfs_fuse.quota.counter import QuotaCounter
from phfs_fuse.quota.limits import TIGHT_BYTES, Room
from phfs_fuse.types import ObjectKey
from phfs_fuse.vfs.files import DIRECT
from phfs_fuse.vfs.vfs import Change
from tests.support.fake_store import FakeStore
from tests.support.fault_store import FaultStore
from tests.support.world import PREFIX, World, made, running

LIMIT = 1000
LIMITS = {PREFIX: LIMIT, f"{PREFIX}a/": 100, f"{PREFIX}b/": 50}


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """Folders a (100 bytes allowed) and b (50)."""
    async with running(made(FakeStore(), tmp_path)) as world:
        for name in (b"a", b"b"):
            (await world.vfs.mkdir(1, name, 0o755, 0, 0)).lookups += 1
        world.quotas.limit(LIMITS)
        yield world


def used(world: World, folder: str = "") -> int:
    return world.quotas.used()[PREFIX + folder]


def stored(world: World, folder: str = "") -> int:
    objects = world.store.objects.items()
    return sum(len(found.data) for key, found in objects if key.startswith(PREFIX + folder))


async def ino(world: World, path: str) -> int:
    return (await world.node(path)).ino


Act = Callable[[World], Awaitable[object]]


async def create(world: World) -> None:
    await world.write("a/f", b"x" * 10)


async def overwrite(world: World) -> None:
    await world.write_again("a/old", b"y" * 5)


async def append(world: World) -> None:
    fh = world.vfs.open(await ino(world, "a/old"), os.O_WRONLY)
    await world.vfs.write(fh, 20, b"y" * 7)
    world.vfs.release(fh)


async def beyond_the_end(world: World) -> None:
    fh = world.vfs.open(await ino(world, "a/old"), os.O_WRONLY)
    await world.vfs.write(fh, 60, b"y")
    world.vfs.release(fh)


async def truncate(world: World) -> None:
    await world.vfs.setattr(await ino(world, "a/old"), Change(size=3))


async def extend(world: World) -> None:
    await world.vfs.setattr(await ino(world, "a/old"), Change(size=90))


async def open_with_trunc(world: World) -> None:
    world.vfs.release(world.vfs.open(await ino(world, "a/old"), os.O_WRONLY | os.O_TRUNC))


async def unlink(world: World) -> None:
    await world.vfs.unlink(await ino(world, "a"), b"old")


async def unlink_while_open(world: World) -> None:
    fh = world.vfs.open(await ino(world, "a/old"), os.O_RDWR)
    await world.vfs.unlink(await ino(world, "a"), b"old")
    await world.vfs.write(fh, 20, b"z" * 500)  # in no folder any more
    world.vfs.release(fh)


async def unlink_before_upload(world: World) -> None:
    await world.write("a/f", b"x" * 10)
    await world.vfs.unlink(await ino(world, "a"), b"f")


async def replace_by_rename(world: World) -> None:
    await world.write("a/f", b"x" * 33)
    folder = await ino(world, "a")
    await world.vfs.rename(folder, b"f", folder, b"old", 0)


async def move_to_another_folder(world: World) -> None:
    await world.vfs.rename(await ino(world, "a"), b"old", await ino(world, "b"), b"new", 0)


async def move_a_tree(world: World) -> None:
    folder = await world.vfs.mkdir(await ino(world, "a"), b"sub", 0o755, 0, 0)
    folder.lookups += 1
    await world.write("a/sub/f", b"x" * 11)
    await world.vfs.rename(await ino(world, "a"), b"sub", await ino(world, "b"), b"sub", 0)


async def symlink(world: World) -> None:
    await world.vfs.symlink(await ino(world, "a"), b"l", b"somewhere", 0, 0)


async def chmod(world: World) -> None:
    await world.vfs.setattr(await ino(world, "a/old"), Change(mode=0o600))


ACTS = (
    create, overwrite, append, beyond_the_end, truncate, extend, open_with_trunc, unlink, unlink_while_open,
    unlink_before_upload, replace_by_rename, move_to_another_folder, move_a_tree, symlink, chmod,
)  # fmt: skip


@pytest.mark.parametrize("act", ACTS, ids=lambda act: act.__name__)
@pytest.mark.parametrize("uploaded", [True, False])
async def test_what_is_counted_is_what_is_stored_in_the_end(
    world: World, autojump_clock: MockClock, act: Act, uploaded: bool
) -> None:
    await world.write("a/old", b"o" * 20)
    if uploaded:
        await world.settle()
    await act(world)
    at_once = world.quotas.used()
    await world.settle()
    await trio.sleep(5)  # deletions have their quiet time
    assert {folder: stored(world, folder) for folder in ("", "a/", "b/")} == {
        folder: used(world, folder) for folder in ("", "a/", "b/")
    }
    assert world.quotas.used() == at_once
    await counted(world)
    assert world.quotas.used() == at_once


async def counted(world: World) -> None:
    await keeper(world)._count()


def keeper(world: World, config: QuotaConfig | None = None, store: FaultStore | None = None) -> QuotaCounter:
    return QuotaCounter(
        quotas=world.quotas,
        store=store or world.store,
        known_sizes=world.changes.known_sizes,
        journal=world.journal,
        config=config or QuotaConfig(),
        prefix=PREFIX,
    )


async def test_a_conflict_counts_both(
    world: World, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    await world.write("a/f", b"x" * 10)
    await world.settle()
    fh = world.vfs.open(await ino(world, "a/f"), os.O_RDWR)
    await world.vfs.write(fh, 0, b"y" * 12)
    await world.store.put(ObjectKey(PREFIX + "a/f"), b"z" * 30, {}, expect=None)
    world.vfs.release(fh)
    await trio.sleep(100)
    assert stored(world, "a/") == used(world, "a/") == 42
    caplog.clear()


async def test_what_others_stored_is_found_by_counting(world: World, autojump_clock: MockClock) -> None:
    await world.write("a/mine", b"x" * 10)
    await world.store.put(ObjectKey(PREFIX + "a/theirs"), b"z" * 30, {}, expect=None)
    assert used(world, "a/") == 10
    await counted(world)
    assert used(world, "a/") == used(world) == 40
    await world.store.delete(ObjectKey(PREFIX + "a/theirs"))
    await counted(world)
    await world.settle()
    assert used(world, "a/") == stored(world, "a/") == 10


async def test_a_count_while_uploads_and_deletions_wait(world: World, autojump_clock: MockClock) -> None:
    await world.write("a/deleted", b"x" * 10)
    await world.write("a/changed", b"x" * 10)
    await world.settle()
    await world.vfs.unlink(await ino(world, "a"), b"deleted")
    await world.write_again("a/changed", b"y" * 15)
    await world.write("a/new", b"x" * 20)
    await counted(world)
    assert used(world, "a/") == 35


# ---- what is refused ----


async def test_a_write_over_the_quota_changes_nothing(world: World) -> None:
    node, fh = await world.vfs.create(await ino(world, "b"), b"f", 0o644, os.O_WRONLY, 0, 0)
    assert fh & DIRECT
    await world.vfs.write(fh, 0, b"x" * 50)
    for offset, size in ((50, 1), (49, 2), (1000, 1)):
        with pytest.raises(QuotaExceeded) as caught:
            await world.vfs.write(fh, offset, b"y" * size)
        assert caught.value.errno == errno.EDQUOT
    assert (node.size, used(world, "b/")) == (50, 50)
    await world.vfs.write(fh, 0, b"z" * 50)
    with pytest.raises(QuotaExceeded):
        await world.vfs.setattr(node.ino, Change(size=51))
    await world.vfs.setattr(node.ino, Change(size=49))
    assert await world.vfs.write(fh, 49, b"!") == 1
    await world.vfs.flush(fh)
    assert world.vfs.misjudged(fh) is world.vfs.release(fh) is node  # the kernel asks for its times


async def test_through_the_kernels_cache_it_is_no_space_and_looked_up_again(world: World) -> None:
    parent = await ino(world, "b")
    node, fh = await world.vfs.create(parent, b"f", 0o644, os.O_RDWR, 0, 0)
    assert not fh & DIRECT
    with pytest.raises(NoSpace):
        await world.vfs.write(fh, 0, b"x" * 51)
    await world.vfs.flush(fh)
    assert world.vfs.release(fh) is node
    assert await world.vfs.lookup(parent, b"f") is node  # by a kernel that has forgotten it
    fh = world.vfs.open(node.ino, os.O_RDWR)
    assert world.vfs.release(fh) is None


async def test_a_file_that_is_open_past_the_cache_is_so_for_all(world: World) -> None:
    node, writer = await world.vfs.create(await ino(world, "b"), b"f", 0o644, os.O_WRONLY, 0, 0)
    reader = world.vfs.open(node.ino, os.O_RDONLY)
    assert reader & DIRECT
    world.vfs.release(writer)
    assert not world.vfs.open(node.ino, os.O_RDONLY) & DIRECT
    assert not world.vfs.open(node.ino, os.O_WRONLY) & DIRECT  # somebody may have pages of it


async def test_where_there_is_much_room_files_are_cached(world: World) -> None:
    world.quotas.limit({PREFIX: 10 * TIGHT_BYTES})
    _, fh = await world.vfs.create(await ino(world, "b"), b"f", 0o644, os.O_WRONLY, 0, 0)
    assert not fh & DIRECT


async def test_no_new_files_where_it_is_used_up_but_folders(world: World) -> None:
    await world.write("b/f", b"x" * 50)
    folder = await ino(world, "b")
    for refused in (
        world.vfs.create(folder, b"g", 0o644, os.O_WRONLY, 0, 0),
        world.vfs.mknod(folder, b"g", 0o100644, 0, 0, 0),
        world.vfs.symlink(folder, b"g", b"x", 0, 0),
    ):
        with pytest.raises(QuotaExceeded):
            await refused
    assert await world.names(folder) == ["f"]
    with pytest.raises(Exists):
        await world.vfs.create(folder, b"f", 0o644, os.O_WRONLY | os.O_EXCL, 0, 0)
    (await world.vfs.mkdir(folder, b"sub", 0o755, 0, 0)).lookups += 1
    await world.vfs.unlink(folder, b"f")
    await world.write("b/g", b"x")


async def test_a_link_that_does_not_fit(world: World) -> None:
    with pytest.raises(QuotaExceeded):
        await world.vfs.symlink(await ino(world, "b"), b"l", b"x" * 51, 0, 0)
    assert (await world.names(await ino(world, "b")), used(world, "b/")) == ([], 0)


async def test_a_tree_moves_only_where_it_fits_as_a_whole(world: World) -> None:
    (await world.vfs.mkdir(await ino(world, "a"), b"t", 0o755, 0, 0)).lookups += 1
    for name in ("a/t/x", "a/t/y", "a/t/z"):
        await world.write(name, b"x" * 20)
    a, b = await ino(world, "a"), await ino(world, "b")
    with pytest.raises(QuotaExceeded):
        await world.vfs.rename(a, b"t", b, b"t", 0)
    assert await world.names(b) == []
    assert (used(world, "a/"), used(world, "b/")) == (60, 0)
    await world.vfs.unlink(await ino(world, "a/t"), b"z")
    await world.vfs.rename(a, b"t", b, b"t", 0)
    assert (used(world, "a/"), used(world, "b/"), used(world)) == (0, 40, 40)


async def test_what_was_dirty_uploads_when_the_limit_is_lowered(world: World, autojump_clock: MockClock) -> None:
    await world.write("b/f", b"x" * 50)
    world.quotas.limit({**LIMITS, f"{PREFIX}b/": 1})
    await world.settle()
    assert stored(world, "b/") == 50


async def test_statfs_is_of_the_folder(world: World) -> None:
    await world.write("a/f", b"x" * 30)
    assert world.vfs.statfs(1) == Room(LIMIT, LIMIT - 30, LIMIT - 30)
    assert world.vfs.statfs(await ino(world, "a")) == world.vfs.statfs(await ino(world, "a/f")) == Room(100, 70, 70)
    assert world.vfs.statfs(await ino(world, "b")) == Room(50, 50, 50)
    world.quotas.limit({f"{PREFIX}a/": 100})
    assert world.vfs.statfs(1) is None


# ---- keeping it true ----


async def test_the_use_is_counted_at_the_start_and_now_and_then(world: World, autojump_clock: MockClock) -> None:
    await world.store.put(ObjectKey(PREFIX + "a/theirs"), b"z" * 30, {}, expect=None)
    one = keeper(world, QuotaConfig(limits={"": LIMIT, "a": 100}, recount_seconds=60))
    one.begin(resumed=False)
    async with trio.open_nursery() as nursery:
        await nursery.start(one.run)
        await trio.sleep(5)
        assert used(world, "a/") == 30
        await world.store.delete(ObjectKey(PREFIX + "a/theirs"))
        await trio.sleep(50)
        assert used(world, "a/") == 30
        await trio.sleep(15)
        assert used(world, "a/") == 0
        await world.store.put(ObjectKey(PREFIX + "a/theirs"), b"z" * 10, {}, expect=None)
        world.quotas.foreign(PREFIX + "a/theirs", None, 10)  # an event of which not all is known
        await trio.sleep(10)
        assert used(world, "a/") == 10
        nursery.cancel_scope.cancel()


async def test_counting_waits_for_the_store(
    world: World, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    store = FaultStore(world.store)
    await world.store.put(ObjectKey(PREFIX + "a/theirs"), b"z" * 30, {}, expect=None)
    store.fail("list", StoreUnavailable("list", PREFIX, "away"), count=5)
    one = keeper(world, QuotaConfig(limits={"a": 100}), store)
    one.begin(resumed=False)
    async with trio.open_nursery() as nursery:
        await nursery.start(one.run)
        await trio.sleep(5)
        await world.write("a/f", b"x" * 5)
        assert [quota["counted"] for quota in one.shown()] == [False]
        await trio.sleep(120)
        assert used(world, "a/") == 35
        nursery.cancel_scope.cancel()
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1
    caplog.clear()


async def test_a_restart_goes_on_from_what_was_known(tmp_path: Path, autojump_clock: MockClock) -> None:
    store = FakeStore()
    async with running(made(store, tmp_path)) as world:
        (await world.vfs.mkdir(1, b"a", 0o755, 0, 0)).lookups += 1
        one = keeper(world, QuotaConfig(limits={"a": 100}))
        one.begin(resumed=False)
        async with trio.open_nursery() as nursery:
            await nursery.start(one.run)
            await world.write("a/f", b"x" * 60)
            await trio.sleep(5)
            one.set("a", 200)
            one.set("b", 10)
            nursery.cancel_scope.cancel()
        world.journal.close()
    async with running(made(store, tmp_path)) as world:
        recovery = Recovery(world.journal, world.area, world.inodes, world.defaults.directory)
        world.changes.recover(recovery.nodes())
        one = keeper(world, QuotaConfig(limits={"a": 100}))
        one.begin(resumed=True)
        assert world.vfs.statfs(await ino(world, "a")) == Room(200, 140, 140)
        assert [quota["path"] for quota in one.shown()] == ["a", "b"]
        await counted(world)
        assert used(world, "a/") == 60
        world.journal.close()
    async with running(made(store, tmp_path)) as world:  # a new mount: its own limits
        one = keeper(world, QuotaConfig(limits={"a": 300}))
        one.begin(resumed=False)
        assert [(quota["path"], quota["limit"], quota["used"]) for quota in one.shown()] == [("a", 300, 60)]


async def test_the_file_is_read_again_when_it_changes(
    world: World, tmp_path: Path, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "quotas"
    file.write_text("# groups\n  a = 1K  # small\nb/c=2K; 3K\n")
    one = keeper(world, QuotaConfig(limits={"a": 5, "z": 6}, file=file))
    one.begin(resumed=False)

    def limits() -> dict[object, object]:
        return {quota["path"]: quota["limit"] for quota in one.shown()}

    assert limits() == {"a": 1024, "z": 6, "b/c": 2048, "": 3072}
    async with trio.open_nursery() as nursery:
        await nursery.start(one.run)
        file.write_text("a=2K\n")
        await trio.sleep(3)
        assert limits() == {"a": 2048, "z": 6}
        file.write_text("a=2K\nb=lots\n")
        await trio.sleep(3)
        assert limits() == {"a": 2048, "z": 6}
        assert f"{file}:2: 'b=lots' is not valid" in caplog.text
        caplog.clear()
        one.set("a", None)
        assert limits() == {"z": 6}
        nursery.cancel_scope.cancel()


def test_a_file_that_cannot_be_read_stops_a_new_mount(tmp_path: Path) -> None:
    world = made(FakeStore(), tmp_path)
    with pytest.raises(ConfigError, match=r"--quota-file: .* a file that can be read"):
        keeper(world, QuotaConfig(file=tmp_path / "none")).begin(resumed=False)


def test_a_worker_that_goes_on_does_so_without_the_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    world = made(FakeStore(), tmp_path)
    keeper(world, QuotaConfig(limits={"a": 5}, file=tmp_path / "none")).begin(resumed=True)
    assert world.quotas.used() == {PREFIX + "a/": 0}
    assert "a file that can be read" in caplog.text
    caplog.clear()


def test_the_errno_of_a_quota_is_edquot() -> None:
    error: PhfsError = QuotaExceeded("write", "a/")
    assert error.errno == errno.EDQUOT

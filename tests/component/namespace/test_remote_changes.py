"""What the store's events do to what is known: others' changes are looked up, our own cost nothing."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from phfs_fuse.errors import NotFound, StaleVersion
from phfs_fuse.namespace.remote_changes import Name, StreamState
from phfs_fuse.types import Fh
from phfs_fuse.vfs.attributes import Change
from tests.support.fake_store import FakeStore
from tests.support.fault_store import FaultStore
from tests.support.world import PREFIX, World, made, running

LONG_SECONDS = 60.0  # longer than attr-ttl, shorter than events-ttl


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


@pytest.fixture
def faults(store: FakeStore) -> FaultStore:
    return FaultStore(store)


@pytest.fixture
async def world(faults: FaultStore, store: FakeStore, tmp_path: Path) -> AsyncIterator[World]:
    """With events, and a stream that is open."""
    async with running(made(faults, tmp_path)) as found, trio.open_nursery() as nursery:
        nursery.start_soon(found.events.run)
        await wait_all_tasks_blocked()
        yield found
        nursery.cancel_scope.cancel()


async def asked(store: FakeStore, world: World, *paths: str) -> int:
    """How many requests it takes to look these up, and to list the root."""
    before = store.requests.total()
    for path in paths:
        await world.node(path)
    await world.names()
    return store.requests.total() - before


async def test_what_is_heard_of_is_believed_for_long(
    world: World, store: FakeStore, autojump_clock: MockClock
) -> None:
    store.seed(PREFIX + "d/f", b"1")
    assert world.events.state is StreamState.LIVE
    assert await asked(store, world, "d/f") > 0
    await world.names((await world.node("d")).ino)
    await trio.sleep(LONG_SECONDS)
    assert await asked(store, world, "d/f") == 0
    await trio.sleep(400)
    assert await asked(store, world, "d/f") > 0


async def test_what_was_known_before_the_stream_opened_is_not(
    store: FakeStore, faults: FaultStore, tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with running(made(faults, tmp_path)) as world, trio.open_nursery() as nursery:
        store.seed(PREFIX + "f", b"1")
        await world.names()
        store.seed(PREFIX + "f", b"22")  # nobody hears it
        await trio.sleep(1)
        nursery.start_soon(world.events.run)
        await trio.sleep(6)
        assert await world.read("f") == b"22"
        nursery.cancel_scope.cancel()


async def test_foreign_changes_are_looked_up(world: World, store: FakeStore, autojump_clock: MockClock) -> None:
    store.seed(PREFIX + "d/f", b"1")
    store.seed(PREFIX + "d/g", b"1")
    folder = await world.node("d")
    await world.names(folder.ino)
    await trio.sleep(LONG_SECONDS)
    store.seed(PREFIX + "d/f", b"22")
    assert await world.read("d/f") == b"22"
    store.remove(PREFIX + "d/f")
    assert await world.names(folder.ino) == ["g"]
    with pytest.raises(NotFound):
        await world.node("d/f")
    store.seed(PREFIX + "d/f", b"333")  # where nothing was known to be
    assert await world.read("d/f") == b"333"
    store.seed(PREFIX + "d/new/below/x", b"4")
    assert await world.read("d/new/below/x") == b"4"
    store.remove(PREFIX + "d/new/below/x")
    assert await world.names(folder.ino) == ["f", "g"]


async def test_attributes_by_others_show_on_the_same_version(
    world: World, store: FakeStore, autojump_clock: MockClock
) -> None:
    store.seed(PREFIX + "f", b"1", {"mode": "0100644"})
    store.seed(PREFIX + "d/", b"", {"mode": "040755"})
    node, folder = await world.node("f"), await world.node("d")
    store.seed(PREFIX + "f", b"1", {"mode": "0100600"})
    store.seed(PREFIX + "d/", b"", {"mode": "040700"})
    assert await world.node("f") is node
    assert await world.node("d") is folder
    assert (oct(node.mode), oct(folder.mode)) == ("0o100600", "0o40700")


async def test_an_open_file_keeps_its_version(world: World, store: FakeStore, autojump_clock: MockClock) -> None:
    store.seed(PREFIX + "f", b"old")
    node = await world.node("f")
    fh = world.vfs.open(node.ino, os.O_RDONLY)
    await world.vfs.read(fh, 0, 10)
    store.seed(PREFIX + "f", b"newer")
    assert await world.read("f") == b"newer"
    assert (await world.node("f")).ino != node.ino
    with pytest.raises(StaleVersion):  # there is no cache here: nothing, or the old bytes
        await world.vfs.read(fh, 0, 10)
    world.vfs.release(fh)


async def test_our_own_changes_cost_nothing(world: World, store: FakeStore, autojump_clock: MockClock) -> None:
    await world.names()
    await world.write("f", b"1")
    await world.write("gone", b"1")
    await world.write("moved", b"1")
    await world.settle()
    await world.vfs.unlink(1, b"gone")
    await world.vfs.rename(1, b"moved", 1, b"there", 0)
    await world.write_again("f", b"22")
    await world.settle()
    await trio.sleep(LONG_SECONDS)
    assert world.events.foreign_count == 0
    assert world.events.heard_count >= 6
    assert await asked(store, world, "f", "there") == 0


async def test_a_change_that_follows_ours_while_ours_has_no_answer(
    world: World, store: FakeStore, faults: FaultStore, autojump_clock: MockClock
) -> None:
    await world.names()
    gate = faults.hold("put", after=True)
    await world.write("f", b"ours")
    await gate.entered.wait()
    await wait_all_tasks_blocked()
    store.seed(PREFIX + "f", b"theirs")
    gate.open.set()
    await world.settle()
    await wait_all_tasks_blocked()  # what was heard meanwhile is judged by a task of its own
    assert await world.read("f") == b"theirs"


async def test_an_answer_from_before_a_change_is_not_believed(
    world: World, store: FakeStore, faults: FaultStore, autojump_clock: MockClock
) -> None:
    store.seed(PREFIX + "f", b"old")
    for method, first in (("head", world.node), ("list", None)):
        gate = faults.hold(method, after=True)

        async with trio.open_nursery() as nursery:
            if first is None:
                nursery.start_soon(world.names)
            else:
                nursery.start_soon(first, "f")
            await gate.entered.wait()
            await wait_all_tasks_blocked()
            store.seed(PREFIX + "f", f"after {method}".encode())
            gate.open.set()
        assert await world.read("f") == f"after {method}".encode()


async def test_a_negative_answer_from_before_a_change_is_not_believed(
    world: World, store: FakeStore, faults: FaultStore, autojump_clock: MockClock
) -> None:
    gate = faults.hold("head", after=True)
    async with trio.open_nursery() as nursery:

        async def look() -> None:
            with pytest.raises(NotFound):
                await world.node("f")

        nursery.start_soon(look)
        await gate.entered.wait()
        await wait_all_tasks_blocked()
        store.seed(PREFIX + "f", b"there")
        gate.open.set()
    assert await world.read("f") == b"there"


async def test_a_lost_stream_makes_all_doubtful(world: World, store: FakeStore, autojump_clock: MockClock) -> None:
    store.seed(PREFIX + "f", b"1")
    await world.names()
    await trio.sleep(LONG_SECONDS)
    store.cut_events()
    await wait_all_tasks_blocked()
    assert world.events.state is StreamState.RECONNECTING
    store.seed(PREFIX + "f", b"22")
    assert await world.read("f") == b"22"
    await trio.sleep(LONG_SECONDS)
    assert world.events.state is StreamState.LIVE
    assert world.events.opened_count == 2
    store.seed(PREFIX + "f", b"333")
    assert await world.read("f") == b"333"


async def test_events_that_may_be_missing_make_all_doubtful(
    world: World, store: FakeStore, autojump_clock: MockClock
) -> None:
    store.seed(PREFIX + "f", b"1")
    await world.names()
    await trio.sleep(LONG_SECONDS)
    assert await asked(store, world, "f") == 0
    world.events.missed()
    assert await asked(store, world, "f") > 0
    await trio.sleep(5.5)  # still short
    assert await asked(store, world, "f") > 0
    await trio.sleep(10)
    assert await asked(store, world, "f") > 0
    await trio.sleep(LONG_SECONDS)
    assert await asked(store, world, "f") == 0


async def test_a_store_without_events_is_asked_once(
    store: FakeStore, faults: FaultStore, tmp_path: Path, autojump_clock: MockClock
) -> None:
    store.has_events = False
    async with running(made(faults, tmp_path)) as world:
        await world.events.run()
        assert world.events.state is StreamState.OFF
        store.seed(PREFIX + "f", b"1")
        await world.names()
        await trio.sleep(LONG_SECONDS)
        assert await asked(store, world, "f") > 0


async def test_the_kernel_is_told_of_names_it_may_know(
    world: World, store: FakeStore, autojump_clock: MockClock
) -> None:
    told: list[Name] = []

    async def expire(names: object) -> None:
        told.extend(names)  # type: ignore[call-overload]
        await trio.lowlevel.checkpoint()

    world.trust.kernel_takes_back = True
    store.seed(PREFIX + "known", b"1")
    store.seed(PREFIX + "d/x", b"1")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.events.tell_kernel, expire)
        world.vfs.told(await world.node("known"))
        with pytest.raises(NotFound):
            await world.node("missing")
        for name in ("known", "missing", "neither"):
            store.seed(PREFIX + name, b"22")
        await wait_all_tasks_blocked()
        assert told == [(1, b"known"), (1, b"missing")]
        told.clear()
        store.cut_events()
        await wait_all_tasks_blocked()
        assert (1, b"known") in told
        nursery.cancel_scope.cancel()


async def test_foreign_changes_are_passed_on(world: World, store: FakeStore, autojump_clock: MockClock) -> None:
    seen: list[tuple[str, int | None, int]] = []
    world.events.on_foreign = lambda *told: seen.append(told)
    await world.write("ours", b"1")
    await world.settle()
    store.seed(PREFIX + "theirs", b"22")
    await world.node("theirs")
    store.remove(PREFIX + "theirs")
    store.seed(PREFIX + "folder/")
    assert seen == [(PREFIX + "theirs", None, 2), (PREFIX + "theirs", 2, 0)]


async def opened(world: World, store: FakeStore) -> Fh:
    """A stored file `f`, open for reading and writing; its bytes are known."""
    store.seed(PREFIX + "f", b"old")
    fh = world.vfs.open((await world.node("f")).ino, os.O_RDWR)
    await world.vfs.read(fh, 0, 10)
    return fh


async def test_bytes_written_to_a_file_that_others_have_replaced_are_kept_beside_it(
    world: World, store: FakeStore, autojump_clock: MockClock
) -> None:
    fh = await opened(world, store)
    store.seed(PREFIX + "f", b"theirs")
    assert await world.read("f") == b"theirs"
    await world.vfs.write(fh, 0, b"ours")
    await world.vfs.flush(fh)
    world.vfs.release(fh)
    await world.settle()
    assert store.data(PREFIX + "f") == b"theirs"
    (kept,) = [key for key in store.keys if ".conflict-" in key]
    assert store.data(kept) == b"ours"
    assert [conflict.path for conflict in world.journal.conflicts()] == [b"f"]
    assert sorted(await world.names()) == ["f", kept.removeprefix(PREFIX)]


async def test_bytes_written_to_a_file_that_others_have_removed_are_stored_again(
    world: World, store: FakeStore, autojump_clock: MockClock
) -> None:
    fh = await opened(world, store)
    store.remove(PREFIX + "f")
    with pytest.raises(NotFound):
        await world.node("f")
    await world.vfs.write(fh, 0, b"ours")
    world.vfs.release(fh)
    await world.settle()
    assert {key: store.data(key) for key in store.keys} == {PREFIX + "f": b"ours"}


async def test_a_file_that_a_program_here_has_removed_stays_so(
    world: World, store: FakeStore, autojump_clock: MockClock
) -> None:
    fh = await opened(world, store)
    await world.vfs.unlink(1, b"f")
    await world.vfs.write(fh, 0, b"scratch")
    world.vfs.release(fh)
    await world.settle()
    assert store.keys == [PREFIX]  # the folder is empty


async def test_nothing_is_changed_by_a_name_that_others_have_replaced(
    world: World, store: FakeStore, autojump_clock: MockClock
) -> None:
    store.seed(PREFIX + "f", b"old")
    node = await world.node("f")
    store.seed(PREFIX + "f", b"theirs")
    assert await world.read("f") == b"theirs"
    for change in (Change(size=1), Change(mode=0o600)):  # the kernel looks the name up again
        with pytest.raises(StaleVersion):
            await world.vfs.setattr(node.ino, change)
    await world.vfs.setattr(node.ino, Change(mtime_ns=5, ctime_ns=5))  # the kernel's own, late: must not fail a sync
    assert node.dirty is None
    await world.settle()
    assert store.data(PREFIX + "f") == b"theirs"


@pytest.mark.parametrize("with_looks", [False, True])
async def test_a_folder_goes_with_the_last_that_others_remove_from_it(
    world: World, store: FakeStore, autojump_clock: MockClock, with_looks: bool
) -> None:
    keys = [
        "two/a",
        "two/b",
        "deep/s/a",
        "deep/s/b",
        "deep/t",
        *(f"many/f{number}" for number in range(50)),
        "stays/a",
    ]
    for key in [*keys, "stays/b"]:
        store.seed(PREFIX + key, b"1")
    for folder in ("two", "deep", "deep/s", "many", "stays"):
        await world.names((await world.node(folder)).ino)
    await world.names()
    await trio.sleep(LONG_SECONDS)
    for key in keys:
        store.remove(PREFIX + key)
        if with_looks:
            with suppress(NotFound):  # that was its last
                await world.node(key.split("/")[0])
    assert await world.names() == ["stays"]
    assert await world.names((await world.node("stays")).ino) == ["b"]
    for name in (b"two", b"deep", b"many"):
        await world.vfs.mkdir(1, name, 0o755, 0, 0)


async def test_what_is_left_in_a_folder_keeps_it_from_being_asked_for(
    world: World, store: FakeStore, autojump_clock: MockClock
) -> None:
    for number in range(20):
        store.seed(f"{PREFIX}d/f{number:02}", b"1")
    folder = await world.node("d")
    await world.names(folder.ino)
    await world.names()
    await trio.sleep(1)
    for number in range(19):
        store.remove(f"{PREFIX}d/f{number:02}")
    assert await asked(store, world, "d", "d/f19") == 0

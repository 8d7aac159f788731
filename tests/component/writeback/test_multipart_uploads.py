"""Multipart uploads end completed or aborted, whatever fails; those of other clients stay."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from phfs_fuse import metrics
from phfs_fuse.errors import AccessDenied, StoreUnavailable
from phfs_fuse.state.journal import Journal
from phfs_fuse.state.schema import Intent
from phfs_fuse.store import base
from phfs_fuse.types import MIB, ObjectKey
from phfs_fuse.writeback import multipart_uploads
from tests.support.fake_store import FakeStore
from tests.support.fault_store import FaultStore
from tests.support.world import PREFIX, World, made, running

KEY = ObjectKey(PREFIX + "big")
BIG = b"x" * 8 * MIB
HOUR = multipart_uploads.IDLE_NS / multipart_uploads.SECOND_NS


@pytest.fixture
def store() -> FakeStore:
    return FakeStore(clock=lambda: round(1e18 + trio.current_time() * 1e9))


@pytest.fixture
def faults(store: FakeStore) -> FaultStore:
    return FaultStore(store)


@asynccontextmanager
async def mounted(faults: FaultStore, directory: Path) -> AsyncIterator[World]:
    """A worker, which ends with the block as one that is killed."""
    async with running(made(faults, directory)) as world:
        yield world
    world.journal.close()


def stored(store: FakeStore, name: str) -> bytes:
    return store.data(PREFIX + name)


async def other_client(store: FakeStore, *, initiator: str = "a user") -> str:
    store.identity, ours = initiator, store.identity
    upload_id = await store.create_multipart(KEY, {})
    store.identity = ours
    return upload_id


async def lost(faults: FaultStore, world: World) -> str:
    """An upload of ours whose id nobody knows."""
    faults.fail("create_multipart", after=True)
    await world.write("big", BIG)
    await world.settle()
    (upload_id,) = faults.inner.uploads  # type: ignore[attr-defined]
    return str(upload_id)


async def test_an_abort_that_fails_is_tried_again(
    faults: FaultStore, store: FakeStore, tmp_path: Path, autojump_clock: MockClock
) -> None:
    before = metrics.LEFT_UPLOADS.values["aborted"]
    async with mounted(faults, tmp_path) as world:
        faults.fail("upload_part", count=2)
        faults.fail("abort_multipart", count=4)
        await world.write("big", BIG)
        await world.settle()
        assert store.uploads
        assert world.writeback.multiparts.left().aborts == len(store.uploads)
        await trio.sleep(60)
        assert not store.uploads
        assert world.writeback.multiparts.left().aborts == 0
        assert metrics.LEFT_UPLOADS.values["aborted"] == before + 1
        assert world.journal.uploads() == []


async def test_an_abort_is_taken_up_by_the_next_process(
    faults: FaultStore, store: FakeStore, tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with mounted(faults, tmp_path) as world:
        faults.fail("upload_part")
        faults.fail("abort_multipart", count=1000)
        await world.write("big", BIG)
        await world.settle()
    (left,) = store.uploads
    async with mounted(FaultStore(store), tmp_path) as world:
        await trio.sleep(1)
        assert left not in store.uploads
        assert world.journal.uploads() == []


async def test_a_part_stored_after_the_abort_has_it_aborted_again(
    faults: FaultStore, store: FakeStore, tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with mounted(faults, tmp_path) as world:
        aborting = faults.hold("abort_multipart", after=True)
        faults.fail("upload_part")
        await world.write("big", BIG)
        await aborting.entered.wait()
        revived = await other_client(store)
        store.uploads[next(iter(world.writeback.multiparts._aborts))] = store.uploads.pop(revived)
        aborting.open.set()
        await world.settle()
        await trio.sleep(60)
        assert not store.uploads


async def test_one_that_was_begun_without_an_answer_is_aborted_after_an_hour(
    faults: FaultStore, store: FakeStore, tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with mounted(faults, tmp_path) as world:
        upload_id = await lost(faults, world)
        assert stored(store, "big") == BIG
        await trio.sleep(10)
        (kept,) = world.writeback.multiparts.left().kept
        assert (kept.key, kept.upload_id) == (KEY, upload_id)
        await trio.sleep(HOUR - 60)
        assert upload_id in store.uploads
        await trio.sleep(120)
        assert not store.uploads
        assert world.writeback.multiparts.left() == multipart_uploads.Left(0, 0, [])
        assert world.journal.intents() == []


async def test_the_next_process_looks_for_it(
    faults: FaultStore, store: FakeStore, tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with mounted(faults, tmp_path / "one") as world:
        answer = faults.hold("create_multipart", after=True)
        await world.write("big", BIG)
        await answer.entered.wait()
        shutil.copytree(tmp_path / "one", tmp_path / "two")  # as if it were killed now, before it notes the id
        there = dict(store.uploads)
        answer.open.set()
    store.uploads |= there
    async with mounted(FaultStore(store), tmp_path / "two") as world:
        await trio.sleep(HOUR + 60)
        assert not store.uploads
        assert world.journal.intents() == []


async def test_two_looks_at_a_time(
    faults: FaultStore, store: FakeStore, tmp_path: Path, autojump_clock: MockClock
) -> None:
    """The later answer shows an upload that was found and aborted on the ground of the earlier one."""
    before = metrics.LEFT_UPLOADS.values["kept"]
    async with mounted(faults, tmp_path) as world:
        journal, found = world.journal, world.writeback.multiparts
        at_ns = await store.time_ns()
        await other_client(store)
        await trio.sleep(HOUR + 1)
        intent = Intent(journal.put_intent(KEY, at_ns), KEY, at_ns)
        slow = faults.hold("uploads_of", after=True)
        async with trio.open_nursery() as nursery:
            found._unanswered(intent)
            nursery.start_soon(found._look, KEY)
            await slow.entered.wait()
            await trio.sleep(60)
            assert not store.uploads
            slow.open.set()
        assert found.left() == multipart_uploads.Left(0, 0, [])
        assert metrics.LEFT_UPLOADS.values["kept"] == before


async def test_what_others_do_beside_it_stays(
    faults: FaultStore, store: FakeStore, tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with mounted(faults, tmp_path) as world:
        before = await other_client(store)
        await trio.sleep(60)
        faults.fail("create_multipart", after=True)
        await world.write("big", BIG)
        await world.settle()
        (ours,) = store.uploads.keys() - {before}
        active = await other_client(store)
        await trio.sleep(multipart_uploads.BEGIN_NS / 1e9 + 60)
        later = await other_client(store)
        for _ in range(8):
            await store.upload_part(KEY, active, 1, b"part")
            await trio.sleep(HOUR / 4)
        assert store.uploads.keys() == {before, active, later}
        assert ours not in store.uploads


@pytest.mark.parametrize("theirs", ["a user", "another user"])
async def test_what_may_be_of_another_client_is_kept_and_shown(
    faults: FaultStore, store: FakeStore, tmp_path: Path, autojump_clock: MockClock, theirs: str
) -> None:
    before = metrics.LEFT_UPLOADS.values["kept"]
    async with mounted(faults, tmp_path) as world:
        faults.fail("create_multipart")  # our request has not reached the store
        if theirs == "a user":
            faults.fail("create_multipart", after=True)  # one of both is ours, and nobody knows which
        await world.write("big", BIG)
        their_id = await other_client(store, initiator=theirs)
        if theirs == "a user":
            await other_client(store)
            await other_client(store)
        await world.settle()
        there = set(store.uploads)
        await trio.sleep(5 * HOUR)
        assert set(store.uploads) == there >= {their_id}
        left = world.writeback.multiparts.left()
        assert {upload.upload_id for upload in left.kept} == there
        assert metrics.LEFT_UPLOADS.values["kept"] == before + len(there)
        for upload_id in there:
            await store.abort_multipart(KEY, upload_id)
        await trio.sleep(2 * HOUR)
        assert world.writeback.multiparts.left() == multipart_uploads.Left(0, 0, [])
        assert world.journal.intents() == []


async def test_requests_that_did_not_reach_a_store_that_is_away_are_forgotten(
    faults: FaultStore, store: FakeStore, tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with mounted(faults, tmp_path) as world:
        await world.write("big", BIG)
        faults.down = True
        await trio.sleep(2 * HOUR)
        assert len(world.journal.intents()) <= multipart_uploads.BEGIN_TRIES
        faults.down = False
        await world.settle()
        assert stored(store, "big") == BIG
        await trio.sleep(HOUR)
        assert world.journal.intents() == []
        assert not store.uploads


async def test_a_store_that_lets_nobody_list_uploads_takes_them_all_the_same(
    faults: FaultStore, store: FakeStore, tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with mounted(faults, tmp_path) as world:
        faults.fail("uploads_of", AccessDenied("list multipart", KEY), count=10**6)
        faults.fail("create_multipart", StoreUnavailable("create", KEY), count=10)
        await world.write("big", BIG)
        await world.settle()
        assert stored(store, "big") == BIG
        assert world.writeback.multiparts.left().intents


async def test_a_renamed_file_too_big_for_one_copy(
    faults: FaultStore, store: FakeStore, tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "COPY_BYTES_MAX", MIB)
    store.seed(PREFIX + "big", BIG)
    async with mounted(faults, tmp_path) as world:
        faults.fail("upload_part_copy")
        faults.fail("abort_multipart")
        await world.vfs.rename(1, b"big", 1, b"new", 0)
        await world.settle()
        assert stored(store, "new") == BIG
        assert store.requests["copy"] == 0
        await trio.sleep(60)
        assert not store.uploads
    async with mounted(faults, tmp_path) as world:
        await world.vfs.rename(1, b"new", 1, b"newer", 0)
        part = faults.hold("upload_part_copy")
        await part.entered.wait()
        assert len(world.journal.uploads()) == 1


async def test_finishing_tries_once_more(
    faults: FaultStore, store: FakeStore, tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with mounted(faults, tmp_path) as world:
        faults.fail("upload_part")
        faults.fail("abort_multipart", count=1000)
        await world.write("big", BIG)
        await world.settle()
        assert not await world.writeback.multiparts.finish()
        assert store.uploads
        faults.clear()
        assert await world.writeback.multiparts.finish()
        assert not store.uploads


def test_a_journal_of_a_version_without_intents(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "volume")
    journal.put_upload("id", KEY)
    journal.close()
    with sqlite3.connect(tmp_path / "journal.db") as db:
        db.execute("DROP TABLE intent")
    journal = Journal(tmp_path, "volume")
    assert (journal.uploads(), journal.intents()) == ([("id", KEY)], [])
    journal.drop_upload("id")
    journal.close()
    with sqlite3.connect(tmp_path / "journal.db") as db:
        db.execute("DROP TABLE intent")
    assert Journal.is_idle(tmp_path)

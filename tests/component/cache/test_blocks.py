"""What readers of a block cache get, when, and with which requests."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from phfs_fuse.cache.block_cache import BlockCache
from phfs_fuse.cache.disk import on_thread
from phfs_fuse.errors import BadAnswer, NotFound, PhfsError, StaleVersion, StoreUnavailable, VersionChanged
from phfs_fuse.extents import Extent
from phfs_fuse.store.base import Sink
from phfs_fuse.types import KIB, MIB, ETag, ObjectKey
from tests.component.cache.samples import DATA, SIZE, StepStore
from tests.support.caches import BLOCK, KEY, RangeStore, content, running
from tests.support.fault_store import FaultStore


@pytest.mark.parametrize(
    ("start", "end"),
    [
        (0, SIZE),
        (0, 1),
        (5, 5),
        (BLOCK - 1, BLOCK + 1),
        (BLOCK, 2 * BLOCK),
        (SIZE - 1, SIZE),
        (SIZE - 1, SIZE + 10 * BLOCK),
        (SIZE, SIZE + 1),
        (SIZE + 5, SIZE + 9),
    ],
)
async def test_a_read_gives_the_bytes_up_to_the_size(tmp_path: Path, store: RangeStore, start: int, end: int) -> None:
    async with running(store, tmp_path) as cache:
        version = store.open(cache)
        assert await version.read(start, end) == DATA[start:end]
        assert version.read_now(start, end) == DATA[start:end]
        version.close()
        assert store.requests["get"] == (1 if start < min(end, SIZE) else 0)


async def test_what_a_read_gave_stays_while_others_are_answered_at_once(tmp_path: Path, store: RangeStore) -> None:
    async with running(store, tmp_path) as cache:
        version = store.open(cache)
        await version.read(0, SIZE)
        first = await version.read(0, 10)
        at_once = version.read_now(0, 10)
        assert at_once == DATA[:10]
        assert version.read_now(10, 20) == DATA[10:20]
        assert first == DATA[:10]
        assert version.read_now(0, SIZE) == DATA
        version.close()


async def test_nothing_is_there_at_once_before_it_was_read(tmp_path: Path, store: RangeStore) -> None:
    async with running(store, tmp_path) as cache:
        version = store.open(cache)
        assert version.read_now(0, 10) is None
        assert store.requests["get"] == 0
        await version.read(0, 10)
        assert version.read_now(0, 10) == DATA[:10]
        assert version.read_now(0, SIZE) is None
        version.close()


async def test_an_empty_version_needs_no_request(tmp_path: Path, store: RangeStore) -> None:
    store.seed(KEY, b"")
    async with running(store, tmp_path) as cache:
        version = store.open(cache)
        assert version.read_now(0, 10) == b""
        assert await version.read(0, 10) == b""
        version.close()
        assert store.requests["get"] == 0


async def test_an_open_version_is_one_for_all(tmp_path: Path, store: RangeStore) -> None:
    async with running(store, tmp_path) as cache:
        first, second = store.open(cache), store.open(cache)
        assert first is second
        assert (first.file.key, first.size) == (KEY, SIZE)
        first.close()
        assert await second.read(0, SIZE) == DATA
        second.close()
        assert cache.usage().open_versions == 0


async def test_many_readers_share_one_request(tmp_path: Path, store: RangeStore) -> None:
    faults = FaultStore(store)
    gate = faults.hold("get")
    async with running(faults, tmp_path) as cache:
        version = store.open(cache)
        got: list[bytes] = []

        async def read() -> None:
            got.append(bytes(await version.read(0, BLOCK)))

        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(read)
            await wait_all_tasks_blocked()
            gate.open.set()
        assert got == [DATA[:BLOCK]] * 10
        assert store.requests["get"] == 1
        version.close()


async def test_the_first_bytes_do_not_wait_for_the_rest(tmp_path: Path) -> None:
    store = StepStore()
    store.seed(KEY, DATA)
    async with running(store, tmp_path) as cache:
        version = store.open(cache)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(version.read, 0, 4 * BLOCK)
            await wait_all_tasks_blocked()
            await store.send.send(True)
            with trio.fail_after(5):
                assert await version.read(0, BLOCK) == DATA[:BLOCK]
            assert version.read_now(0, 4 * BLOCK) is None
            for _ in range(3):
                await store.send.send(True)
        assert store.asked == [(0, 4 * BLOCK)]
        version.close()


async def test_a_sequential_read_is_few_requests(tmp_path: Path, store: RangeStore) -> None:
    data = content(8 * MIB)
    store.seed(KEY, data)
    async with running(store, tmp_path) as cache:
        version = store.open(cache)
        for at in range(0, len(data), 32 * KIB):
            assert (version.read_now(at, at + 32 * KIB) or await version.read(at, at + 32 * KIB)) == data[
                at : at + 32 * KIB
            ]
            await wait_all_tasks_blocked()
        version.close()
    assert store.asked[0] == (0, 32 * KIB)
    assert len(store.asked) <= 30
    assert sum(end - start for start, end in store.asked) == len(data)


async def test_what_is_read_ahead_is_there_at_once(tmp_path: Path, store: RangeStore) -> None:
    store.seed(KEY, data := content(MIB))
    async with running(store, tmp_path) as cache:
        version = store.open(cache)
        await version.read(0, 32 * KIB)
        await version.read(32 * KIB, 64 * KIB)
        await wait_all_tasks_blocked()
        assert version.read_now(64 * KIB, 96 * KIB) == data[64 * KIB : 96 * KIB]
        version.close()


async def test_random_reads_ask_for_their_blocks_alone(tmp_path: Path, store: RangeStore) -> None:
    store.seed(KEY, data := content(8 * MIB))
    source = random.Random(3)
    places = [source.randrange(len(data) - 100) for _ in range(100)]
    async with running(store, tmp_path) as cache:
        version = store.open(cache)
        for at in places:
            assert await version.read(at, at + 100) == data[at : at + 100]
        version.close()
    assert all(end - start <= 3 * BLOCK for start, end in store.asked)
    assert not overlapping(store.asked)


def overlapping(asked: list[Extent]) -> bool:
    ordered = sorted(asked)
    return any(a[1] > b[0] for a, b in pairwise(ordered))


async def test_a_hole_between_blocks_that_are_there_is_filled(tmp_path: Path, store: RangeStore) -> None:
    async with running(store, tmp_path) as cache:
        version = store.open(cache)
        await version.read(0, BLOCK)
        await version.read(5 * BLOCK, 6 * BLOCK)
        assert await version.read(0, SIZE) == DATA
        version.close()
    assert not overlapping(store.asked)
    assert sum(end - start for start, end in store.asked) == SIZE


# -- errors


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (StoreUnavailable("get", KEY, "away"), StoreUnavailable),
        (VersionChanged("get", KEY, "gone"), StaleVersion),
        (NotFound("get", KEY, "gone"), StaleVersion),
        (RuntimeError("a bug"), StoreUnavailable),
    ],
)
async def test_a_failed_request_fails_its_readers_and_no_more(
    tmp_path: Path, store: RangeStore, error: Exception, expected: type[PhfsError]
) -> None:
    faults = FaultStore(store)
    faults.fail("get", error)
    async with running(faults, tmp_path) as cache:
        version = store.open(cache)
        errors: list[Exception] = []

        async def read() -> None:
            with pytest.raises(expected) as caught:
                await version.read(0, BLOCK)
            errors.append(caught.value)

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(read)
        assert len({id(error) for error in errors}) == 3
        assert await version.read(0, BLOCK) == DATA[:BLOCK]
        version.close()


@pytest.mark.parametrize("nth", range(1, 6))
async def test_every_request_may_fail_once(tmp_path: Path, store: RangeStore, nth: int) -> None:
    store.seed(KEY, data := content(MIB))
    faults = FaultStore(store)
    faults.fail("get", nth=nth)
    failed = 0
    async with running(faults, tmp_path) as cache:
        version = store.open(cache)
        for at in range(0, len(data), 16 * KIB):
            try:
                got = await version.read(at, at + 16 * KIB)
            except StoreUnavailable:
                failed += 1
                got = await version.read(at, at + 16 * KIB)
            assert got == data[at : at + 16 * KIB]
        assert await version.read(0, len(data)) == data
        version.close()
    assert failed <= 1


async def test_what_came_before_the_failure_is_kept(tmp_path: Path, store: RangeStore) -> None:
    faults = FaultStore(store)
    faults.cut(3 * BLOCK + 5)
    async with running(faults, tmp_path) as cache:
        version = store.open(cache)
        with pytest.raises(StoreUnavailable):
            await version.read(0, 8 * BLOCK)
        assert version.read_now(0, 3 * BLOCK) == DATA[: 3 * BLOCK]
        assert await version.read(0, 8 * BLOCK) == DATA[: 8 * BLOCK]
        version.close()
    assert store.asked[1:] == [(3 * BLOCK, 8 * BLOCK)]


class ShortStore(RangeStore):
    async def get(self, key: ObjectKey, start: int, end: int, *, etag: ETag | None, sink: Sink) -> None:
        await super().get(key, start, end - 1, etag=etag, sink=sink)


async def test_an_answer_that_is_too_short_is_an_error(tmp_path: Path) -> None:
    store = ShortStore()
    store.seed(KEY, DATA)
    async with running(store, tmp_path) as cache:
        version = store.open(cache)
        with pytest.raises(BadAnswer):
            await version.read(0, 2 * BLOCK)
        version.close()


async def test_a_version_that_is_replaced_is_stale(tmp_path: Path, store: RangeStore) -> None:
    async with running(store, tmp_path) as cache:
        old = store.open(cache)
        await old.read(0, BLOCK)
        store.seed(KEY, b"new")
        assert await old.read(0, BLOCK) == DATA[:BLOCK]
        with pytest.raises(StaleVersion):
            await old.read(5 * BLOCK, 6 * BLOCK)
        new = store.open(cache)
        assert await new.read(0, 10) == b"new"
        old.close()
        new.close()


async def test_a_reader_that_gives_up_leaves_the_request_to_others(tmp_path: Path, store: RangeStore) -> None:
    faults = FaultStore(store)
    gate = faults.hold("get")
    async with running(faults, tmp_path) as cache:
        version = store.open(cache)
        got: list[bytes] = []

        async def read() -> None:
            got.append(bytes(await version.read(0, BLOCK)))

        async with trio.open_nursery() as nursery:
            impatient = trio.CancelScope()

            async def give_up() -> None:
                with impatient:
                    await version.read(0, BLOCK)

            nursery.start_soon(give_up)
            await wait_all_tasks_blocked()
            nursery.start_soon(read)
            await wait_all_tasks_blocked()
            impatient.cancel()
            await wait_all_tasks_blocked()
            gate.open.set()
        assert got == [DATA[:BLOCK]]
        assert store.requests["get"] == 1
        version.close()


async def test_the_last_close_ends_what_is_on_its_way(tmp_path: Path, store: RangeStore) -> None:
    store.seed(KEY, data := content(MIB))
    faults = FaultStore(store)
    async with running(faults, tmp_path) as cache:
        version = store.open(cache)
        await version.read(0, BLOCK)
        gate = faults.hold("get", nth=2)
        await version.read(BLOCK, 2 * BLOCK)
        version.read_now(2 * BLOCK, 3 * BLOCK)
        await gate.entered.wait()
        version.close()
        await wait_all_tasks_blocked()
        before = len(store.asked)
        gate.open.set()
        await wait_all_tasks_blocked()
        assert len(store.asked) == before
        again = store.open(cache)
        assert await again.read(0, len(data)) == data
        again.close()


async def test_a_cache_that_does_not_run_says_so(tmp_path: Path, store: RangeStore) -> None:
    async with running(store, tmp_path) as cache:
        version = store.open(cache)
    with pytest.raises(StoreUnavailable):
        await version.read(0, 10)


class LateStore(RangeStore):
    """Goes on calling the sink after its caller was cancelled, as a thread does that nobody can stop."""

    def __init__(self) -> None:
        super().__init__()
        self.threads: list[Callable[[], None]] = []

    async def get(self, key: ObjectKey, start: int, end: int, *, etag: ETag | None, sink: Sink) -> None:
        wrong = bytes(end - start)
        self.threads.append(lambda: sink(start, wrong))
        await trio.sleep_forever()


async def test_a_sink_that_is_called_too_late_writes_nothing(tmp_path: Path) -> None:
    late, store = LateStore(), RangeStore()
    for each in (late, store):
        each.seed(KEY, DATA)
    async with running(late, tmp_path) as cache:
        version = late.open(cache)
        with trio.move_on_after(0):
            await version.read(0, SIZE)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(version.read, 0, SIZE)
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        version.close()
        await wait_all_tasks_blocked()
        decoys = [os.open(tmp_path / f"decoy{at}", os.O_RDWR | os.O_CREAT) for at in range(5)]
        for call in late.threads:
            call()
        assert late.threads
        assert [os.fstat(fd).st_size for fd in decoys] == [0] * 5
        for fd in decoys:
            os.close(fd)


# -- real threads


class ThreadStore(RangeStore):
    """Calls the sink on threads of its own, in odd pieces."""

    async def get(self, key: ObjectKey, start: int, end: int, *, etag: ETag | None, sink: Sink) -> None:
        self.asked.append((start, end))
        data = self.data(key)
        pieces = random.Random(start)

        def send() -> None:
            at = start
            while at < end:
                stop = min(end, at + pieces.randrange(1, 3 * BLOCK))
                sink(at, memoryview(data)[at:stop])
                at = stop

        done = trio.Event()
        token = trio.lowlevel.current_trio_token()
        thread = threading.Thread(target=lambda: (send(), token.run_sync_soon(done.set)))
        thread.start()
        try:
            await done.wait()
        finally:
            thread.join()


async def read_at_random(cache: BlockCache, store: RangeStore, seed: int) -> None:
    source = random.Random(seed)
    for _ in range(30):
        version = store.open(cache)
        at = source.randrange(0, version.size)
        for _ in range(source.randrange(1, 10)):
            end = at + source.randrange(1, 5 * BLOCK)
            assert await version.read(at, end) == store.data(KEY)[at:end]
            at = end
        version.close()


async def test_many_readers_with_real_threads(tmp_path: Path) -> None:
    store = ThreadStore()
    store.seed(KEY, content(2 * MIB + 1))
    async with running(store, tmp_path, run_sync=on_thread) as cache:
        kept = store.open(cache)
        async with trio.open_nursery() as nursery:
            for seed in range(8):
                nursery.start_soon(read_at_random, cache, store, seed)
        assert await kept.read(0, kept.size) == store.data(KEY)
        kept.close()
    assert not overlapping(store.asked)


async def test_bytes_are_put_into_another_file(tmp_path: Path, store: RangeStore) -> None:
    store.seed(KEY, data := content(3 * MIB))
    fd = os.open(tmp_path / "other", os.O_RDWR | os.O_CREAT)
    async with running(store, tmp_path / "cache") as cache:
        version = store.open(cache)
        await version.copy_to(fd, 100, 200)
        await version.copy_to(fd, MIB - 5, 3 * MIB + 100)
        version.close()
    found = os.pread(fd, 4 * MIB, 0)
    os.close(fd)
    assert found == bytes(100) + data[100:200] + bytes(MIB - 205) + data[MIB - 5 :]

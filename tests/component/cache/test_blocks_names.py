"""Blocks under a new name, and blocks of names that are gone."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from phfs_fuse.types import ETag
from tests.component.cache.samples import DATA, OTHER, SIZE, files, read_all
from tests.support.caches import BLOCK, KEY, RangeStore, running
from tests.support.fault_store import FaultStore


@pytest.mark.parametrize("is_open", [True, False])
async def test_renamed_bytes_stay_cached(tmp_path: Path, store: RangeStore, is_open: bool) -> None:
    old = store.objects[KEY].etag
    async with running(store, tmp_path) as cache:
        kept = store.open(cache)
        await kept.read(0, 5 * BLOCK)
        if not is_open:
            kept.close()
        new = store.seed(OTHER, DATA)
        del store.objects[KEY]
        cache.rekey(KEY, old, OTHER, new)
        store.asked.clear()
        if is_open:
            assert (kept.file.key, kept.file.etag) == (OTHER, new)
            assert kept.read_now(0, 5 * BLOCK) == DATA[: 5 * BLOCK]
            assert await kept.read(5 * BLOCK, SIZE) == DATA[5 * BLOCK :]
            kept.close()
        assert await read_all(cache, store, OTHER) == DATA
        assert sum(end - start for start, end in store.asked) == SIZE - 5 * BLOCK
    async with running(store, tmp_path) as cache:
        assert await read_all(cache, store, OTHER) == DATA
        assert sum(end - start for start, end in store.asked) == SIZE - 5 * BLOCK


async def test_a_read_under_the_old_name_goes_on_under_the_new_one(tmp_path: Path, store: RangeStore) -> None:
    faults = FaultStore(store)
    gate = faults.hold("get")
    old = store.objects[KEY].etag
    async with running(faults, tmp_path) as cache:
        kept = store.open(cache)
        got: list[bytes] = []

        async def read() -> None:
            got.append(bytes(await kept.read(0, SIZE)))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await gate.entered.wait()
            new = store.seed(OTHER, DATA)
            del store.objects[KEY]
            cache.rekey(KEY, old, OTHER, new)
            gate.open.set()
        assert got == [DATA]
        kept.close()


@pytest.mark.parametrize("new_is_open", [True, False])
async def test_a_new_name_that_has_blocks_already(tmp_path: Path, store: RangeStore, new_is_open: bool) -> None:
    old, new = store.objects[KEY].etag, store.seed(OTHER, DATA)
    async with running(store, tmp_path) as cache:
        first, second = store.open(cache), store.open(cache, OTHER)
        await first.read(0, BLOCK)
        await second.read(0, 2 * BLOCK)
        if not new_is_open:
            second.close()
        cache.rekey(KEY, old, OTHER, new)
        del store.objects[KEY]
        assert await first.read(0, SIZE) == DATA
        assert await read_all(cache, store, OTHER) == DATA
        first.close()
        if new_is_open:
            second.close()
        await wait_all_tasks_blocked()
        assert cache.usage().open_versions == 0
        assert len(files(tmp_path)) == cache.usage().files == 1


async def test_names_that_are_not_cached_cost_nothing(tmp_path: Path, store: RangeStore) -> None:
    async with running(store, tmp_path) as cache:
        cache.rekey(KEY, ETag("a"), OTHER, ETag("b"))
        cache.rekey(KEY, ETag("a"), KEY, ETag("a"))
        cache.forget(KEY, ETag("a"))
        assert cache.usage().files == 0


@pytest.mark.parametrize("is_open", [True, False])
async def test_forgotten_bytes_leave_the_disk(tmp_path: Path, store: RangeStore, is_open: bool) -> None:
    async with running(store, tmp_path) as cache:
        kept = store.open(cache)
        await kept.read(0, SIZE)
        if not is_open:
            kept.close()
        cache.forget(KEY, store.objects[KEY].etag)
        if is_open:
            assert await kept.read(0, SIZE) == DATA
            kept.close()
        await wait_all_tasks_blocked()
        assert cache.usage().bytes == 0
        assert not files(tmp_path)

"""A block cache within its limit, and on a disk that is full."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from phfs_fuse.cache import file_format
from phfs_fuse.cache.block_cache import FULL_SECONDS
from phfs_fuse.cache.block_file import USE_SECONDS
from phfs_fuse.cache.version import WINDOW_PART
from phfs_fuse.types import MIB, ObjectKey
from tests.component.cache.samples import DATA, OTHER, FullDisk, files, read_all
from tests.support.caches import KEY, RangeStore, content, running

# -- a disk that is full


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
async def test_a_full_disk_is_read_past(
    tmp_path: Path, store: RangeStore, monkeypatch: pytest.MonkeyPatch, code: int, autojump_clock: MockClock
) -> None:
    disk = FullDisk(monkeypatch, code)
    async with running(store, tmp_path) as cache:
        for _ in range(3):
            assert await read_all(cache, store) == DATA
        assert cache.usage().is_bypassed
        assert cache.usage().disk_errors
        disk.is_full = False
        await trio.sleep(60)
        assert not cache.usage().is_bypassed
        store.asked.clear()
        for _ in range(3):
            assert await read_all(cache, store) == DATA
        assert len(store.asked) == 1


async def test_a_full_disk_makes_room_by_dropping_what_is_old(
    tmp_path: Path, store: RangeStore, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    store.seed(OTHER, content(MIB))
    async with running(store, tmp_path) as cache:
        await read_all(cache, store, OTHER)
        disk = FullDisk(monkeypatch)
        assert await read_all(cache, store) == DATA
        disk.is_full = False
        await trio.sleep(FULL_SECONDS + 1)  # it may have failed once more when nothing was left to drop
        assert not cache.usage().is_bypassed
        assert cache.usage().evicted_bytes >= MIB


# -- the limit


async def test_the_least_recently_used_goes_first(tmp_path: Path, store: RangeStore) -> None:
    keys = [ObjectKey(f"groups/a/{at}") for at in range(10)]
    for at, key in enumerate(keys):
        store.seed(key, content(2 * MIB, seed=at))
    async with running(store, tmp_path, size_max=16 * MIB) as cache:
        for key in keys[:7]:
            await read_all(cache, store, key)
        await read_all(cache, store, keys[0])
        for key in keys[7:]:
            await read_all(cache, store, key)
        await wait_all_tasks_blocked()
        assert cache.usage().bytes <= 16 * MIB
        assert sum(path.stat().st_blocks * 512 for path in files(tmp_path)) == cache.usage().bytes
        store.asked.clear()
        for key in (keys[0], *keys[6:]):
            await read_all(cache, store, key)
        assert not store.asked
        await read_all(cache, store, keys[1])
        assert store.asked


async def test_the_order_of_use_outlives_the_process(tmp_path: Path, store: RangeStore) -> None:
    keys = [ObjectKey(f"groups/a/{at}") for at in range(10)]
    for at, key in enumerate(keys):
        store.seed(key, content(2 * MIB, seed=at))
    async with running(store, tmp_path) as cache:
        for key in keys:
            await read_all(cache, store, key)
        for file in files(tmp_path):
            used_at = file.stat().st_mtime - 2 * USE_SECONDS
            os.utime(file, (used_at, used_at))
        await read_all(cache, store, keys[0])
    async with running(store, tmp_path, size_max=16 * MIB) as cache:
        assert cache.usage().bytes <= 16 * MIB
        store.asked.clear()
        await read_all(cache, store, keys[0])
        await read_all(cache, store, keys[9])
        assert not store.asked
        await read_all(cache, store, keys[1])
        assert store.asked


async def test_a_reader_has_no_more_of_a_small_cache_than_its_part(tmp_path: Path, store: RangeStore) -> None:
    store.seed(KEY, content(48 * MIB))
    async with running(store, tmp_path, size_max=64 * MIB, window_bytes_max=64 * MIB) as cache:
        version = store.open(cache)
        for at in range(0, 24 * MIB, MIB):
            await version.read(at, at + MIB)
            await wait_all_tasks_blocked()
            assert max(end for _, end in store.asked) <= at + MIB + 64 * MIB // WINDOW_PART
        version.close()
    assert max(end for _, end in store.asked) > 24 * MIB


async def test_an_open_version_bigger_than_the_cache_stays_within_it(tmp_path: Path, store: RangeStore) -> None:
    store.seed(KEY, data := content(24 * MIB))
    async with running(store, tmp_path, size_max=16 * MIB) as cache:
        kept = store.open(cache)
        for at_end in (False, True):
            for at in range(0, len(data), MIB):
                assert await kept.read(at, at + MIB) == data[at : at + MIB]
                await wait_all_tasks_blocked()
                assert cache.usage().bytes <= 18 * MIB
            if not at_end:
                assert sum(end - start for start, end in store.asked) == len(data)  # none of it twice
        assert cache.usage().evicted_bytes > 24 * MIB
        kept.close()
    assert sum(path.stat().st_blocks * 512 for path in files(tmp_path)) <= 17 * MIB


async def test_a_file_system_without_holes_begins_again(
    tmp_path: Path, store: RangeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_holes(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "no holes")

    monkeypatch.setattr(file_format, "drop", no_holes)
    store.seed(KEY, data := content(24 * MIB))
    async with running(store, tmp_path, size_max=16 * MIB) as cache:
        kept = store.open(cache)
        for at in range(0, len(data), MIB):
            assert await kept.read(at, at + MIB) == data[at : at + MIB]
            await wait_all_tasks_blocked()
            assert cache.usage().bytes <= 18 * MIB
        kept.close()

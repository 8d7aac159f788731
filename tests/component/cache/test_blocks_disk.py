"""What a block cache leaves on disk, and finds there of earlier processes, whole or damaged."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from phfs_fuse.cache import disk as cachedisk
from phfs_fuse.cache import file_format
from phfs_fuse.cache.block_cache import BlockCache
from phfs_fuse.config.model import CacheConfig
from phfs_fuse.errors import LocalStateError
from phfs_fuse.types import ObjectKey
from tests.component.cache.samples import DAMAGE, DATA, OTHER, SIZE, StepStore, files, flip, read_all
from tests.support.caches import BLOCK, KEY, RangeStore, content, running

# -- the directory


async def test_everything_is_private(tmp_path: Path, store: RangeStore) -> None:
    async with running(store, tmp_path / "cache") as cache:
        await read_all(cache, store)
    for path in [tmp_path / "cache", *(tmp_path / "cache").rglob("*")]:
        assert path.stat().st_mode & 0o077 in ((0,) if path.is_dir() or path.parent.name != "cache" else (0, 0o44))
    assert len(files(tmp_path / "cache")) == 1


def test_a_second_cache_on_the_directory_is_refused(tmp_path: Path, store: RangeStore) -> None:
    config = CacheConfig(directory=tmp_path)
    first = BlockCache(store, config)
    with pytest.raises(LocalStateError, match="in use by another mount"):
        BlockCache(store, config)
    first.close()
    BlockCache(store, config).close()


def test_a_newer_format_is_refused_with_the_remedy(tmp_path: Path, store: RangeStore) -> None:
    (tmp_path / "format").write_text("2\n")
    with pytest.raises(LocalStateError, match="delete the directory"):
        BlockCache(store, CacheConfig(directory=tmp_path))
    (tmp_path / "format").unlink()
    BlockCache(store, CacheConfig(directory=tmp_path)).close()


def test_a_directory_that_cannot_be_made_is_refused(tmp_path: Path, store: RangeStore) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LocalStateError, match="--cache-dir"):
        BlockCache(store, CacheConfig(directory=tmp_path / "file" / "cache"))


# -- what earlier processes left


async def test_blocks_outlive_the_process(tmp_path: Path, store: RangeStore) -> None:
    async with running(store, tmp_path) as cache:
        kept = store.open(cache)
        await kept.read(0, BLOCK)
        await kept.read(5 * BLOCK, SIZE)
        kept.close()
    store.asked.clear()
    async with running(store, tmp_path) as cache:
        assert cache.usage().files == 1
        again = store.open(cache)
        assert again.read_now(0, BLOCK) is None  # not before its checksum was compared
        assert await again.read(0, BLOCK) == DATA[:BLOCK]
        assert await again.read(5 * BLOCK, SIZE) == DATA[5 * BLOCK :]
        assert again.read_now(5 * BLOCK, SIZE) == DATA[5 * BLOCK :]
        assert not store.asked
        assert await again.read(0, SIZE) == DATA
        assert store.asked == [(BLOCK, 5 * BLOCK)]
        again.close()


async def test_a_version_that_is_opened_again_is_not_checked_again(tmp_path: Path, store: RangeStore) -> None:
    async with running(store, tmp_path) as cache:
        await read_all(cache, store)
        again = store.open(cache)
        again.close()
        verified: list[int] = []
        original = file_format.verify
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(file_format, "verify", lambda *args: (verified.append(1), original(*args))[1])
            assert await read_all(cache, store) == DATA
        assert not verified
        assert store.requests["get"] == 1


async def test_another_block_size_or_version_has_its_own_blocks(tmp_path: Path, store: RangeStore) -> None:
    async with running(store, tmp_path) as cache:
        await read_all(cache, store)
    async with running(store, tmp_path, block_bytes=2 * BLOCK) as cache:
        assert await read_all(cache, store) == DATA
        store.seed(KEY, changed := content(SIZE, seed=2))
        assert await read_all(cache, store) == changed
    assert len(files(tmp_path)) == 3


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
async def test_damage_is_fetched_again(tmp_path: Path, store: RangeStore, damage: Callable[[Path], object]) -> None:
    async with running(store, tmp_path) as cache:
        await read_all(cache, store)
    damage(files(tmp_path)[0])
    async with running(store, tmp_path) as cache:
        assert await read_all(cache, store) == DATA
        assert store.requests["get"] > 1


async def test_only_the_damaged_block_is_fetched(tmp_path: Path, store: RangeStore) -> None:
    async with running(store, tmp_path) as cache:
        await read_all(cache, store)
    flip(files(tmp_path)[0])
    store.asked.clear()
    async with running(store, tmp_path) as cache:
        assert await read_all(cache, store) == DATA
        assert cache.usage().damaged_bytes == BLOCK
    assert store.asked == [(3 * BLOCK, 4 * BLOCK)]


@pytest.mark.parametrize("when_open", [True, False])
async def test_the_directory_may_vanish_under_us(tmp_path: Path, store: RangeStore, when_open: bool) -> None:
    async with running(store, tmp_path / "cache") as cache:
        kept = store.open(cache)
        await kept.read(0, 2 * BLOCK)
        if not when_open:
            kept.close()
        shutil.rmtree(tmp_path / "cache")
        if not when_open:
            kept = store.open(cache)
        assert await kept.read(0, SIZE) == DATA
        kept.close()
        assert await read_all(cache, store) == DATA
        await read_all(cache, store)
        assert files(tmp_path / "cache")


@pytest.mark.parametrize("length", [0, BLOCK + 5, SIZE - 1])
async def test_a_file_that_is_shortened_while_open_is_fetched_again(
    tmp_path: Path, store: RangeStore, length: int
) -> None:
    async with running(store, tmp_path) as cache:
        kept = store.open(cache)
        await kept.read(0, 8 * BLOCK)
        os.truncate(files(tmp_path)[0], length)
        assert await kept.read(8 * BLOCK, SIZE) == DATA[8 * BLOCK :]
        assert await kept.read(0, SIZE) == DATA
        os.truncate(files(tmp_path)[0], length)
        assert await kept.read(0, SIZE) == DATA
        kept.close()


def open_files(directory: Path) -> int:
    links = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
    return sum(Path(link).parent.parent == directory for link in links)


async def test_few_files_are_open_at_a_time(
    tmp_path: Path, store: RangeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cachedisk, "FILES_OPEN_MAX", 4)
    keys = [ObjectKey(f"groups/a/{at}") for at in range(20)]
    for at, key in enumerate(keys):
        store.seed(key, content(3 * BLOCK, seed=at))
    async with running(store, tmp_path) as cache:
        kept = [store.open(cache, key) for key in keys]
        for _ in range(2):
            for at, each in enumerate(kept):
                assert await each.read(0, 3 * BLOCK) == content(3 * BLOCK, seed=at)
        assert open_files(tmp_path) == 4
        assert store.requests["get"] == len(keys)
        for each in kept:
            each.close()


async def test_a_new_file_is_not_taken_for_the_one_that_was_whole(
    tmp_path: Path, store: RangeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even if it got the same inode number."""
    monkeypatch.setattr(cachedisk, "FILES_OPEN_MAX", 1)
    store.seed(OTHER, content(BLOCK))
    async with running(store, tmp_path) as cache:
        await read_all(cache, store)
        files(tmp_path)[0].unlink()
        kept = store.open(cache)
        await kept.read(0, BLOCK)
        await read_all(cache, store, OTHER)  # closes the file of the first
        assert await kept.read(0, SIZE) == DATA
        kept.close()


async def test_what_goes_into_a_file_that_was_deleted_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cachedisk, "FILES_OPEN_MAX", 1)
    store = StepStore()
    store.seed(KEY, DATA)
    store.seed(OTHER, content(BLOCK))
    for _ in range(40):
        store.send.send_nowait(True)
    async with running(store, tmp_path) as cache:
        await read_all(cache, store, OTHER)
        for _ in range(39):
            store._steps.receive_nowait()
        kept = store.open(cache)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(kept.read, 0, 4 * BLOCK)
            await wait_all_tasks_blocked()
            shutil.rmtree(tmp_path / kept.name[:2])
            other = store.open(cache, OTHER)
            nursery.start_soon(other.read, 0, BLOCK)  # closes the file of the first
            nursery.start_soon(kept.read, 5 * BLOCK, 6 * BLOCK)  # makes a new one
            await wait_all_tasks_blocked()
            for _ in range(40):
                store.send.send_nowait(True)
        assert await kept.read(0, 6 * BLOCK) == DATA[: 6 * BLOCK]
        kept.close()
        other.close()

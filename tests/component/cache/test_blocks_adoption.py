"""Local files that were uploaded become blocks of the new version, without a download."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from trio.testing import wait_all_tasks_blocked

from phfs_fuse.extents import Extents
from phfs_fuse.types import MIB
from tests.component.cache.samples import DATA, OTHER, SIZE, Change, FullDisk, files, read_all, staged
from tests.support.caches import BLOCK, KEY, RangeStore, content, running


@pytest.mark.parametrize("size", [0, 1, BLOCK, SIZE, MIB + 1])
async def test_an_uploaded_file_needs_no_download(tmp_path: Path, store: RangeStore, size: int) -> None:
    data = content(size, seed=4)
    etag = store.seed(OTHER, data)
    async with running(store, tmp_path / "cache") as cache:
        cache.adopt(OTHER, etag, size, staged(tmp_path, data), Extents([(0, size)]))
        assert await read_all(cache, store, OTHER) == data
        await wait_all_tasks_blocked()
        assert cache.usage().open_versions == 0
    async with running(store, tmp_path / "cache") as cache:
        assert await read_all(cache, store, OTHER) == data
    assert not store.asked


@pytest.mark.parametrize("moved", [True, False])
async def test_of_a_sparse_file_only_what_is_covered_counts(
    tmp_path: Path, store: RangeStore, monkeypatch: pytest.MonkeyPatch, moved: bool
) -> None:
    path = staged(tmp_path, bytes(2 * BLOCK - 1) + DATA[2 * BLOCK - 1 : 5 * BLOCK + 1] + bytes(9 * BLOCK))
    if not moved:
        refuse_renames(monkeypatch)
    async with running(store, tmp_path / "cache") as cache:
        etag = store.objects[KEY].etag
        cache.adopt(KEY, etag, SIZE, path, Extents([(2 * BLOCK - 1, 5 * BLOCK + 1)]))
        assert await read_all(cache, store) == DATA
    assert store.asked == [(0, 2 * BLOCK), (5 * BLOCK, SIZE)]


def refuse_renames(patch: pytest.MonkeyPatch) -> None:
    def rename(source: str, target: str) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    patch.setattr(os, "rename", rename)


@pytest.fixture
def other_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on another file system."""
    shm = Path("/dev/shm")
    if not os.access(shm, os.W_OK) or shm.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("/dev/shm is no other file system that can be written")
    with tempfile.TemporaryDirectory(dir=shm) as path:
        yield Path(path)


@pytest.mark.parametrize("size", [SIZE, MIB])
async def test_a_file_on_another_file_system_is_copied(
    tmp_path: Path, other_disk: Path, store: RangeStore, size: int
) -> None:
    data = content(size, seed=4)
    etag = store.seed(OTHER, data)
    async with running(store, tmp_path / "cache") as cache:
        path = staged(other_disk, data)
        cache.adopt(OTHER, etag, size, path, Extents([(0, size)]))
        path.unlink()
        assert await read_all(cache, store, OTHER) == data
    async with running(store, tmp_path / "cache") as cache:
        assert await read_all(cache, store, OTHER) == data
    assert not store.asked


@pytest.mark.parametrize("size", [SIZE, MIB])
async def test_a_version_that_is_open_takes_what_it_lacks(tmp_path: Path, store: RangeStore, size: int) -> None:
    data = content(size, seed=4)
    etag = store.seed(KEY, data)
    async with running(store, tmp_path / "cache") as cache:
        kept = store.open(cache)
        await kept.read(BLOCK, 2 * BLOCK)
        path = staged(tmp_path, data)
        cache.adopt(KEY, etag, size, path, Extents([(0, size)]))
        path.unlink(missing_ok=True)
        assert await kept.read(0, size) == data
        kept.close()
    assert store.asked == [(BLOCK, 2 * BLOCK)]


async def test_a_local_file_that_is_gone_is_no_error(tmp_path: Path, store: RangeStore) -> None:
    async with running(store, tmp_path / "cache") as cache:
        cache.adopt(KEY, store.objects[KEY].etag, SIZE, tmp_path / "gone", Extents([(0, SIZE)]))
        assert await read_all(cache, store) == DATA


async def test_a_local_file_on_a_full_disk_is_fetched_when_needed(
    tmp_path: Path, store: RangeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    FullDisk(monkeypatch)
    async with running(store, tmp_path / "cache") as cache:
        cache.adopt(KEY, store.objects[KEY].etag, SIZE, staged(tmp_path, DATA), Extents([(0, SIZE)]))
        assert await read_all(cache, store) == DATA


CHANGES = {
    "in the middle": Change(DATA, SIZE, {3 * BLOCK + 5: b"x" * 10, 5 * BLOCK - 1: b"yz"}),
    "append": Change(DATA, SIZE + 3 * BLOCK, {SIZE: b"x" * 10, SIZE + BLOCK: b"y" * BLOCK}),
    "append a byte": Change(DATA, SIZE + 1, {SIZE: b"x"}),
    "cut off": Change(DATA, 5 * BLOCK + 9, {}),
    "cut off at a block": Change(DATA, 5 * BLOCK, {3: b"x"}),
    "cut to a byte": Change(DATA, 1, {}),
    "whole blocks": Change(DATA, SIZE, {2 * BLOCK: b"x" * BLOCK, 10 * BLOCK: b"y" * 100}),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
async def test_a_changed_file_keeps_the_blocks_that_did_not_change(
    tmp_path: Path, store: RangeStore, change: Change
) -> None:
    async with running(store, tmp_path / "cache") as cache:
        await read_all(cache, store)
        base = (KEY, store.objects[KEY].etag, SIZE)
        etag = store.seed(KEY, change.new)
        path = staged(tmp_path, change.local)
        cache.adopt(KEY, etag, len(change.new), path, change.covered, base=base, base_bytes=change.seen)
        path.unlink()
        assert await read_all(cache, store) == change.new
        assert len(files(tmp_path / "cache")) == cache.usage().files == 1
        assert cache.usage().open_versions == 0
    async with running(store, tmp_path / "cache") as cache:
        assert await read_all(cache, store) == change.new
    assert store.asked == [(0, SIZE)]


async def test_blocks_that_the_base_lacks_are_fetched(tmp_path: Path, store: RangeStore) -> None:
    change = Change(DATA, SIZE, {3 * BLOCK + 5: b"x" * 10, 6 * BLOCK: b"y" * BLOCK})
    async with running(store, tmp_path / "cache") as cache:
        kept = store.open(cache)
        await kept.read(0, 2 * BLOCK)
        kept.close()
        base = (KEY, store.objects[KEY].etag, SIZE)
        etag = store.seed(KEY, change.new)
        cache.adopt(KEY, etag, SIZE, staged(tmp_path, change.local), change.covered, base=base, base_bytes=SIZE)
        store.asked.clear()
        assert await read_all(cache, store) == change.new
    assert store.asked == [(2 * BLOCK, 6 * BLOCK), (7 * BLOCK, SIZE)]


@pytest.mark.parametrize("trouble", ["open", "gone", "cut off", "source gone", "new version open"])
async def test_a_base_that_cannot_be_used_costs_a_download(tmp_path: Path, store: RangeStore, trouble: str) -> None:
    change = CHANGES["in the middle"]
    async with running(store, tmp_path / "cache") as cache:
        await read_all(cache, store)
        base = (KEY, store.objects[KEY].etag, SIZE)
        old, path = store.open(cache), staged(tmp_path, change.local)
        if trouble != "open":
            old.close()
        if trouble == "gone":
            files(tmp_path / "cache")[0].unlink()
        elif trouble == "cut off":
            os.truncate(files(tmp_path / "cache")[0], SIZE)
        elif trouble == "source gone":
            path.unlink()
        etag = store.seed(KEY, change.new)
        new = store.open(cache)
        if trouble == "new version open":
            await new.read(0, BLOCK)
        cache.adopt(KEY, etag, SIZE, path, change.covered, base=base, base_bytes=SIZE)
        assert await new.read(0, SIZE) == change.new
        assert await read_all(cache, store) == change.new
        if trouble == "open":
            assert await old.read(0, SIZE) == DATA
            old.close()
        new.close()
    async with running(store, tmp_path / "cache") as cache:
        assert await read_all(cache, store) == change.new

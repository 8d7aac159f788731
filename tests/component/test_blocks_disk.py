"""What a block cache leaves on disk, finds there, and makes of a disk that fails it."""

from __future__ import annotations

import errno
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from phfs_fuse import cachedisk, cachefile
from phfs_fuse.blocks import FULL_SECONDS, BlockCache
from phfs_fuse.config import CacheConfig
from phfs_fuse.errors import LocalStateError, PhfsError
from phfs_fuse.extents import Extents
from phfs_fuse.store.base import Sink
from phfs_fuse.types import MIB, ETag, ObjectKey
from tests.support.caches import BLOCK, KEY, RangeStore, content, running
from tests.support.fault_store import FaultStore

SIZE = 10 * BLOCK + 100
DATA = content(SIZE)
OTHER = ObjectKey("groups/a/other")


@pytest.fixture
def store() -> RangeStore:
    store = RangeStore()
    store.seed(KEY, DATA)
    return store


def files(directory: Path) -> list[Path]:
    """The files with blocks."""
    return sorted(path for path in directory.glob("*/*") if path.is_file())


async def read_all(cache: BlockCache, store: RangeStore, key: ObjectKey = KEY) -> bytes:
    found = store.open(cache, key)
    try:
        return bytes(await found.read(0, found.size))
    finally:
        found.close()


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
        original = cachefile.verify
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cachefile, "verify", lambda *args: (verified.append(1), original(*args))[1])
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


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[3 * BLOCK + 7] ^= 1
    path.write_bytes(data)


def noise_from(path: Path, start: int) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:start] + content(len(data[start:]), seed=9))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a flipped bit": flip,
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "noise": lambda path: path.write_bytes(content(path.stat().st_size, seed=9)),
    "noise for checksums": lambda path: noise_from(path, SIZE),
    "cut off": lambda path: os.truncate(path, 3 * BLOCK),
    "empty": lambda path: os.truncate(path, 0),
    "too long": lambda path: os.truncate(path, 100 * BLOCK),
    "gone": lambda path: path.unlink(),
    "folder gone": lambda path: shutil.rmtree(path.parent),
    "a folder in its place": lambda path: (path.unlink(), path.mkdir()),
}


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


class StepStore(RangeStore):
    """Passes on one block for each event that is sent."""

    def __init__(self) -> None:
        super().__init__()
        self.send, self._steps = trio.open_memory_channel[bool](100)

    async def get(self, key: ObjectKey, start: int, end: int, *, etag: ETag | None, sink: Sink) -> None:
        self.asked.append((start, end))
        for at in range(start, end, BLOCK):
            await self._steps.receive()
            sink(at, self.data(key)[at : min(at + BLOCK, end)])


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


# -- a disk that is full


class FullDisk:
    """Writes fail while `is_full`."""

    def __init__(self, patch: pytest.MonkeyPatch, code: int = errno.ENOSPC) -> None:
        self.is_full = True
        self._pwrite = os.pwrite
        self._code = code
        patch.setattr(cachefile.os, "pwrite", self.pwrite)

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        if self.is_full:
            raise OSError(self._code, os.strerror(self._code))
        return self._pwrite(fd, data, offset)


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
        await read_all(cache, store, keys[0])
    async with running(store, tmp_path, size_max=16 * MIB) as cache:
        assert cache.usage().bytes <= 16 * MIB
        store.asked.clear()
        await read_all(cache, store, keys[0])
        await read_all(cache, store, keys[9])
        assert not store.asked
        await read_all(cache, store, keys[1])
        assert store.asked


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

    monkeypatch.setattr(cachefile, "drop", no_holes)
    store.seed(KEY, data := content(24 * MIB))
    async with running(store, tmp_path, size_max=16 * MIB) as cache:
        kept = store.open(cache)
        for at in range(0, len(data), MIB):
            assert await kept.read(at, at + MIB) == data[at : at + MIB]
            await wait_all_tasks_blocked()
            assert cache.usage().bytes <= 18 * MIB
        kept.close()


# -- local files that become blocks


def staged(directory: Path, data: bytes, name: str = "staged") -> Path:
    path = directory / name
    path.unlink(missing_ok=True)  # the one before may still be read
    path.write_bytes(data)
    path.chmod(0o600)
    return path


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


class Change:
    """A new version made of an old one: a sparse local file over it, as write-back leaves it."""

    def __init__(self, old: bytes, size: int, writes: dict[int, bytes]) -> None:
        self.seen = min(len(old), size)
        new = bytearray(old[:size]) + bytes(max(0, size - len(old)))
        local = bytearray(size)
        self.covered = Extents([(self.seen, size)])
        for at, data in writes.items():
            new[at : at + len(data)] = local[at : at + len(data)] = data
            self.covered.add(at, at + len(data))
        self.new, self.local = bytes(new), bytes(local)


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


# -- other names


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


# -- anything at any time


class Mishaps:
    """Readers, evictions, damage and restarts in any order: always the store's bytes."""

    def __init__(self, seed: int, directory: Path) -> None:
        self.random = random.Random(seed)
        self.directory = directory
        self.store = RangeStore()
        self.faults = FaultStore(self.store)
        self.keys = [ObjectKey(f"groups/a/{at}") for at in range(6)]
        for key in self.keys:
            self.replace(key)

    def replace(self, key: ObjectKey) -> bytes:
        size = self.random.choice([0, 1, BLOCK, 10 * BLOCK + 7, 5 * MIB + 3])
        data = content(size, seed=self.random.randrange(1000))
        self.store.seed(key, data)
        return data

    async def step(self, cache: BlockCache, clean: bool) -> None:
        key = self.random.choice(self.keys)
        act = self.random.choice(
            ["read"] * 12 + ["fail", "replace", "adopt", "change", "change", "forget", "delete", "rename"]
        )
        if act == "read":
            await self.read(cache, key)
        elif act == "fail":
            self.faults.cut(self.random.randrange(3 * BLOCK), nth=1)
        elif act == "replace":
            self.replace(key)
        elif act == "adopt":
            data = self.replace(key)
            path = staged(self.directory.parent, data)
            start = self.random.randrange(len(data) + 1)
            cache.adopt(key, self.store.objects[key].etag, len(data), path, Extents([(start, len(data))]))
        elif act == "change":
            self.change(cache, key)
        elif act == "forget":
            cache.forget(key, self.store.objects[key].etag)
        elif act == "delete" and clean:
            for path in files(self.directory)[::2]:
                path.unlink()
        elif act == "rename":
            other = self.random.choice(self.keys)
            found = self.store.objects[key]
            self.store.objects[other] = found
            cache.rekey(key, found.etag, other, found.etag)

    def change(self, cache: BlockCache, key: ObjectKey) -> None:
        found = self.store.objects[key]
        size = self.random.choice([max(1, len(found.data)), self.random.randrange(1, 60 * BLOCK)])
        places = [self.random.randrange(size) for _ in range(self.random.randrange(4))]
        change = Change(found.data, size, {at: content(min(100, size - at), seed=at) for at in places})
        base = (key, found.etag, len(found.data))
        etag = self.store.seed(key, change.new)
        path = staged(self.directory.parent, change.local)
        cache.adopt(key, etag, size, path, change.covered, base=base, base_bytes=change.seen)

    async def read(self, cache: BlockCache, key: ObjectKey) -> None:
        opened = self.store.open(cache, key)
        data = self.store.data(key)
        at = self.random.randrange(len(data) + 1)
        try:
            for _ in range(self.random.randrange(1, 12)):
                end = at + self.random.choice([1, 100, BLOCK, 50 * BLOCK])
                with suppress(PhfsError):  # by "fail"
                    assert await opened.read(at, end) == data[at:end]
                at = end if self.random.random() < 0.8 else self.random.randrange(len(data) + 1)
        finally:
            opened.close()

    def damage(self) -> None:
        for path in files(self.directory):
            with suppress(IndexError):
                if self.random.random() < 0.3:
                    self.random.choice(list(DAMAGE.values())[:7])(path)


@pytest.mark.parametrize("seed", range(8))
async def test_whatever_happens_readers_get_the_bytes_of_the_store(tmp_path: Path, seed: int) -> None:
    mishaps = Mishaps(seed, tmp_path / "cache")
    for _ in range(4):
        async with running(mishaps.faults, tmp_path / "cache", size_max=16 * MIB) as cache:
            for _ in range(40):
                await mishaps.step(cache, clean=True)
            await wait_all_tasks_blocked()
            usage = cache.usage()
            assert usage.open_versions == 0
            assert usage.bytes <= 16 * MIB
            assert usage.bytes >= 0
        mishaps.damage()

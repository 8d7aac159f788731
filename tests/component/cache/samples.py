"""What the tests of the block cache read, and from where."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from phfs_fuse.cache import file_format
from phfs_fuse.cache.block_cache import BlockCache
from phfs_fuse.extents import Extents
from phfs_fuse.store.base import Sink
from phfs_fuse.types import ETag, ObjectKey
from tests.support.caches import BLOCK, KEY, RangeStore, content

SIZE = 10 * BLOCK + 100
DATA = content(SIZE)
OTHER = ObjectKey("groups/a/other")


class StepStore(RangeStore):
    """Passes on one block for each call of `step`, on a thread as real stores do."""

    def __init__(self) -> None:
        super().__init__()
        self.send, self._steps = trio.open_memory_channel[bool](100)

    async def get(self, key: ObjectKey, start: int, end: int, *, etag: ETag | None, sink: Sink) -> None:
        self.asked.append((start, end))
        for at in range(start, end, BLOCK):
            await self._steps.receive()
            chunk = self.data(key)[at : min(at + BLOCK, end)]
            await trio.to_thread.run_sync(sink, at, chunk)


class FullDisk:
    """Writes fail while `is_full`."""

    def __init__(self, patch: pytest.MonkeyPatch, code: int = errno.ENOSPC) -> None:
        self.is_full = True
        self._pwrite = os.pwrite
        self._code = code
        patch.setattr(file_format.os, "pwrite", self.pwrite)

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        if self.is_full:
            raise OSError(self._code, os.strerror(self._code))
        return self._pwrite(fd, data, offset)


def files(directory: Path) -> list[Path]:
    """The files with blocks."""
    return sorted(path for path in directory.glob("*/*") if path.is_file())


async def read_all(cache: BlockCache, store: RangeStore, key: ObjectKey = KEY) -> bytes:
    found = store.open(cache, key)
    try:
        return bytes(await found.read(0, found.size))
    finally:
        found.close()


def staged(directory: Path, data: bytes, name: str = "staged") -> Path:
    path = directory / name
    path.unlink(missing_ok=True)  # the one before may still be read
    path.write_bytes(data)
    path.chmod(0o600)
    return path


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

"""The file with the clean blocks of one version: layout, checksums, and calls that are safe on any thread.

A sparse file: the bytes of the object at their offsets, then, from the next multiple of 8, four bytes for
each block: its checksum, or 0 where the block is not there (a checksum of 0 is written as 1). The content may
be lost or damaged at any time: a block counts only after its checksum was compared, or when this process wrote
it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from errno import EINVAL, EIO, ENOSYS, EOPNOTSUPP, EXDEV
from typing import Final

from awscrt import checksums

from phfs_fuse.extents import Extent, Extents, split
from phfs_fuse.localfile import FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE, fallocate, write_all
from phfs_fuse.types import MIB, Buffer

ENTRY_BYTES: Final = 4
TAIL_BYTES: Final = 8  # behind all that is ever written: if the file was cut off, its length tells for good
COPY_BYTES: Final = 4 * MIB


@dataclass(frozen=True, slots=True)
class Checksum:
    """A running checksum of 32 bits; the name goes into the cache directory's format."""

    name: str
    update: Callable[[Buffer, int], int]

    def of(self, data: Buffer) -> int:
        """As it is written: never 0."""
        return self.update(data, 0) or 1


CRC32C: Final = Checksum("crc32c", checksums.crc32c)  # an instruction of the CPU: ten times as fast as zlib's CRC-32


@dataclass(frozen=True, slots=True)
class Layout:
    """Where things are in the file of an object of `size` bytes."""

    size: int
    block_bytes: int

    @property
    def block_count(self) -> int:
        return -(-self.size // self.block_bytes)

    @property
    def file_bytes(self) -> int:
        return self.entry_offset(self.block_count * self.block_bytes) + TAIL_BYTES

    def entry_offset(self, offset: int) -> int:
        """Of the checksum of the block that begins at `offset`."""
        return (self.size + 7 & ~7) + offset // self.block_bytes * ENTRY_BYTES

    def block_end(self, start: int) -> int:
        """Of the block that begins at `start`."""
        return min(start + self.block_bytes, self.size)

    def other_blocks(self, same: Extents, old: Layout) -> Iterator[Extent]:
        """The blocks whose bytes do not all lie in `same`, or that end elsewhere than in the `old` layout."""
        unit, last = self.block_bytes, 0
        ends = Extents([(old.size - 1, old.size), (self.size - 1, self.size)] if old.size != self.size else [])
        for start, end in Extents([*same.gaps(0, self.size), *ends.overlap(0, self.size)]):
            start = max(last, start - start % unit)
            yield from split(start, last := max(start, min(-(-end // unit) * unit, self.size)), unit)

    def covered_blocks(self, extents: Extents) -> Extents:
        """The blocks that lie in `extents` with all their bytes (the last one up to the size)."""
        blocks = Extents()
        for start, end in extents:
            end = min(end, self.size)
            first = -(-start // self.block_bytes) * self.block_bytes
            last = end if end == self.size else end - end % self.block_bytes
            blocks.add(first, last)
        return blocks


class BlockWriter:
    """Takes the bytes of a range of whole blocks in order, as a store's sink, on any thread.

    Never raises: after an error of the disk (then in `error`), or once `revoke` returned, it writes nothing.
    `done` is where the next block to be completed starts; `notify` is called after a chunk that completed some, but
    for the last one: whoever fetches learns of that by its return.
    """

    def __init__(
        self, fd: int, layout: Layout, checksum: Checksum, start: int, end: int, notify: Callable[[], None]
    ) -> None:
        self.done = start
        self._end = end
        self.error: OSError | None = None
        self._fd, self._layout, self._checksum, self._notify = fd, layout, checksum, notify
        self._running = 0
        self._revoked = False
        self._lock = threading.Lock()

    def __call__(self, offset: int, chunk: bytes | memoryview) -> None:
        with self._lock:
            if self._revoked:
                return
            done = self.done
            try:
                self._write(offset, memoryview(chunk))
            except OSError as exc:
                self.error, self._revoked = exc, True
        if self.done not in (done, self._end) or self.error is not None:
            self._notify()

    def revoke(self) -> None:
        """After this the file descriptor is not used any more. Waits for the chunk that is being written."""
        with self._lock:
            self._revoked = True

    def _write(self, offset: int, view: memoryview) -> None:
        """The bytes, then the checksums of the blocks that they complete."""
        write_all(self._fd, view, offset)
        layout, sums = self._layout, bytearray()
        for start, end in split(offset, offset + len(view), layout.block_bytes):
            self._running = self._checksum.update(view[start - offset : end - offset], self._running)
            if end % layout.block_bytes == 0 or end == layout.size:
                sums += _entry(self._running or 1)
                self._running, done = 0, end
        if sums:
            write_all(self._fd, sums, layout.entry_offset(self.done))
            self.done = done


def verify(fd: int, layout: Layout, checksum: Checksum, start: int, end: int) -> tuple[Extents, int]:
    """Those of the blocks of [start, end) that are there and right; how many bytes are there and wrong."""
    good, bad_bytes = Extents(), 0
    with suppress(OSError):  # what cannot be read is not there
        first = layout.entry_offset(start)
        table = os.pread(fd, layout.entry_offset(end + layout.block_bytes - 1) - first, first)
        for at, (block_start, block_end) in enumerate(split(start, end, layout.block_bytes)):
            entry = int.from_bytes(table[at * ENTRY_BYTES : (at + 1) * ENTRY_BYTES], "little")
            if not entry:
                continue
            data = os.pread(fd, block_end - block_start, block_start)
            if len(data) == block_end - block_start and checksum.of(data) == entry:
                good.add(block_start, block_end)
            else:
                bad_bytes += block_end - block_start
    return good, bad_bytes


def enter(fd: int, layout: Layout, checksum: Checksum, blocks: Extents, source_fd: int = -1) -> None:
    """Write the checksums of `blocks`, whose bytes are in the file, or are copied from another one first.

    Raises: OSError.
    """
    if source_fd >= 0:
        copy(source_fd, fd, blocks)
    for start, end in blocks:
        sums = bytearray()
        for block_start, block_end in split(start, end, layout.block_bytes):
            sums += _entry(checksum.of(os.pread(fd, block_end - block_start, block_start)))
        write_all(fd, sums, layout.entry_offset(start))


def graft(
    path: str, old: Layout, new: Layout, checksum: Checksum, source_fd: int, covered: Extents, same: Extents
) -> None:
    """Make the file of an old version, at `path`, that of a new one. Costs what changed.

    The bytes of the new version are those of `source_fd` in `covered`, those of the old version in `same`; a
    block with other bytes too is left out. Raises: OSError; then the file is of no use.
    """
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        table, changed = _grafted_table(fd, old, new, checksum, covered, same)
        os.ftruncate(fd, min(old.size, new.size))
        os.ftruncate(fd, new.file_bytes)
        copy(source_fd, fd, Extents(piece for extent in changed for piece in covered.overlap(*extent)))
        write_all(fd, table, new.entry_offset(0))
        enter(fd, new, checksum, changed)
    finally:
        os.close(fd)


def _grafted_table(
    fd: int, old: Layout, new: Layout, checksum: Checksum, covered: Extents, same: Extents
) -> tuple[bytearray, Extents]:
    """The checksums of the blocks that stay as they are, and the changed blocks of which all bytes are known."""
    if os.fstat(fd).st_size != old.file_bytes:
        raise OSError(EIO, "the file is not as long as it was")
    table = bytearray(new.block_count * ENTRY_BYTES)
    kept = os.pread(fd, min(old.block_count, new.block_count) * ENTRY_BYTES, old.entry_offset(0))
    table[: len(kept)] = kept
    known, changed = Extents([*covered, *same]), Extents()
    for start, end in new.other_blocks(same, old):
        at = start // new.block_bytes * ENTRY_BYTES
        table[at : at + ENTRY_BYTES] = bytes(ENTRY_BYTES)
        if covered.covers(start, end) or (
            known.covers(start, end) and verify(fd, old, checksum, start, old.block_end(start))[0]
        ):
            changed.add(start, end)
    return table, changed


def drop(fd: int, layout: Layout, start: int, end: int) -> None:
    """Give the disk space of the blocks of [start, end) back.

    Raises: OSError, EOPNOTSUPP where the file system has no holes.
    """
    first, last = layout.entry_offset(start), layout.entry_offset(end + layout.block_bytes - 1)
    write_all(fd, bytes(last - first), first)
    fallocate(fd, FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE, start, end - start)


def copy(source_fd: int, fd: int, extents: Extents) -> None:
    """Copy the bytes of `extents` to the same offsets. Raises: OSError, also if the source is too short."""
    for start, end in extents:
        while start < end:
            count = _copy_some(source_fd, fd, start, min(end - start, COPY_BYTES))
            if not count:
                raise OSError(EIO, "the source is too short")
            start += count


def _copy_some(source_fd: int, fd: int, offset: int, length: int) -> int:
    """How many bytes were copied; 0 at the end of the source."""
    try:
        return os.copy_file_range(source_fd, fd, length, offset, offset)
    except OSError as exc:
        if exc.errno not in (EXDEV, EINVAL, ENOSYS, EOPNOTSUPP):  # Source: copy_file_range(2), since Linux 5.19
            raise
    data = os.pread(source_fd, min(length, MIB), offset)
    write_all(fd, data, offset)
    return len(data)


def _entry(value: int) -> bytes:
    return value.to_bytes(ENTRY_BYTES, "little")

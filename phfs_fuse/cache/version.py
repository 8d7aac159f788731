"""One version of one object as clean blocks: how it is read. Owns who has it open, and its read-ahead.

The blocks are in its `BlockFile`; what is missing there comes by its `Fills`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from phfs_fuse import metrics
from phfs_fuse.cache.block_file import BlockFile
from phfs_fuse.cache.disk import INLINE_BYTES, CacheDisk
from phfs_fuse.cache.fills import Fetching, Fills, for_reader
from phfs_fuse.cache.read_ahead import ReadAhead
from phfs_fuse.errors import PhfsError
from phfs_fuse.extents import Extent, Extents, split
from phfs_fuse.localfile import write_all
from phfs_fuse.types import MIB, Buffer, ETag, ObjectKey

TRIES: Final = 3  # of a read, before it goes past the cache
WINDOW_PART: Final = 8  # of the cache, which keeps what was asked for ahead: no reader has more of it
DROP_BYTES: Final = 64 * MIB  # at a time; a multiple of every block size
ANSWER_BYTES: Final = MIB  # the kernel asks for no more at once


@dataclass(slots=True)
class Shared:
    """What all versions of one cache use together; owned by the `BlockCache`."""

    disk: CacheDisk
    fetching: Fetching
    versions: dict[str, Version] = field(default_factory=dict)  # that are open, by name
    answer: memoryview = field(default_factory=lambda: memoryview(bytearray(ANSWER_BYTES)))  # of `read_now`


class Version:
    """One version, open. Got from `BlockCache.open`; `close` it once for every `open`."""

    __slots__ = ("_ahead", "_disk", "_drop_at", "_shared", "file", "fills", "is_forgotten", "refs", "size")

    def __init__(self, shared: Shared, key: ObjectKey, etag: ETag, size: int, name: str) -> None:
        self.size, self.refs = size, 1
        self._shared, self._disk = shared, shared.disk
        self.file = BlockFile(shared.disk, key, etag, size, name)
        self.fills = Fills(shared.fetching, self.file)
        config = shared.disk.config
        window = min(config.window_bytes_max, max(config.size_max // WINDOW_PART, config.block_bytes))
        self._ahead = ReadAhead(size, config.block_bytes, window, config.requests_max)
        self._drop_at = 0
        self.is_forgotten = False  # the file goes with the last close

    @property
    def name(self) -> str:
        """Of its file in the cache."""
        return self.file.name

    # -- for readers

    def read_now(self, start: int, end: int) -> Buffer | None:
        """The bytes of [start, end), up to the size, if that takes no waiting at all, else None. Atomic. Valid until
        the next call for any version of the cache: a new buffer for each answer would have to be cleared first."""
        if end > self.size:
            end = self.size
        if start >= end:
            return b""
        length = end - start
        return self._into(start, self._shared.answer[:length] if length <= ANSWER_BYTES else bytearray(length))

    def _into(self, start: int, data: bytearray | memoryview) -> Buffer | None:
        """`data`, filled with the bytes from `start` on, if that takes no waiting."""
        if not self.file.complete and not self._seen(start, start + len(data)):
            return None
        try:
            count = os.preadv(self.file.fd, (data,), start, os.RWF_NOWAIT)
        except OSError:  # not in memory, or the file is not open
            return None
        if count != len(data):
            return None
        self._disk.counts.hits += 1
        return data

    async def read(self, start: int, end: int) -> Buffer:
        """The bytes of [start, end), up to the size.

        Raises: StaleVersion (ESTALE) if the store has the version no more, other PhfsErrors of the store.
        """
        end = min(end, self.size)
        if start >= end:
            return b""
        self.refs += 1
        try:
            return await self._read(start, end)
        finally:
            self.close()

    async def copy_to(self, fd: int, start: int, end: int) -> None:
        """Write the bytes of [start, end), up to the size, into another file at the same offsets.

        Raises: as `read`; OSError of writing.
        """
        for piece_start, piece_end in split(start, min(end, self.size), MIB):
            data = await self.read(piece_start, piece_end)
            metrics.COPIED.add(len(data))
            if len(data) <= INLINE_BYTES:
                write_all(fd, data, piece_start)
            else:  # not abandoned: the caller closes the file after a cancellation
                write = partial(write_all, fd, data, piece_start)
                await self._disk.run(write, abandon_on_cancel=False)

    def close(self) -> None:
        """The last one ends what is still being fetched ahead."""
        self.refs -= 1
        if self.refs:
            return
        self.fills.cancel()
        is_current = self._shared.versions.get(self.name) is self
        self.file.close(is_current=is_current, is_forgotten=self.is_forgotten)
        if is_current:
            del self._shared.versions[self.name]

    # -- reading

    def _seen(self, start: int, end: int) -> bool:
        if not self.file.ready.covers(start, end):
            return False
        if ahead := self._ahead.note(start, end)[1:]:
            self.fills.request(ahead)
        return True

    async def _read(self, start: int, end: int) -> Buffer:
        wanted = self._ahead.note(start, end)
        counts, file = self._disk.counts, self.file
        waited = False
        for _ in range(TRIES):
            if not file.attach():
                break
            if not file.ready.covers(start, end):
                if self._disk.is_full:
                    break
                waited = True
                await self.fills.arrival(start, end, wanted)
            data = self._into(start, bytearray(end - start)) or await self._read_slowly(start, end)
            if data is not None:
                counts.hits -= waited
                counts.misses += waited
                return data
            wanted = [file.blocks(start, end)]
        counts.misses += 1
        return await self._read_past(start, end)

    async def _read_slowly(self, start: int, end: int) -> Buffer | None:
        """From disk; None if the blocks went away meanwhile."""
        data = await self.file.read(start, end)
        self._disk.counts.hits += data is not None
        return data

    async def _read_past(self, start: int, end: int) -> Buffer:
        """From the store, without the disk."""
        data = bytearray(end - start)

        def sink(offset: int, chunk: bytes | memoryview) -> None:
            data[offset - start : offset - start + len(chunk)] = chunk

        try:
            await self.fills.fetch(start, end, sink)
        except PhfsError as exc:
            raise for_reader(exc) from exc
        return data

    # -- for the cache

    def rename(self, key: ObjectKey, etag: ETag, name: str) -> None:
        """The same bytes have another name in the store (and in the cache: the caller moves the file)."""
        self.file.key, self.file.etag, self.file.name = key, etag, name

    async def shrink(self, bytes_wanted: int) -> None:
        """Drop about so many bytes, not of what is being read or fetched, if there are as many."""
        for start, end in self._droppable():
            for piece in split(start, end, DROP_BYTES):
                if bytes_wanted <= 0 or not self.refs:
                    return
                if not self.fills.busy.overlap(*piece) and self.file.attach():
                    bytes_wanted -= await self._drop(*piece)
                    self._drop_at = piece[1]

    def _droppable(self) -> list[Extent]:
        """Whole blocks, beginning with those behind the ones that were dropped last."""
        keep = self.fills.busy.copy()
        for extent in [*self._ahead.windows, *self.fills.awaited]:
            keep.add(*self.file.blocks(*extent))
        held = Extents([*self.file.ready, *self.file.unchecked])
        pieces = [gap for extent in held for gap in keep.gaps(*extent)]
        return sorted(pieces, key=lambda piece: (piece[0] < self._drop_at, piece))

    async def _drop(self, start: int, end: int) -> int:
        self.fills.busy.add(start, end)
        try:
            return await self.file.drop(start, end)
        finally:
            self.fills.free(start, end)

"""One version of one object as clean blocks: what is here, what is on its way, and who waits for it.

A `Version` owns its file in the cache directory while it is open. All its state changes on the trio thread; the
threads of the store and of the disk write into the file and say how far they got. A block is *ready* (in the
file, right), *unchecked* (an earlier process may have left it: its checksum is compared before it is served) or
missing, and *busy* while one task fetches, checks, copies or drops it.
"""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from errno import EDQUOT, ENOSPC, EXDEV
from functools import partial
from typing import Final, Protocol, TypeVar

import trio

from phfs_fuse import cachefile
from phfs_fuse.cachedir import SECTOR_BYTES, CacheDirectory, Entry
from phfs_fuse.cachefile import BlockWriter, Buffer, Checksum, Layout
from phfs_fuse.config import CacheConfig
from phfs_fuse.errors import BadAnswer, NotFound, PhfsError, StaleVersion, StoreUnavailable, VersionChanged
from phfs_fuse.extents import Extent, Extents, split
from phfs_fuse.readahead import ReadAhead
from phfs_fuse.store.base import ObjectStore
from phfs_fuse.types import KIB, MIB, ETag, ObjectKey

log = logging.getLogger(__name__)

TRIES: Final = 3  # of a read, before it goes past the cache
DROP_BYTES: Final = 64 * MIB  # at a time; a multiple of every block size
INLINE_BYTES: Final = 256 * KIB  # local copies up to this size are not worth a thread
FILES_OPEN_MAX: Final = 256
TRAILER_BYTES: Final = 4 * KIB  # on disk, per file, beside the blocks

T = TypeVar("T")


class RunSync(Protocol):
    """`on_thread`, or what stands for it in a test."""

    def __call__(
        self, call: Callable[[], T], /, *, abandon_on_cancel: bool, limiter: trio.CapacityLimiter
    ) -> Awaitable[T]: ...


async def on_thread(call: Callable[[], T], *, abandon_on_cancel: bool, limiter: trio.CapacityLimiter) -> T:
    return await trio.to_thread.run_sync(call, abandon_on_cancel=abandon_on_cancel, limiter=limiter)


@dataclass(slots=True)
class Counts:
    hits: int = 0  # reads answered from the disk cache
    misses: int = 0  # reads that waited for the store
    fetches: int = 0  # requests to the store
    fetch_bytes: int = 0
    evicted_bytes: int = 0
    damaged_bytes: int = 0  # found on disk with a wrong checksum or lost
    disk_errors: int = 0


@dataclass(slots=True)
class Shared:
    """What all versions of one cache use together; owned by the `BlockCache`."""

    store: ObjectStore
    config: CacheConfig
    directory: CacheDirectory
    checksum: Checksum
    run_sync: RunSync
    limiter: trio.CapacityLimiter
    counts: Counts = field(default_factory=Counts)
    versions: dict[str, Version] = field(default_factory=dict)  # that are open, by name
    attached: OrderedDict[Version, None] = field(default_factory=OrderedDict)  # with an open file
    nursery: trio.Nursery | None = None
    token: trio.lowlevel.TrioToken | None = None
    is_full: bool = False  # the cache's disk takes nothing now
    needs_room: bool = False  # because there is no space left, or no quota
    trash: list[str] = field(default_factory=list)  # files to be unlinked
    work: trio.Event = field(default_factory=trio.Event)  # there is something to evict or to unlink

    def disk_failed(self, exc: OSError) -> None:
        """Reads go past the cache until room was made."""
        self.counts.disk_errors += 1
        if not self.is_full:
            log.warning("cache disk failed, reading past it for a while: %s", exc)
            self.is_full = True
        self.needs_room = exc.errno in (ENOSPC, EDQUOT)
        self.work.set()

    def charge(self, name: str, bytes_more: int) -> None:
        """A file of the cache grew."""
        if (entry := self.directory.entries.get(name)) is not None:
            self.resize(entry, entry.bytes + bytes_more)

    def resize(self, entry: Entry, size: int) -> None:
        """A file of the cache takes `size` bytes of disk now."""
        self.directory.resize(entry, size)
        if self.directory.used_bytes > self.config.size_max:
            self.work.set()

    def discard(self, name: str) -> None:
        if (path := self.directory.discard(name)) is not None:
            self.trash.append(path)
            self.work.set()

    async def on_disk(self, call: Callable[[], T], *, abandon_on_cancel: bool = True) -> T:
        return await self.run_sync(call, abandon_on_cancel=abandon_on_cancel, limiter=self.limiter)


@dataclass(eq=False, slots=True)
class _Reader:
    """Someone who waits until the blocks of [start, end) are ready, or one of them failed."""

    start: int
    end: int
    error: Exception | None = None
    event: trio.Event = field(default_factory=trio.Event)


@dataclass(eq=False, slots=True)
class _Fill:
    """The task that makes the blocks of [start, end) ready; they are busy meanwhile."""

    start: int
    end: int
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    fd: int = -1
    writer: BlockWriter | None = None  # while it may write and what it wrote counts
    published: int = 0
    notified: bool = False


class Version:
    """One version, open. Got from `BlockCache.open`; `close` it once for every `open`."""

    __slots__ = (
        "_ahead", "_busy", "_complete", "_counts", "_drop_at", "_epoch", "_fd", "_fills", "_ino", "_layout",
        "_readers", "_ready", "_shared", "_unchecked", "etag", "is_forgotten", "key", "name", "refs", "size",
    )  # fmt: skip

    def __init__(self, shared: Shared, key: ObjectKey, etag: ETag, size: int, name: str) -> None:
        self.key, self.etag, self.size, self.name, self.refs = key, etag, size, name, 1
        config = shared.config
        self._shared, self._counts = shared, shared.counts
        self._layout = Layout(size, config.block_bytes)
        self._ahead = ReadAhead(size, config.block_bytes, config.window_bytes_max, config.requests_max)
        self._ready, self._unchecked, self._busy = Extents(), Extents(), Extents()
        self._complete = False  # all is ready: what makes `read_now` quick
        self._fd = self._ino = -1
        self._epoch = 0  # counts what makes a read in flight worthless: blocks dropped, the file closed
        self._readers: list[_Reader] = []
        self._fills: set[_Fill] = set()
        self._drop_at = 0
        self.is_forgotten = False  # the file goes with the last close

    # -- for readers

    def read_now(self, start: int, end: int) -> Buffer | None:
        """The bytes of [start, end), up to the size, if that takes no waiting at all, else None. Atomic."""
        if end > self.size:
            end = self.size
        if start >= end:
            return b""
        if not self._complete and not self._seen(start, end):
            return None
        data = bytearray(end - start)
        try:
            count = os.preadv(self._fd, (data,), start, os.RWF_NOWAIT)
        except OSError:  # not in memory, or the file is not open
            return None
        if count != end - start:
            return None
        self._counts.hits += 1
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
            if len(data) <= INLINE_BYTES:
                cachefile.write_all(fd, data, piece_start)
            else:  # not abandoned: the caller closes the file after a cancellation
                write = partial(cachefile.write_all, fd, data, piece_start)
                await self._shared.on_disk(write, abandon_on_cancel=False)

    def close(self) -> None:
        """The last one ends what is still being fetched ahead."""
        self.refs -= 1
        if self.refs:
            return
        for fill in self._fills:
            fill.scope.cancel()
        self._settle()
        if self._shared.versions.get(self.name) is self:
            del self._shared.versions[self.name]

    # -- reading

    def _seen(self, start: int, end: int) -> bool:
        if not self._ready.covers(start, end):
            return False
        for piece in self._ahead.note(start, end)[1:]:
            self._request(*piece)
        return True

    async def _read(self, start: int, end: int) -> Buffer:
        wanted = self._ahead.note(start, end)
        waited = False
        for _ in range(TRIES):
            if not self._attach():
                break
            if not self._ready.covers(start, end):
                if self._shared.is_full:
                    break
                for piece in wanted:
                    self._request(*piece)
                waited = True
                await self._arrival(start, end)
            data = self.read_now(start, end) or await self._read_slowly(start, end)
            if data is not None:
                self._counts.hits -= waited
                self._counts.misses += waited
                return data
            wanted = [self._blocks(start, end)]
        self._counts.misses += 1
        return await self._read_past(start, end)

    async def _read_slowly(self, start: int, end: int) -> Buffer | None:
        """From disk, on a thread; None if the blocks went away meanwhile."""
        if not self._attach() or not self._ready.covers(start, end):
            return None
        epoch = self._epoch
        try:
            data = await self._shared.on_disk(partial(os.pread, self._fd, end - start, start))
        except OSError:
            data = b""
        if epoch != self._epoch:
            return None
        if len(data) != end - start:
            self._restart("too short")
            return None
        self._counts.hits += 1
        return data

    async def _read_past(self, start: int, end: int) -> Buffer:
        """From the store, without the disk."""
        data = bytearray(end - start)

        def sink(offset: int, chunk: bytes | memoryview) -> None:
            data[offset - start : offset - start + len(chunk)] = chunk

        try:
            await self._fetch(start, end, sink)
        except PhfsError as exc:
            raise _for_reader(exc) from exc
        return data

    async def _fetch(self, start: int, end: int, sink: Callable[[int, bytes | memoryview], None]) -> None:
        self._counts.fetches += 1
        self._counts.fetch_bytes += end - start
        await self._shared.store.get(self.key, start, end, etag=self.etag, sink=sink)

    async def _arrival(self, start: int, end: int) -> None:
        """Return when [start, end) is ready, or may be asked for again. Raises: what the fetch of it raised."""
        reader = _Reader(start, end)
        self._readers.append(reader)
        try:
            await reader.event.wait()
        finally:
            self._readers.remove(reader)
        if reader.error is not None:
            raise _for_reader(reader.error) from reader.error

    def _blocks(self, start: int, end: int) -> Extent:
        unit = self._layout.block_bytes
        return start - start % unit, min(-(-end // unit) * unit, self.size)

    # -- filling

    def _request(self, start: int, end: int) -> None:
        """See to it that the blocks of [start, end) are ready or busy."""
        if self._shared.nursery is None:
            raise StoreUnavailable("read", self.key, "the block cache is not running")
        for gap_start, gap_end in self._ready.gaps(start, end):
            for piece in self._busy.gaps(gap_start, gap_end):
                self._busy.add(*piece)
                self._fills.add(fill := _Fill(*piece))
                self._shared.nursery.start_soon(self._run, fill, self._load)

    async def _run(self, fill: _Fill, load: Callable[[_Fill], Awaitable[None]]) -> None:
        """Owns the busy range of `fill` and tells the readers how it ended."""
        error: Exception | None = None
        key = self.key
        try:
            with fill.scope:
                await load(fill)
        except OSError as exc:
            self._shared.disk_failed(exc)
        except Exception as exc:
            if key == self.key:  # else it was asked for under the old name: ask again
                error = exc
            if not isinstance(exc, PhfsError):  # a bug: the readers get it, the mount goes on
                log.exception("reading key=%s failed", key)
        finally:
            self._fills.discard(fill)
            self._free(fill.start, fill.end, error)

    def _free(self, start: int, end: int, error: Exception | None = None) -> None:
        """The range is not busy any more: its readers look again, or fail."""
        self._busy.remove(start, end)
        for reader in self._readers:
            if reader.start < end and start < reader.end:
                if not self._ready.covers(reader.start, reader.end):
                    reader.error = reader.error or error
                reader.event.set()

    async def _load(self, fill: _Fill) -> None:
        if self._unchecked.overlap(fill.start, fill.end):
            await self._check(fill.start, fill.end)
        for start, end in self._ready.gaps(fill.start, fill.end):
            await self._get(fill, start, end)

    async def _check(self, start: int, end: int) -> None:
        """Find out which blocks an earlier process left."""
        if not self._attach():
            return
        epoch = self._epoch
        verify = partial(cachefile.verify, self._fd, self._layout, self._shared.checksum, start, end)
        good, bad_bytes = await self._shared.on_disk(verify)
        if epoch != self._epoch:
            return
        self._counts.damaged_bytes += bad_bytes
        self._unchecked.remove(start, end)
        for piece in good:
            self._add(*piece)

    async def _get(self, fill: _Fill, start: int, end: int) -> None:
        shared = self._shared
        if not self._attach():
            return
        fill.fd, fill.published = os.dup(self._fd), start
        assert shared.token is not None
        token = shared.token

        def notify() -> None:  # on a thread of the store
            if not fill.notified:
                fill.notified = True
                token.run_sync_soon(self._publish, fill, writer)

        writer = fill.writer = BlockWriter(fill.fd, self._layout, shared.checksum, start, notify)
        try:
            await self._fetch(start, end, writer)
        finally:
            writer.revoke()
            self._publish(fill, writer)
            counted, fill.writer = fill.writer is writer, None
            os.close(fill.fd)
        if counted and writer.error is None and writer.done != end:
            raise BadAnswer("get", self.key, f"ended at {writer.done} instead of {end}")

    def _publish(self, fill: _Fill, writer: BlockWriter) -> None:
        """Blocks are in the file: whoever waits for no more than these goes on."""
        if fill.writer is not writer:
            return
        fill.notified = False
        if writer.error is not None:
            self._shared.disk_failed(writer.error)
            fill.scope.cancel()
        if os.fstat(fill.fd).st_size != self._layout.file_bytes:
            self._restart("not as long as it was")
            return
        done = writer.done
        if done > fill.published:
            start, fill.published = fill.published, done
            self._add(start, done)
            self._shared.charge(self.name, done - start)

    def _add(self, start: int, end: int) -> None:
        self._ready.add(start, end)
        self._unchecked.remove(start, end)
        self._complete = self._ready.covers(0, self.size)
        for reader in self._readers:
            if self._ready.covers(reader.start, reader.end):
                reader.event.set()

    # -- the file

    def _attach(self) -> bool:
        """Have the file open; False if the disk does not let us."""
        attached = self._shared.attached
        if self._fd >= 0:
            attached.move_to_end(self)
            return True
        try:
            self._fd = self._shared.directory.open_file(self.name)
            self._look()
        except OSError as exc:
            self._detach()
            self._shared.disk_failed(exc)
            return False
        self._note_attached()
        return True

    def _note_attached(self) -> None:
        attached = self._shared.attached
        attached[self] = None
        if len(attached) > FILES_OPEN_MAX:
            next(iter(attached))._detach()

    def _look(self) -> None:
        """Find out what the file that was opened is: ours still, of an earlier time, or new."""
        status = os.fstat(self._fd)
        directory = self._shared.directory
        entry = directory.entry(self.name)
        if status.st_size != self._layout.file_bytes:
            os.ftruncate(self._fd, 0)
            os.ftruncate(self._fd, self._layout.file_bytes)
            self._set_content(Extents(), Extents())
            self._shared.resize(entry, TRAILER_BYTES)
        elif status.st_ino == entry.whole_ino:
            self._set_content(Extents([(0, self.size)]), Extents())
        elif status.st_ino != self._ino:
            self._set_content(Extents(), Extents([(0, self.size)]))
            self._shared.resize(entry, status.st_blocks * SECTOR_BYTES)
        self._ino = status.st_ino
        entry.whole_ino = 0  # until it is closed

    def _set_content(self, ready: Extents, unchecked: Extents) -> None:
        """The file is another one: what is being written into the old one does not count."""
        for fill in self._fills:
            fill.scope.cancel()
            if fill.writer is not None:
                fill.writer.revoke()
                fill.writer = None
        self._ready, self._unchecked = ready, unchecked
        self._complete = ready.covers(0, self.size)
        self._epoch += 1

    def _detach(self) -> None:
        self._shared.attached.pop(self, None)
        self._epoch += 1
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _restart(self, reason: str) -> None:
        """Begin with a new file: the one that is there cannot be trusted or made smaller."""
        if not self.refs:
            return
        log.warning("cache file of key=%s is %s, fetching again", self.key, reason)
        self._set_content(Extents(), Extents())
        self._detach()
        self._ino = -1
        self._shared.discard(self.name)

    def _settle(self) -> None:
        """Note in the index what is left for the next time."""
        directory = self._shared.directory
        entry = directory.entries.get(self.name)
        if entry is not None and self._shared.versions.get(self.name) is self:
            if self.is_forgotten or (self._ino >= 0 and not (self._ready or self._unchecked)):
                self._shared.discard(self.name)
            elif self._ino >= 0:
                entry.whole_ino = self._ino if self._complete else 0
                self._stamp(entry)
        self._detach()

    def _stamp(self, entry: Entry) -> None:
        """Size on disk and time of use."""
        if self._fd < 0:
            return
        status = os.fstat(self._fd)
        if status.st_nlink:
            self._shared.resize(entry, status.st_blocks * SECTOR_BYTES)
            with suppress(OSError):
                os.utime(self._fd)
        else:
            self._shared.directory.forget_entry(self.name)

    # -- for the cache

    def rename(self, key: ObjectKey, etag: ETag, name: str) -> None:
        """The same bytes have another name in the store (and in the cache: the caller moves the file)."""
        self.key, self.etag, self.name = key, etag, name

    def adopt(self, source: str, covered: Extents) -> None:
        """Take the blocks that lie in `covered` from the local file `source`, by moving it here if that can be.

        Big files are read in the background. Raises: OSError.
        """
        blocks, source_fd = self._layout.covered_blocks(covered), -1
        if not blocks or self._shared.is_full:
            return
        if not self._take_file(source, blocks):
            if not self._attach():
                return
            blocks = Extents(hole for extent in blocks for hole in self._ready.gaps(*extent))
            for extent in self._busy:
                blocks.remove(*extent)
            source_fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
        if blocks.total_bytes <= INLINE_BYTES or self._shared.nursery is None:
            self._enter_now(blocks, source_fd)
            return
        for extent in blocks:
            self._busy.add(*extent)
        self.refs += 1
        self._shared.nursery.start_soon(self._enter, blocks, source_fd)

    def _take_file(self, path: str, blocks: Extents) -> bool:
        """Make the file at `path` ours. False if there is one already, or `path` is on another file system."""
        shared = self._shared
        if self._fd >= 0 or self.name in shared.directory.entries:
            return False
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            status = os.fstat(fd)
            if status.st_size > self.size:
                os.ftruncate(fd, self.size)
            shared.directory.move_in(path, self.name)
            os.ftruncate(fd, self._layout.file_bytes)
        except OSError as exc:
            os.close(fd)
            if exc.errno == EXDEV:
                return False
            raise
        self._fd, self._ino = fd, status.st_ino
        self._note_attached()
        shared.directory.entry(self.name)
        self._set_content(blocks.copy(), Extents())
        shared.charge(self.name, TRAILER_BYTES + blocks.total_bytes)
        return True

    def _enter_now(self, blocks: Extents, source_fd: int) -> None:
        """Write the checksums of blocks that are in the file, or are copied from `source_fd` first."""
        try:
            cachefile.enter(self._fd, self._layout, self._shared.checksum, blocks, source_fd)
            self._entered(blocks)
        finally:
            if source_fd >= 0:
                os.close(source_fd)

    async def _enter(self, blocks: Extents, source_fd: int) -> None:
        """The same on a thread; the blocks are busy meanwhile."""
        fds = [source_fd] if source_fd >= 0 else []
        try:
            if self._attach():
                fds.append(fd := os.dup(self._fd))
                call = partial(cachefile.enter, fd, self._layout, self._shared.checksum, blocks, source_fd)
                await self._shared.on_disk(call, abandon_on_cancel=False)
                self._entered(blocks)
        except OSError as exc:
            log.info("bytes of key=%s are not kept: %s", self.key, exc)
        finally:
            for fd in fds:
                os.close(fd)
            for extent in blocks:
                self._free(*extent)
            self.close()

    def graft(self, path: str, old: Layout, source: str, covered: Extents, same: Extents) -> None:
        """Make the cache file of an older version, at `path`, ours in the background: bytes in `covered` are those
        of the local file `source`, bytes in `same` are as they were. Raises: OSError."""
        assert self._shared.nursery is not None
        source_fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
        self._busy.add(0, self.size)
        self.refs += 1
        checksum = self._shared.checksum
        call = partial(cachefile.graft, path, old, self._layout, checksum, source_fd, covered, same)
        self._shared.nursery.start_soon(self._graft, path, call, source_fd)

    async def _graft(self, path: str, call: Callable[[], None], source_fd: int) -> None:
        try:
            await self._shared.on_disk(call, abandon_on_cancel=False)
            self._shared.directory.move_in(path, self.name)
            self._detach()
            self._ino = -1
            self._attach()
        except OSError as exc:
            log.info("bytes of key=%s are not kept: %s", self.key, exc)
            self._shared.trash.append(path)
            self._shared.work.set()
        finally:
            os.close(source_fd)
            self._free(0, self.size)
            self.close()

    def _entered(self, blocks: Extents) -> None:
        for extent in blocks:
            for start, end in self._ready.gaps(*extent):
                self._add(start, end)
                self._shared.charge(self.name, end - start)

    async def shrink(self, bytes_wanted: int) -> None:
        """Drop about so many bytes, not of what is being read or fetched, if there are as many."""
        for start, end in self._droppable():
            for piece in split(start, end, DROP_BYTES):
                if bytes_wanted <= 0 or not self.refs:
                    return
                if not self._busy.overlap(*piece) and self._attach():
                    bytes_wanted -= await self._drop(*piece)
                    self._drop_at = piece[1]

    def _droppable(self) -> list[Extent]:
        """Whole blocks, beginning with those behind the ones that were dropped last."""
        keep = self._busy.copy()
        for start, end in [*self._ahead.windows, *((reader.start, reader.end) for reader in self._readers)]:
            keep.add(*self._blocks(start, end))
        held = Extents([*self._ready, *self._unchecked])
        pieces = [gap for extent in held for gap in keep.gaps(*extent)]
        return sorted(pieces, key=lambda piece: (piece[0] < self._drop_at, piece))

    async def _drop(self, start: int, end: int) -> int:
        """Returns how many bytes of disk that freed."""
        directory, fd = self._shared.directory, os.dup(self._fd)
        self._busy.add(start, end)
        self._ready.remove(start, end)
        self._unchecked.remove(start, end)
        self._complete, self._epoch = False, self._epoch + 1
        entry = directory.entry(self.name)
        before = entry.bytes
        try:
            call = partial(cachefile.drop, fd, self._layout, start, end)
            await self._shared.on_disk(call, abandon_on_cancel=False)
            if directory.entries.get(self.name) is entry:
                directory.resize(entry, os.fstat(fd).st_blocks * SECTOR_BYTES)
        except OSError as exc:
            self._restart(f"not to be made smaller ({exc.strerror})")
            return before
        finally:
            os.close(fd)
            self._free(start, end)
        return before - entry.bytes


def _for_reader(exc: Exception) -> Exception:
    """A new exception for one of several readers."""
    if isinstance(exc, (VersionChanged, NotFound)):
        return StaleVersion(exc.op, exc.subject, exc.reason)
    if isinstance(exc, PhfsError):
        return type(exc)(exc.op, exc.subject, exc.reason)
    return StoreUnavailable("read", "", str(exc))

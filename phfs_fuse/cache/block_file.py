"""The cache file of one open version, and which of its blocks are in it.

A block is *ready* (in the file, right), *unchecked* (an earlier process may have left it: its checksum is compared
before it is served) or missing. The file may vanish, be cut or be replaced at any time by others: whoever has
awaited looks at `epoch` again.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from errno import EXDEV
from functools import partial
from typing import Final

from phfs_fuse.cache import file_format
from phfs_fuse.cache.directory import SECTOR_BYTES, Entry
from phfs_fuse.cache.disk import CacheDisk
from phfs_fuse.cache.file_format import Layout
from phfs_fuse.extents import Extent, Extents
from phfs_fuse.types import KIB, ETag, ObjectKey

log = logging.getLogger(__name__)

TRAILER_BYTES: Final = 4 * KIB  # on disk, per file, beside the blocks
USE_SECONDS: Final = 60.0  # so exact is the time of use that a restart finds


class BlockFile:
    """`on_replaced` is called when the file has become another one: what is on its way into it does not count."""

    __slots__ = (
        "_closed", "_ino", "complete", "disk", "epoch", "etag", "fd", "key", "layout", "name", "on_replaced", "ready",
        "unchecked",
    )  # fmt: skip

    def __init__(self, disk: CacheDisk, key: ObjectKey, etag: ETag, size: int, name: str) -> None:
        self.disk, self.key, self.etag, self.name = disk, key, etag, name
        self.layout = Layout(size, disk.config.block_bytes)
        self.fd = self._ino = -1
        self.ready, self.unchecked = Extents(), Extents()
        self.complete = False  # all is ready: what makes reads quick
        self.epoch = 0  # counts what makes a read in flight worthless: blocks dropped, the file closed
        self.on_replaced: Callable[[], None] = lambda: None
        self._closed = False

    def blocks(self, start: int, end: int) -> Extent:
        """The whole blocks that hold [start, end)."""
        unit = self.layout.block_bytes
        return start - start % unit, min(-(-end // unit) * unit, self.layout.size)

    def attach(self) -> bool:
        """Have the file open; False if the disk does not let us."""
        if self.fd >= 0:
            self.disk.opened.move_to_end(self)
            return True
        try:
            self.fd = self.disk.directory.open_file(self.name)
            self._look()
        except OSError as exc:
            self.detach()
            self.disk.failed(exc)
            return False
        self.disk.note_opened(self)
        return True

    def _look(self) -> None:
        """Find out what the file that was opened is: ours still, of an earlier time, or new."""
        status = os.fstat(self.fd)
        entry = self.disk.directory.entry(self.name)
        size = self.layout.size
        if status.st_size != self.layout.file_bytes:
            if status.st_size:  # else ext4 writes a file out when it is closed (Source: auto_da_alloc in ext4(5))
                os.ftruncate(self.fd, 0)
            os.ftruncate(self.fd, self.layout.file_bytes)
            self._set_content(Extents(), Extents())
            self.disk.resize(entry, TRAILER_BYTES)
        elif status.st_ino == entry.whole_ino:
            self._set_content(Extents([(0, size)]), Extents())
        elif status.st_ino != self._ino:
            self._set_content(Extents(), Extents([(0, size)]))
            self.disk.resize(entry, status.st_blocks * SECTOR_BYTES)
        self._ino = status.st_ino
        entry.whole_ino = 0  # until it is closed

    def _set_content(self, ready: Extents, unchecked: Extents) -> None:
        self.on_replaced()
        self.ready, self.unchecked = ready, unchecked
        self.complete = ready.covers(0, self.layout.size)
        self.epoch += 1

    def detach(self) -> None:
        self.disk.opened.pop(self, None)
        self.epoch += 1
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def add(self, start: int, end: int) -> None:
        """These blocks are in the file now."""
        self.ready.add(start, end)
        self.unchecked.remove(start, end)
        self.complete = self.ready.covers(0, self.layout.size)

    def restart(self, reason: str) -> None:
        """Begin with a new file: the one that is there cannot be trusted or made smaller."""
        if self._closed:
            return
        log.warning("cache file of key=%s is %s, fetching again", self.key, reason)
        self._set_content(Extents(), Extents())
        self.reopen()
        self.disk.discard(self.name)

    def reopen(self) -> None:
        """Look at the file anew when it is needed next."""
        self.detach()
        self._ino = -1

    def close(self, *, is_current: bool, is_forgotten: bool) -> None:
        """For good. Note in the index, if it speaks of this file, what is left for the next time."""
        self._closed = True
        entry = self.disk.directory.entries.get(self.name)
        if is_current and entry is not None:
            if is_forgotten or (self._ino >= 0 and not (self.ready or self.unchecked)):
                self.disk.discard(self.name)
            elif self._ino >= 0:
                entry.whole_ino = self._ino if self.complete else 0
                self._stamp(entry)
        self.detach()

    def _stamp(self, entry: Entry) -> None:
        """Size on disk and time of use."""
        if self.fd < 0:
            return
        status = os.fstat(self.fd)
        if status.st_nlink:
            self.disk.resize(entry, status.st_blocks * SECTOR_BYTES)
            if time.time() - status.st_mtime > USE_SECONDS:
                with suppress(OSError):
                    os.utime(self.fd)
        else:
            self.disk.directory.forget_entry(self.name)

    async def check(self, start: int, end: int) -> Extents:
        """Compare the checksums of unchecked blocks; returns those that are right, for `add`."""
        if not self.attach():
            return Extents()
        epoch = self.epoch
        verify = partial(file_format.verify, self.fd, self.layout, self.disk.checksum, start, end)
        good, bad_bytes = await self.disk.run(verify)
        if epoch != self.epoch:
            return Extents()
        self.disk.counts.damaged_bytes += bad_bytes
        self.unchecked.remove(start, end)
        return good

    async def read(self, start: int, end: int) -> bytes | None:
        """On a thread; None if the bytes are not there, or went away meanwhile."""
        if not self.attach() or not self.ready.covers(start, end):
            return None
        epoch = self.epoch
        try:
            data = await self.disk.run(partial(os.pread, self.fd, end - start, start))
        except OSError:
            data = b""
        if epoch != self.epoch:
            return None
        if len(data) != end - start:
            self.restart("too short")
            return None
        return data

    async def drop(self, start: int, end: int) -> int:
        """Take blocks, which nobody uses, out of the file. Returns how many bytes of disk that freed."""
        directory, fd = self.disk.directory, os.dup(self.fd)
        self.ready.remove(start, end)
        self.unchecked.remove(start, end)
        self.complete, self.epoch = False, self.epoch + 1
        entry = directory.entry(self.name)
        before = entry.bytes
        try:
            call = partial(file_format.drop, fd, self.layout, start, end)
            await self.disk.run(call, abandon_on_cancel=False)
            if directory.entries.get(self.name) is entry:
                directory.resize(entry, os.fstat(fd).st_blocks * SECTOR_BYTES)
        except OSError as exc:
            self.restart(f"not to be made smaller ({exc.strerror})")
            return before
        finally:
            os.close(fd)
        return before - entry.bytes

    def take(self, path: str, blocks: Extents) -> bool:
        """Make the file at `path`, which has `blocks`, ours; their checksums are still to be written. False if there
        is one already, or `path` is on another file system. Raises: OSError."""
        disk = self.disk
        if self.fd >= 0 or self.name in disk.directory.entries:
            return False
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            status = os.fstat(fd)
            if status.st_size > self.layout.size:
                os.ftruncate(fd, self.layout.size)
            disk.directory.move_in(path, self.name)
            os.ftruncate(fd, self.layout.file_bytes)
        except OSError as exc:
            os.close(fd)
            if exc.errno == EXDEV:
                return False
            raise
        self.fd, self._ino = fd, status.st_ino
        disk.note_opened(self)
        disk.directory.entry(self.name)
        self._set_content(blocks.copy(), Extents())
        disk.charge(self.name, TRAILER_BYTES + blocks.total_bytes)
        return True

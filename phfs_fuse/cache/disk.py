"""The disk of the cache as all its versions use it: threads, room, what failed. Owns the list of open cache files.

Whatever the disk does, nobody waits for it in vain: after an error reads go past it until room was made.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from errno import EDQUOT, ENOSPC
from typing import Final, Protocol, TypeVar

import trio

from phfs_fuse import metrics
from phfs_fuse.cache.directory import CacheDirectory, Entry
from phfs_fuse.cache.file_format import Checksum
from phfs_fuse.config.model import CacheConfig

log = logging.getLogger(__name__)

FILES_OPEN_MAX: Final = 256
INLINE_BYTES: Final = 256 * 1024  # local copies up to this size are not worth a thread

T = TypeVar("T")


class RunSync(Protocol):
    """`on_thread`, or what stands for it in a test."""

    def __call__(
        self, call: Callable[[], T], /, *, abandon_on_cancel: bool, limiter: trio.CapacityLimiter
    ) -> Awaitable[T]: ...


async def on_thread(call: Callable[[], T], *, abandon_on_cancel: bool, limiter: trio.CapacityLimiter) -> T:
    return await trio.to_thread.run_sync(call, abandon_on_cancel=abandon_on_cancel, limiter=limiter)


class Opened(Protocol):
    """A file of the cache that is open."""

    def detach(self) -> None: ...


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
class CacheDisk:
    config: CacheConfig
    directory: CacheDirectory
    checksum: Checksum
    run_sync: RunSync
    limiter: trio.CapacityLimiter
    counts: Counts = field(default_factory=Counts)
    opened: OrderedDict[Opened, None] = field(default_factory=OrderedDict)  # least recently used first
    files_max: int = FILES_OPEN_MAX  # that may be open, if there are fewer descriptors than usual
    is_full: bool = False  # it takes nothing now
    needs_room: bool = False  # because there is no space left, or no quota
    trash: list[str] = field(default_factory=list)  # files to be unlinked
    work: trio.Event = field(default_factory=trio.Event)  # there is something to evict or to unlink

    async def run(self, call: Callable[[], T], *, abandon_on_cancel: bool = True) -> T:
        """On a thread."""
        metrics.HOPS.add(1, "disk")
        return await self.run_sync(call, abandon_on_cancel=abandon_on_cancel, limiter=self.limiter)

    def note_opened(self, file: Opened) -> None:
        """`file` was opened; the one that was not used for longest may be closed for it."""
        self.opened[file] = None
        if len(self.opened) > min(FILES_OPEN_MAX, self.files_max):
            next(iter(self.opened)).detach()

    def failed(self, exc: OSError) -> None:
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
            self.throw_away(path)

    def throw_away(self, path: str) -> None:
        """Have a file unlinked in time."""
        self.trash.append(path)
        self.work.set()

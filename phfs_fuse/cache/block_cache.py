"""Clean blocks keyed by (key, ETag, block number), on disk, least recently used dropped first.

`BlockCache` owns the cache directory, the open versions and the tasks that fetch and evict. Whatever happens to
the directory, a reader gets the store's bytes or the store's error.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

import trio

from phfs_fuse.cache import adoption
from phfs_fuse.cache.directory import CacheDirectory, file_name, unlink_all
from phfs_fuse.cache.disk import FILES_OPEN_MAX, CacheDisk, RunSync, on_thread
from phfs_fuse.cache.file_format import CRC32C, Checksum, Layout
from phfs_fuse.cache.fills import Fetching
from phfs_fuse.cache.version import Shared, Version
from phfs_fuse.config.model import CacheConfig
from phfs_fuse.extents import Extents
from phfs_fuse.store.base import ObjectStore
from phfs_fuse.tasks import PAUSE_SECONDS, lasting, surviving
from phfs_fuse.types import MIB, Buffer, ETag, ObjectKey

__all__ = ["BlockCache", "Buffer", "CacheUsage", "Version"]
log = logging.getLogger(__name__)

THREADS_MAX: Final = 8  # reads of the cache's disk at a time
FILES_MAX: Final = 200_000  # bounds the memory of the index
LOW_WATER: Final = 0.95  # evict down to this part of the limit
BATCH: Final = 256  # files between two looks at the event loop
FULL_SECONDS: Final = 10.0  # without the disk after it failed and nothing could be dropped


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheUsage:
    bytes: int  # on disk
    limit: int
    files: int
    open_versions: int
    hits: int  # reads answered from the cache
    misses: int  # reads that waited
    fetches: int  # requests to the store
    fetch_bytes: int
    evicted_bytes: int
    damaged_bytes: int
    disk_errors: int
    is_bypassed: bool  # the cache's disk is full or broken


class BlockCache:
    """Built when the mount starts; `run` must be running before a version is read.

    Raises: LocalStateError if the directory is not writable, in use by another process, or of a newer format.
    """

    def __init__(
        self,
        store: ObjectStore,
        config: CacheConfig,
        *,
        checksum: Checksum = CRC32C,
        run_sync: RunSync = on_thread,
        files_max: int = FILES_OPEN_MAX,
    ) -> None:
        self._disk = CacheDisk(
            config=config,
            directory=CacheDirectory(config.directory),
            checksum=checksum,
            run_sync=run_sync,
            limiter=trio.CapacityLimiter(THREADS_MAX),
            files_max=files_max,
        )
        self._fetching = Fetching(store)
        self._shared = Shared(self._disk, self._fetching)
        self._versions = self._shared.versions

    def close(self) -> None:
        """Give the directory to others; after `run` ended."""
        self._disk.directory.close()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve: fetch, keep to the limit, find what earlier processes left. Ends by cancellation."""
        disk, fetching = self._disk, self._fetching
        try:
            async with trio.open_nursery() as nursery:
                fetching.nursery, fetching.token = nursery, trio.lowlevel.current_trio_token()
                task_status.started()
                nursery.start_soon(lasting, "taking up the cache", self._take_up)
                while True:
                    await disk.work.wait()
                    disk.work = trio.Event()
                    with surviving("cache limit") as outcome:
                        await self._make_room()
                    if outcome.failure is not None:
                        await trio.sleep(PAUSE_SECONDS)
                        disk.work.set()
        finally:
            fetching.nursery = None

    # -- versions

    def open(self, key: ObjectKey, etag: ETag, size: int) -> Version:
        """The version; its bytes are fetched when they are read."""
        name = self._name(key, etag)
        version = self._versions.get(name)
        if version is None:
            version = self._versions[name] = Version(self._shared, key, etag, size, name)
        else:
            version.refs += 1
        return version

    def adopt(
        self,
        key: ObjectKey,
        etag: ETag,
        size: int,
        source: str | Path,
        covered: Extents,
        *,
        base: tuple[ObjectKey, ETag, int] | None = None,
        base_bytes: int = 0,
    ) -> None:
        """What was just uploaded becomes the blocks of a version: no download. Atomic.

        The bytes in `covered` are in the local file `source`, which is moved away or left; nobody may write to it
        any more. Those below `base_bytes` that are not in `covered` are the same as in the version `base`
        (key, ETag, size), whose blocks are taken over unless it is open.
        """
        version = self.open(key, etag, size)
        try:
            path = None if base is None or covered.covers(0, size) else self._inherit(version, base)
            if base is None or path is None:
                adoption.adopt(self._shared, version, os.fspath(source), covered)
            else:
                old = Layout(base[2], self._disk.config.block_bytes)
                same = Extents(covered.gaps(0, min(base_bytes, base[2], size)))
                adoption.graft(self._shared, version, path, old, os.fspath(source), covered, same)
        except OSError as exc:
            log.info("bytes of key=%s are not kept: %s", key, exc)
        finally:
            version.close()

    def _inherit(self, version: Version, base: tuple[ObjectKey, ETag, int]) -> str | None:
        """Take the file of `base` out of the cache for a version that has none, if nobody needs it."""
        directory, name = self._disk.directory, self._name(base[0], base[1])
        if self._fetching.nursery is None or self._disk.is_full or version.name in directory.entries:
            return None
        if name in self._versions or name not in directory.entries:
            return None
        return directory.discard(name)

    def rekey(self, old_key: ObjectKey, old_etag: ETag, new_key: ObjectKey, new_etag: ETag) -> None:
        """The same bytes have another name in the store: blocks and open versions go on under it."""
        versions, directory = self._versions, self._disk.directory
        old_name, new_name = self._name(old_key, old_etag), self._name(new_key, new_etag)
        if old_name == new_name:
            return
        version = versions.get(old_name)
        if version is None and old_name not in directory.entries:
            return
        if new_name in versions:  # opened already: it has the name, the old one goes on without
            if version is not None:
                version.rename(new_key, new_etag, old_name)
                version.is_forgotten = True
            return
        directory.move(old_name, new_name)
        if version is not None:
            version.rename(new_key, new_etag, new_name)
            versions[new_name] = versions.pop(old_name)

    def forget(self, key: ObjectKey, etag: ETag) -> None:
        """The version is of no use any more; who has it open goes on."""
        name = self._name(key, etag)
        if (version := self._versions.get(name)) is not None:
            version.is_forgotten = True
        elif name in self._disk.directory.entries:
            self._disk.discard(name)

    def limit(self, size_max: int) -> None:
        """Keep to another limit from now on; what is too much goes at once."""
        self._disk.config = replace(self._disk.config, size_max=size_max)
        self._disk.work.set()

    def usage(self) -> CacheUsage:
        disk, counts = self._disk, self._disk.counts
        return CacheUsage(
            bytes=disk.directory.used_bytes,
            limit=disk.config.size_max,
            files=len(disk.directory.entries),
            open_versions=len(self._versions),
            hits=counts.hits,
            misses=counts.misses,
            fetches=counts.fetches,
            fetch_bytes=counts.fetch_bytes,
            evicted_bytes=counts.evicted_bytes,
            damaged_bytes=counts.damaged_bytes,
            disk_errors=counts.disk_errors,
            is_bypassed=disk.is_full,
        )

    def _name(self, key: ObjectKey, etag: ETag) -> str:
        return file_name(key, etag, self._disk.config.block_bytes, self._disk.checksum.name)

    # -- keeping to the limit

    async def _take_up(self) -> None:
        """Enter what earlier processes left; until then their files are found by name only."""
        directory = self._disk.directory
        found = await self._disk.run(directory.scan)
        while found:  # the last used first, each batch older than all before
            directory.add_found(found[-BATCH:])
            del found[-BATCH:]
            await trio.lowlevel.checkpoint()
        self._disk.work.set()

    async def _make_room(self) -> None:
        """Keep to the limits; after the disk failed, see to it that it is tried again."""
        disk = self._disk
        used = disk.directory.used_bytes
        if disk.is_full and disk.needs_room:
            await self._evict(min(used - max(used // 10, 16 * MIB), disk.config.size_max))
        elif used > disk.config.size_max or len(disk.directory.entries) > FILES_MAX:
            await self._evict(int(disk.config.size_max * LOW_WATER))
        if disk.trash:
            trash, disk.trash = disk.trash, []
            await disk.run(partial(unlink_all, trash), abandon_on_cancel=False)
        if disk.is_full:
            if disk.directory.used_bytes >= used:
                await trio.sleep(FULL_SECONDS)
            disk.is_full = False

    async def _evict(self, goal_bytes: int) -> None:
        """Drop the least recently used until `goal_bytes` are left: first files nobody has open, then blocks."""
        disk = self._disk
        before = disk.directory.used_bytes
        for count, name in enumerate(self._idle(goal_bytes), 1):
            if name not in self._versions:
                disk.discard(name)
            if count % BATCH == 0:
                await trio.lowlevel.checkpoint()
        for version in list(self._versions.values()):
            await version.shrink(disk.directory.used_bytes - goal_bytes)
        disk.counts.evicted_bytes += max(0, before - disk.directory.used_bytes)

    def _idle(self, goal_bytes: int) -> list[str]:
        """The files to drop, out of those that are not open."""
        directory = self._disk.directory
        excess_bytes = directory.used_bytes - goal_bytes
        excess_files = len(directory.entries) - FILES_MAX
        names: list[str] = []
        for name, entry in directory.entries.items():
            if excess_bytes <= 0 and excess_files <= 0:
                break
            if name not in self._versions:
                names.append(name)
                excess_bytes -= entry.bytes
                excess_files -= 1
        return names

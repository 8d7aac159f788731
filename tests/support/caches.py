"""Block caches over a fake store, with their threads replaced or not, and a store that tells what was asked."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import trio
import trio.testing

from phfs_fuse.cache.block_cache import BlockCache, Version
from phfs_fuse.cache.disk import RunSync
from phfs_fuse.config.model import CacheConfig
from phfs_fuse.extents import Extent
from phfs_fuse.store.base import ObjectStore, Sink
from phfs_fuse.types import KIB, ETag, ObjectKey
from tests.support.fake_store import FakeStore

BLOCK = 4 * KIB
KEY = ObjectKey("groups/a/file")
T = TypeVar("T")


async def inline(call: Callable[[], T], *, abandon_on_cancel: bool, limiter: trio.CapacityLimiter) -> T:
    """Stands for a thread: the same call, without one."""
    async with limiter:
        return call()


def content(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


class RangeStore(FakeStore):
    """Remembers the range of every get in `asked`."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[Extent] = []

    async def get(self, key: ObjectKey, start: int, end: int, *, etag: ETag | None, sink: Sink) -> None:
        self.asked.append((start, end))
        await super().get(key, start, end, etag=etag, sink=sink)

    def open(self, cache: BlockCache, key: ObjectKey = KEY) -> Version:
        """The newest version of `key`."""
        found = self.objects[key]
        return cache.open(key, found.etag, len(found.data))


@asynccontextmanager
async def running(
    store: ObjectStore,
    directory: Path,
    *,
    run_sync: RunSync = inline,
    block_bytes: int = BLOCK,
    window_bytes_max: int = 1 << 20,
    size_max: int = 1 << 30,
) -> AsyncIterator[BlockCache]:
    """A cache in `directory` that has looked through what is there."""
    config = CacheConfig(
        directory=directory, block_bytes=block_bytes, window_bytes_max=window_bytes_max, size_max=size_max
    )
    cache = BlockCache(store, config, run_sync=run_sync)
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(cache.run)
            await trio.testing.wait_all_tasks_blocked()
            yield cache
            nursery.cancel_scope.cancel()
    finally:
        cache.close()

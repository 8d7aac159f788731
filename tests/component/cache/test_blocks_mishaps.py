"""Readers, evictions, damage and restarts in any order: always the bytes of the store."""

from __future__ import annotations

import random
from contextlib import suppress
from pathlib import Path

import pytest
from trio.testing import wait_all_tasks_blocked

from phfs_fuse.cache.block_cache import BlockCache
from phfs_fuse.errors import PhfsError
from phfs_fuse.extents import Extents
from phfs_fuse.types import MIB, ObjectKey
from tests.component.cache.samples import DAMAGE, Change, files, staged
from tests.support.caches import BLOCK, RangeStore, content, running
from tests.support.fault_store import FaultStore


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

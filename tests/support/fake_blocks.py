"""A block cache without a cache: every read asks the store. Same calls as
`phfs_fuse.cache.block_cache.BlockCache`."""

from __future__ import annotations

import os
from pathlib import Path

from phfs_fuse.errors import NotFound, StaleVersion, VersionChanged
from phfs_fuse.extents import Extents
from phfs_fuse.store.base import ObjectStore
from phfs_fuse.types import ETag, ObjectKey


class FakeVersion:
    def __init__(self, blocks: FakeBlocks, key: ObjectKey, etag: ETag, size: int) -> None:
        self.blocks, self.key, self.etag, self.size = blocks, key, etag, size

    def read_now(self, start: int, end: int) -> bytes | None:
        found = self.blocks.adopted.get((self.key, self.etag))
        return None if found is None else found[start:end]

    async def read(self, start: int, end: int) -> bytes:
        if (found := self.read_now(start, end)) is not None:
            return found
        out = bytearray()
        try:
            await self.blocks.store.get(
                self.key, start, min(end, self.size), etag=self.etag, sink=lambda _, chunk: out.extend(chunk)
            )
        except (VersionChanged, NotFound) as exc:
            raise StaleVersion("read", self.key) from exc
        return bytes(out)

    async def copy_to(self, fd: int, start: int, end: int) -> None:
        os.pwrite(fd, await self.read(start, end), start)

    def close(self) -> None:
        self.blocks.open_versions -= 1


class FakeBlocks:
    def __init__(self, store: ObjectStore) -> None:
        self.store = store
        self.adopted: dict[tuple[ObjectKey, ETag], bytes] = {}
        self.open_versions = 0

    def open(self, key: ObjectKey, etag: ETag, size: int) -> FakeVersion:
        self.open_versions += 1
        return FakeVersion(self, key, etag, size)

    def adopt(
        self,
        key: ObjectKey,
        etag: ETag,
        size: int,
        path: str | Path,
        covered: Extents,
        *,
        base: tuple[ObjectKey, ETag, int] | None = None,
        base_bytes: int = 0,
    ) -> None:
        if covered.covers(0, size):
            self.adopted[key, etag] = Path(path).read_bytes()

    def rekey(self, old_key: ObjectKey, old_etag: ETag, new_key: ObjectKey, new_etag: ETag) -> None:
        if (found := self.adopted.pop((old_key, old_etag), None)) is not None:
            self.adopted[new_key, new_etag] = found

"""Short words for the tests: a store, a prefix, and calls on keys below it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from phfs_fuse.store.base import Body, Expect, Listing, ObjectInfo, ObjectStore
from phfs_fuse.types import ETag, ObjectKey


@dataclass(frozen=True, slots=True)
class Place:
    store: ObjectStore
    prefix: str
    store_name: str  # as in conftest.STORES

    def key(self, name: str) -> ObjectKey:
        return ObjectKey(self.prefix + name)

    async def put(
        self,
        name: str,
        body: Body = b"",
        metadata: Mapping[str, str] | None = None,
        expect: Expect | None = None,
    ) -> ObjectInfo:
        return await self.store.put(self.key(name), body, metadata or {}, expect=expect)

    async def head(self, name: str) -> ObjectInfo:
        return await self.store.head(self.key(name))

    async def read(self, name: str, start: int, end: int, etag: ETag | None = None) -> bytes:
        """The bytes, having checked that the sink got them in order and without gaps."""
        return await read(self.store, self.key(name), start, end, etag)

    async def names(self) -> list[str]:
        page = await self.list()
        return [info.key.removeprefix(self.prefix) for info in page.objects]

    async def list(self, under: str = "", *, delimiter: bool = False) -> Listing:
        return await self.store.list(self.key(under), delimiter=delimiter)


async def read(store: ObjectStore, key: ObjectKey, start: int, end: int, etag: ETag | None = None) -> bytes:
    got = bytearray()

    def sink(offset: int, chunk: bytes | memoryview) -> None:
        assert offset == start + len(got)
        got.extend(chunk)

    await store.get(key, start, end, etag=etag, sink=sink)
    return bytes(got)

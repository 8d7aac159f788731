"""Asks the store about single keys, and for what a listing leaves open. Owns the limit of HEADs that are under way at
a time.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Final

import trio

from phfs_fuse import keys
from phfs_fuse.errors import (
    BucketNotFound,
    ClockOff,
    CredentialsRefused,
    IllegalName,
    InvalidArgument,
    NotFound,
    PhfsError,
    StoreUnavailable,
)
from phfs_fuse.pending.tombstones import Tombstones
from phfs_fuse.store.base import ObjectInfo, ObjectStore
from phfs_fuse.tasks import gather
from phfs_fuse.tree.node import Node
from phfs_fuse.tree.questions import Question
from phfs_fuse.types import ObjectKey

log = logging.getLogger(__name__)

PAGES_MAX = 3  # of what is below a folder that is deleted here, at each look for what others have stored there
WHOLE_STORE: Final = (BucketNotFound, ClockOff, CredentialsRefused)  # no answers about one object
HEADS_MAX = 32  # at a time, where a listing does not carry the metadata


class StoreQueries:
    def __init__(self, store: ObjectStore, gone: Tombstones) -> None:
        self._store = store
        self._gone = gone
        self._heads = trio.CapacityLimiter(HEADS_MAX)

    async def head(self, key: ObjectKey) -> ObjectInfo | None:
        try:
            async with self._heads:
                return await self._store.head(key)
        except NotFound:
            return None

    async def file(self, key: ObjectKey, listed: ObjectInfo | None = None) -> ObjectInfo | None:
        """The object, as it was `listed` where HEAD of it alone is refused or makes no sense: it then has no
        metadata. Raises: what is so for the whole store."""
        try:
            return await self.head(key)
        except WHOLE_STORE:
            raise
        except PhfsError as exc:
            if listed is None or isinstance(exc, StoreUnavailable):  # is the store there?
                page = await self._store.list(key, delimiter=True, count_max=1)
                listed = next((info for info in page.objects if info.key == key), None)
            if listed is None:
                return None
            log.info("shown without its attributes: %s", exc)
            return replace(listed, metadata={}, is_sealed=isinstance(exc, InvalidArgument))

    async def there(self, keys: Sequence[str]) -> list[str]:
        """Those of `keys` that are objects."""
        found = await gather([partial(self.file, ObjectKey(key)) for key in keys])
        return [key for key, info in zip(keys, found, strict=True) if info is not None]

    async def folder(self, key: ObjectKey, question: Question) -> tuple[bool, ObjectInfo | None]:
        """Whether anything is below `key` that is not deleted here, and its marker with metadata if there is one."""
        if self._gone.outdates(key, question.seq):
            async with self._heads:
                return await self._has_others(key, question), None
        page = await self._store.list(key, delimiter=False, count_max=1)
        if not page.objects or page.objects[0].key != key:
            return bool(page.objects or page.unreadable), None
        marker = page.objects[0]
        return True, marker if marker.metadata is not None else await self.file(key, marker)

    async def _has_others(self, key: ObjectKey, question: Question) -> bool:
        """Whether another client has stored something below `key`, which is deleted here. Where very much waits for
        its deletion that is not looked for to the end."""
        token: str | None = None
        for _ in range(PAGES_MAX):
            page = await self._store.list(key, delimiter=False, token=token)
            for found in page.objects:
                if found.key != key and not self._gone.hides(found.key, found.etag, question.seq):
                    return True
            if (token := page.next_token) is None:
                break
        if (gone := self._gone.get(key)) is not None:
            gone.hid = True
        return False

    async def folders(
        self, parent: Node, prefix: str, segments: Sequence[str], question: Question, *, surely: bool = False
    ) -> list[tuple[str, ObjectInfo | None]]:
        """Those of the listed `segments` that are folders, with their markers; none that is deleted here. Some stores
        list what is none: an object that MinIO is deleting just now shows as a folder for a moment, one with versions
        for ever. `surely`: they were not listed."""

        async def one(segment: str) -> tuple[bool, ObjectInfo | None]:
            key = ObjectKey(f"{prefix}{segment}/")
            if surely or self._store.lists_ghosts or self._is_doubtful(parent, prefix, segment, question):
                return await self.folder(key, question)
            return True, await self.file(key)

        found = await gather([partial(one, segment) for segment in segments])
        return [
            (segment, None if marker is not None and marker.key in self._gone else marker)
            for segment, (is_there, marker) in zip(segments, found, strict=True)
            if is_there
        ]

    def _is_doubtful(self, parent: Node, prefix: str, segment: str, question: Question) -> bool:
        kid = (parent.kids or {}).get(keys.name_of(segment))
        is_file = kid is not None and not kid.is_dir
        key = prefix + segment
        return is_file or self._gone.outdates(key, question.seq) or self._gone.outdates(key + "/", question.seq)

    async def with_metadata(self, parent: Node, prefix: str, objects: Sequence[ObjectInfo]) -> Sequence[ObjectInfo]:
        """The page with metadata; what the listing lacks is asked for, unless the version is known already."""
        infos: list[ObjectInfo | None] = list(objects)

        async def one(index: int) -> None:
            infos[index] = await self.file(objects[index].key, objects[index])

        await gather(
            [
                partial(one, index)
                for index, info in enumerate(objects)
                if info.metadata is None and not _same_version(parent, prefix, info)
            ]
        )
        return [info for info in infos if info is not None]


def _same_version(parent: Node, prefix: str, info: ObjectInfo) -> bool:
    try:
        kid = (parent.kids or {}).get(keys.name_of(info.key[len(prefix) :]))
    except IllegalName:
        return True  # left out anyway
    return kid is not None and (base := kid.base) is not None and base.etag == info.etag

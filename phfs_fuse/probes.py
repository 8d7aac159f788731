"""Asks the store about single keys, and for what a listing leaves open. Owns the limit of HEADs that are under way at
a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import trio

from phfs_fuse import keys
from phfs_fuse.errors import IllegalName, NotFound
from phfs_fuse.gone import GoneKeys
from phfs_fuse.nodes import Node
from phfs_fuse.questions import Question
from phfs_fuse.store.base import ObjectInfo, ObjectStore
from phfs_fuse.tasks import gather
from phfs_fuse.types import ObjectKey

HEADS_MAX = 32  # at a time, where a listing does not carry the metadata


class Probes:
    def __init__(self, store: ObjectStore, gone: GoneKeys) -> None:
        self._store = store
        self._gone = gone
        self._heads = trio.CapacityLimiter(HEADS_MAX)

    async def head(self, key: ObjectKey) -> ObjectInfo | None:
        try:
            async with self._heads:
                return await self._store.head(key)
        except NotFound:
            return None

    async def folder(self, key: ObjectKey) -> tuple[bool, ObjectInfo | None]:
        """Whether anything is below `key`, and its marker with metadata if there is one."""
        page = await self._store.list(key, delimiter=False, count_max=1)
        if not page.objects or page.objects[0].key != key:
            return bool(page.objects), None
        marker = page.objects[0]
        return True, marker if marker.metadata is not None else await self.head(key)

    async def markers(self, prefix: str, segments: Sequence[str]) -> list[ObjectInfo | None]:
        """Of the folders `segments` below `prefix`."""
        return await gather([partial(self.head, ObjectKey(prefix + segment + "/")) for segment in segments])

    async def real_folders(self, parent: Node, prefix: str, segments: Sequence[str], question: Question) -> list[str]:
        """Without those that are none: an object that MinIO is deleting just now shows as a folder for a moment."""
        doubtful = [segment for segment in segments if self._was_file(parent, prefix, segment, question)]
        probes = await gather([partial(self.folder, ObjectKey(f"{prefix}{s}/")) for s in doubtful])
        none = {segment for segment, (is_there, _) in zip(doubtful, probes, strict=True) if not is_there}
        return [segment for segment in segments if segment not in none]

    def _was_file(self, parent: Node, prefix: str, segment: str, question: Question) -> bool:
        kid = (parent.kids or {}).get(keys.name_of(segment))
        is_file = kid is not None and not kid.is_dir
        return is_file or self._gone.hides(prefix + segment, question.seq)

    async def with_metadata(self, parent: Node, prefix: str, objects: Sequence[ObjectInfo]) -> Sequence[ObjectInfo]:
        """The page with metadata; what the listing lacks is asked for, unless the version is known already."""
        infos: list[ObjectInfo | None] = list(objects)

        async def one(index: int) -> None:
            infos[index] = await self.head(objects[index].key)

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

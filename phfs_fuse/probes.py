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

PAGES_MAX = 3  # of what is below a folder that is deleted here, at each look for what others have stored there
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

    async def folder(self, key: ObjectKey, question: Question) -> tuple[bool, ObjectInfo | None]:
        """Whether anything is below `key` that is not deleted here, and its marker with metadata if there is one."""
        if self._gone.outdates(key, question.seq):
            async with self._heads:
                return await self._has_others(key, question), None
        page = await self._store.list(key, delimiter=False, count_max=1)
        if not page.objects or page.objects[0].key != key:
            return bool(page.objects), None
        marker = page.objects[0]
        return True, marker if marker.metadata is not None else await self.head(key)

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

    async def markers(self, prefix: str, segments: Sequence[str]) -> list[ObjectInfo | None]:
        """Of the folders `segments` below `prefix`; none that is deleted here."""
        found = await gather([partial(self.head, ObjectKey(prefix + segment + "/")) for segment in segments])
        return [None if info is not None and info.key in self._gone else info for info in found]

    async def real_folders(self, parent: Node, prefix: str, segments: Sequence[str], question: Question) -> list[str]:
        """Without those that are deleted here, and those that are none: an object that MinIO is deleting just now
        shows as a folder for a moment."""
        doubtful = [segment for segment in segments if self._is_doubtful(parent, prefix, segment, question)]
        probes = await gather([partial(self.folder, ObjectKey(f"{prefix}{s}/"), question) for s in doubtful])
        none = {segment for segment, (is_there, _) in zip(doubtful, probes, strict=True) if not is_there}
        return [segment for segment in segments if segment not in none]

    def _is_doubtful(self, parent: Node, prefix: str, segment: str, question: Question) -> bool:
        kid = (parent.kids or {}).get(keys.name_of(segment))
        is_file = kid is not None and not kid.is_dir
        key = prefix + segment
        return is_file or self._gone.outdates(key, question.seq) or self._gone.outdates(key + "/", question.seq)

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

"""Names that are in the store before it is said that they were free: exclusive creation between mounts.

Owns which names are being made; one at a time makes a name.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import trio

from phfs_fuse.errors import Exists, NotFound, StoreTimeout, VersionChanged
from phfs_fuse.pending.changes import Changes
from phfs_fuse.pending.queue import UploadQueue
from phfs_fuse.store.base import Expect, ObjectInfo, ObjectStore
from phfs_fuse.tree.node import Node
from phfs_fuse.types import ObjectKey

CLAIM_SECONDS = 20.0  # for what was removed under a name to vanish, before the name is made anew


class ExclusiveCreates:
    def __init__(self, *, store: ObjectStore, changes: Changes, queue: UploadQueue) -> None:
        self._store = store
        self._changes = changes
        self._queue = queue
        self._making: dict[tuple[int, bytes], trio.Lock] = {}

    @asynccontextmanager
    async def making(self, parent: Node, name: bytes) -> AsyncIterator[None]:
        at = (parent.ino, name)
        lock = self._making.setdefault(at, trio.Lock())
        async with lock:
            try:
                yield
            finally:
                if not lock.statistics().tasks_waiting:
                    self._making.pop(at, None)

    async def claim(self, key: ObjectKey, body: bytes, metadata: Mapping[str, str]) -> ObjectInfo:
        """Store an object now, where there is none. What a call without an answer may have left is removed later.
        The caller notes what the name is now, and in the same transaction that the attempt was `answered`: a worker
        may die before that, and the next one is asked for the name again.
        Raises: Exists, PhfsError (StoreTimeout while a deletion of the same key waits for the store)."""
        await self._settle(key)
        self._queue.claim(key)
        try:
            self._changes.attempts.claim(key, len(body), metadata)
            info = await self._store.put(key, body, metadata, expect=Expect(None))
        except VersionChanged as exc:
            self._changes.attempts.answered(key)
            self._changes.met(key)
            raise Exists("create", key, "somebody else has made it") from exc
        except BaseException:
            self._changes.give_back(key, None)
            raise
        finally:
            self._queue.free(key)
        return info

    async def _settle(self, key: ObjectKey) -> None:
        """Return when no deletion of `key`, and no other request on it, is to come or under way."""
        with trio.move_on_after(CLAIM_SECONDS):
            while self._queue.is_busy(key) or key in self._changes.gone:
                if not self._queue.is_busy(key) and (gone := self._changes.gone.get(key)) is not None:
                    self._queue.push(gone, 0.0)
                await self._changes.endings.settled.wait()
            return
        raise StoreTimeout("create", key, "what was removed there before is not gone from the store yet")

    def taken(self, parent: Node, name: bytes, info: ObjectInfo) -> Node | None:
        """The node that shows `info`, which was made for us just now, if somebody has looked at it before us.
        Raises: Exists, NotFound: the name or its directory are otherwise now, and `info` goes."""
        node = (parent.kids or {}).get(name)
        if node is not None and info.etag in (node.marker, node.base.etag if node.base else None):
            return node
        if node is not None or parent.detached:
            self.give_back(info)
            kind = NotFound if node is None else Exists
            raise kind("create", name.decode(errors="replace"), "changed meanwhile")
        return None

    def give_back(self, info: ObjectInfo) -> None:
        self._changes.give_back(info.key, info.etag)

"""Directory markers: whether the store shall have one, and the request for that. Owns no state.

A marker is there while the directory is empty or has attributes of its own. One that holds bytes, as others may store
it, is never written over or deleted: the bytes are a file of the directory (`Node.body`), whose object it is.
"""

from __future__ import annotations

import logging
from contextlib import suppress

from phfs_fuse.attrs import others, to_metadata
from phfs_fuse.errors import NotFound, PhfsError, StoreUnavailable, VersionChanged
from phfs_fuse.pending.changes import Changes
from phfs_fuse.pending.queue import UploadQueue
from phfs_fuse.state.refusal import is_final
from phfs_fuse.store.base import NAME_REFUSED, Expect, ObjectInfo, ObjectStore
from phfs_fuse.tree.dirty import DirtyFile, Event, State
from phfs_fuse.tree.inodes import Inodes
from phfs_fuse.tree.node import Base, Node
from phfs_fuse.types import ETag, ObjectKey

log = logging.getLogger(__name__)

TRIES_MAX = 3  # while others store or remove it


class DirectoryMarkers:
    def __init__(self, *, store: ObjectStore, inodes: Inodes, changes: Changes, queue: UploadQueue) -> None:
        self._store = store
        self._inodes = inodes
        self._changes = changes
        self._queue = queue

    async def bring(self, node: Node, key: ObjectKey) -> ETag | None:
        """Have the store keep the marker, or not, as the directory is now. Returns its version.
        Raises: PhfsError, OSError of the journal."""
        if not node.own_attrs and not node.kids:
            node.unseen = await self._has_more(node, key)
        if node.own_attrs or node.body is not None or not (node.kids or node.unseen):
            self._changes.attempts.begin(key, 0, {})
            try:
                return await self._put(node, key)
            except NAME_REFUSED as exc:
                if node.own_attrs:
                    raise
                log.warning("directory key=%s goes once nobody looks at it: the store takes no marker (%s)", key, exc)
                node.unseen = True  # as if it had something in it: no marker is wanted
                return None
        if node.marker is not None or key in self._changes.attempts:
            try:
                await self._delete(node, key)
            except PhfsError as exc:
                if not is_final(exc):
                    raise
                log.info("the marker key=%s stays: %s", key, exc)
                node.own_attrs = True  # as one that is needed: it is not asked for again
                return node.marker
        return None

    async def _put(self, node: Node, key: ObjectKey) -> ETag | None:
        """Store it, with all that others gave to the one that is there. Returns its version; None where that holds
        bytes, which stay, unless they were removed here."""
        metadata = to_metadata(node.attrs)
        is_there = node.marker is not None or node.body is not None
        for _ in range(TRIES_MAX):
            try:
                if not is_there:
                    return (await self._store.put(key, b"", metadata, expect=Expect(None))).etag
                found = await self._store.properties(key, None)
                kept, expect = {**others(found.metadata, same_bytes=True), **metadata}, Expect(found.etag)
                if not found.size or found.etag == node.marker:
                    return (await self._store.put(key, b"", kept, expect=expect, properties=found)).etag
                assert found.etag is not None
                info = await self._store.copy(key, found.etag, key, found.size, kept, expect=expect, properties=found)
                self._has_body(node, info)
                return None
            except VersionChanged:
                is_there = not is_there or await self._is_there(key)
        raise StoreUnavailable("put", key, "other clients change the marker all the time")

    async def _is_there(self, key: ObjectKey) -> bool:
        try:
            await self._store.head(key, surely=True)
        except NotFound:
            return False
        return True

    def _has_body(self, node: Node, info: ObjectInfo) -> None:
        """The marker of `node` holds bytes, and is this version."""
        body = node.body
        if body is None:
            node.unseen, node.own_attrs = True, False  # the next look at it finds its file
            self._inodes.incomplete(node)
        elif body.dirty is None:
            body.base = Base(info.key, info.etag, info.size)
            self._changes.refreshed(body)

    async def _delete(self, node: Node, key: ObjectKey) -> None:
        """Of another version only one without bytes."""
        try:
            if node.marker is not None:
                return await self._store.delete(key, expect=Expect(node.marker))
        except VersionChanged:
            pass
        with suppress(VersionChanged):
            found = await self._store.properties(key, None)
            if not found.size:
                return await self._store.delete(key, expect=Expect(found.etag))
        self._inodes.incomplete(node)

    def stored(self, node: Node, dirty: DirtyFile, key: ObjectKey, marker: ETag | None) -> None:
        with self._changes.noting():
            self._stored(node, dirty, key, marker)
        self._changes.endings.announce(node)

    def _stored(self, node: Node, dirty: DirtyFile, key: ObjectKey, marker: ETag | None) -> None:
        self._changes.keep(node)
        dirty.target = None
        dirty.on(Event.STORED)
        self._changes.files.accepted(node)
        self._changes.touch(node)
        self._changes.attempts.answered(key)
        if node.detached or self._inodes.key(node) != key:
            self._changes.landed(key, marker)
            if node.detached:
                self._changes.abandon(node)
                return
        else:
            node.marker = marker
        if dirty.state is State.CLEAN:
            self._changes.files.clean(node)
            self._changes.review_marker(node)  # a child may have come or gone meanwhile
        else:
            self._queue.schedule(node)

    async def _has_more(self, node: Node, key: ObjectKey) -> bool:
        """Whether the store has more below the directory than what is removed here, or was while it was asked."""
        token: str | None = None
        with self._inodes.asking(node, self._changes.seq) as question:
            while True:
                page = await self._store.list(key, delimiter=False, token=token)
                for found in page.objects:
                    if (
                        found.key != key
                        and not self._queue.is_busy(found.key)
                        and not self._changes.gone.hides(found.key, found.etag, question.seq)
                    ):
                        return True
                if (token := page.next_token) is None:
                    return False

"""Directory markers: whether the store shall have one, and the request for that. Owns no state.

A marker is there while the directory is empty or has attributes of its own.
"""

from __future__ import annotations

import logging

from phfs_fuse.attrs import to_metadata
from phfs_fuse.changes import Changes
from phfs_fuse.dirty import DirtyFile, Event, State
from phfs_fuse.errors import PhfsError
from phfs_fuse.inodes import Inodes
from phfs_fuse.nodes import Node
from phfs_fuse.refusal import is_final
from phfs_fuse.store.base import NAME_REFUSED, ObjectStore
from phfs_fuse.types import ETag, ObjectKey
from phfs_fuse.uploadqueue import UploadQueue

log = logging.getLogger(__name__)


class Markers:
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
        if node.own_attrs or not (node.kids or node.unseen):
            self._changes.attempts.begin(key, 0, {})
            try:
                return (await self._store.put(key, b"", to_metadata(node.attrs), expect=None)).etag
            except NAME_REFUSED as exc:
                if node.own_attrs:
                    raise
                log.warning("directory key=%s goes once nobody looks at it: the store takes no marker (%s)", key, exc)
                node.unseen = True  # as if it had something in it: no marker is wanted
                return None
        if node.marker is not None or key in self._changes.attempts:
            try:
                await self._store.delete(key)
            except PhfsError as exc:
                if not is_final(exc):
                    raise
                log.info("the marker key=%s stays: %s", key, exc)
                node.own_attrs = True  # as one that is needed: it is not asked for again
                return node.marker
        return None

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

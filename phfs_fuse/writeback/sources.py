"""Who still needs the bytes that the store has under a key: what has to wait for them, and how they get here.

A renamed file needs the bytes of its old key until it was copied, an unlinked one that is open for as long as it is.
Owns the files whose bytes are being fetched for that; the rule itself (`users`) is kept by `changes`.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable
from contextlib import suppress

import trio

from phfs_fuse.cache.block_cache import BlockCache
from phfs_fuse.errors import PhfsError, StaleVersion, VersionChanged
from phfs_fuse.pending.changes import Changes
from phfs_fuse.pending.queue import UploadQueue, Work
from phfs_fuse.state.refusal import is_final
from phfs_fuse.store.base import ObjectStore
from phfs_fuse.tasks import survived, unforeseen
from phfs_fuse.tree.dirty import Event, State
from phfs_fuse.tree.inodes import Inodes
from phfs_fuse.tree.node import Node
from phfs_fuse.types import ObjectKey
from phfs_fuse.writeback.uploader import Fill

log = logging.getLogger(__name__)


class Sources:
    def __init__(
        self, *, store: ObjectStore, inodes: Inodes, blocks: BlockCache, changes: Changes, queue: UploadQueue
    ) -> None:
        self._store = store
        self._inodes = inodes
        self._blocks = blocks
        self._changes = changes
        self._queue = queue
        self._fetching: set[Node] = set()
        self._filling: set[Node] = set()  # files whose bottom layer is being completed
        self.on_refused: Callable[[Node, PhfsError], None] | None = None  # a named one, whose bytes nobody gives
        self.nursery: trio.Nursery | None = None  # of the write-back, while it runs

    def is_filling(self, node: Node) -> bool:
        """Whether its bottom layer is being completed: no upload may start."""
        return node in self._filling

    def blocked(self, key: ObjectKey, work: Work) -> bool:
        """Park `work` if `key` is busy, or if another file still needs what the store has there."""
        users = self._changes.users.of(key)
        if not self._queue.is_busy(key) and not (users and users != {work}):
            return False
        self._queue.park(key, work)
        for user in list(users or ()):
            if user is not work and (user.detached or self._waits_for(user, work)):
                self._fetch_soon(user)
        return True

    def _waits_for(self, node: Node, work: Work) -> bool:
        """Whether `node` waits (maybe over others) for `work`: a ring of renames."""
        seen: set[Node] = set()
        todo = [node]
        while todo:
            at = todo.pop()
            if at is work:
                return True
            if at in seen or at.detached:
                continue
            seen.add(at)
            todo.extend(self._changes.users.of(self._inodes.key(at)))
        return False

    def filler(self, node: Node) -> Fill:
        async def fill(fd: int, start: int, end: int) -> None:
            assert node.base is not None
            version = self._blocks.open(node.base.key, node.base.etag, node.base.size)
            try:
                await version.copy_to(fd, start, end)
            finally:
                version.close()

        return fill

    def _fetch_soon(self, node: Node) -> None:
        """Fetch the stored bytes that `node` needs, so that their key is free to change."""
        if node.dirty is not None and node.dirty.uploading:
            return  # it will need them no more when that ends
        if self.nursery is not None and node not in self._fetching:
            self._fetching.add(node)
            self.nursery.start_soon(survived, "fetching", self._fetch, node)

    async def _fetch(self, node: Node) -> None:
        """Retried until it worked, the version is gone, or nobody needs it any more."""
        try:
            for attempt in itertools.count(1):
                try:
                    if node in self._changes.users and not (node.dirty and node.dirty.uploading):
                        await self.copy_base(node)
                    return
                except StaleVersion as exc:
                    log.warning("bytes of ino=%d are lost, somebody else has replaced them: %s", node.ino, exc)
                    self._changes.users.untrack(node)
                    return
                except Exception as exc:
                    if isinstance(exc, PhfsError) and is_final(exc):
                        self._give_up(node, exc)
                        return
                    if not isinstance(exc, (PhfsError, OSError)):
                        unforeseen("fetching", exc)
                    log.warning("bytes of ino=%d cannot be fetched yet: %s", node.ino, exc)
                    await trio.sleep(self._queue.backoff(attempt))
        finally:
            self._fetching.discard(node)

    def _give_up(self, node: Node, exc: PhfsError) -> None:
        """The store gives no bytes: what waits for them goes on without, or `node` gets its old name back."""
        log.warning("bytes of ino=%d cannot be fetched: %s", node.ino, exc)
        if node.detached:
            self._changes.users.untrack(node)
        elif self.on_refused is not None:
            self.on_refused(node, exc)

    async def copy_base(self, node: Node) -> None:
        """Have all bytes of `node` here, and what the store keeps with them, if it still has that version. No upload
        begins meanwhile: one that knows nothing of the bytes would leave them behind."""
        self._filling.add(node)
        try:
            if (base := node.base) is not None and not node.detached:
                with suppress(VersionChanged):
                    node.inherited = await self._store.properties(base.key, base.etag)
            if node.staged is None:
                self._changes.stage(node)
            await self._fill(node)
        finally:
            self._filling.discard(node)
            self._queue.hurry(node)
        if node.dirty is not None and node.dirty.state is State.CLEAN:
            node.dirty.on(Event.CHANGE)
        self._changes.users.track(node)

    async def _fill(self, node: Node) -> None:
        """Bring what the bottom layer lacks. Nothing is written to it meanwhile: changes go to a layer above."""
        staged = node.staged
        assert staged is not None
        staged.frozen = True
        layer, fill = staged.bottom, self.filler(node)
        try:
            for start, end in layer.gaps():
                fd = os.open(layer.data, os.O_RDWR | os.O_CLOEXEC)
                try:
                    await fill(fd, start, end)
                finally:
                    os.close(fd)
                layer.filled(start, end)
        finally:
            staged.frozen = len(staged.layers) > 1

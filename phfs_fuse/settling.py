"""What waits for the store, and who waits for that: fsync, drain, room for more. Owns no state.

The rest of write-back brings the files and deletions to the store; here is only said which ones are hurried, and
looked whether they have arrived.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import trio

from phfs_fuse.changes import Changes
from phfs_fuse.config import WritebackConfig
from phfs_fuse.errors import (
    AccessDenied,
    IllegalName,
    InvalidArgument,
    NameTooLong,
    NoSpace,
    NotSupported,
    PhfsError,
    QuotaExceeded,
    StaleVersion,
    StoreTimeout,
    StoreUnavailable,
    TooLarge,
    VersionChanged,
)
from phfs_fuse.gone import Gone
from phfs_fuse.inodes import Inodes
from phfs_fuse.nodes import Node
from phfs_fuse.staging import StagingArea
from phfs_fuse.tasks import gather
from phfs_fuse.uploadqueue import UploadQueue

FINAL = (  # asking again soon does not help
    AccessDenied,
    IllegalName,
    InvalidArgument,
    NameTooLong,
    NoSpace,
    NotSupported,
    QuotaExceeded,
    StaleVersion,
    TooLarge,
    VersionChanged,
)


def _folder_of(key: str) -> str:
    """The key of the directory that has `key` (a file's or a directory's) as a name."""
    return key[: key.rstrip("/").rfind("/") + 1]


@dataclass(frozen=True, slots=True)
class Pending:
    """What waits for the store."""

    files: int
    deletes: int
    bytes: int
    oldest_seconds: float


class Settling:
    def __init__(
        self, *, inodes: Inodes, area: StagingArea, changes: Changes, queue: UploadQueue, config: WritebackConfig
    ) -> None:
        self._inodes = inodes
        self._area = area
        self._changes = changes
        self._queue = queue
        self._config = config
        self.dirty_bytes_max = config.dirty_bytes_max

    def limit(self, dirty_bytes_max: int) -> None:
        """Keep to another limit from now on; who waits for room looks again."""
        self.dirty_bytes_max = dirty_bytes_max
        self._changes.endings.announce()

    def pending(self) -> Pending:
        waiting = self._changes.files.waiting()
        now = trio.current_time()
        oldest = max((now - node.dirty.since for node in waiting if node.dirty), default=0.0)
        return Pending(len(waiting), len(self._changes.gone), self._area.held_bytes, oldest)

    def errors(self) -> list[tuple[str, str, int]]:
        """(path, reason, failed tries) of what could not be uploaded so far."""
        return [
            (self._inodes.path(node), str(node.dirty.error), node.dirty.attempts)
            for node in self._changes.files.waiting()
            if node.dirty and node.dirty.error
        ]

    @property
    def store_is_away(self) -> bool:
        waiting = self._changes.files.waiting()
        return any(isinstance(node.dirty.error, StoreUnavailable) for node in waiting if node.dirty)

    def has_room(self, size: int) -> bool:
        return self._area.held_bytes + size <= self.dirty_bytes_max

    async def room(self, size: int) -> None:
        """Wait until `size` more dirty bytes are allowed. Raises: NoSpace (ENOSPC) after `full_seconds`."""
        with trio.move_on_after(self._config.full_seconds):
            while not self.has_room(size):
                for node in self._changes.files.waiting():
                    self._queue.hurry(node)
                await self._changes.endings.settled.wait()
            return
        raise NoSpace("write", "dirty limit", "the store does not take the data as fast as it is written")

    def take_error(self, node: Node) -> PhfsError | None:
        """The failure that was not reported yet, for close or fsync."""
        dirty = node.dirty
        if dirty is None or dirty.error is None or not isinstance(dirty.error, FINAL):
            return None
        error, dirty.error = dirty.error, None
        return error

    async def settle(self, node: Node) -> None:
        """Return when the store has all that was changed in `node` so far. Raises: PhfsError (why it has not),
        StoreTimeout (ETIMEDOUT) after `fsync_seconds`."""
        dirty = node.dirty
        if dirty is None or node.detached:
            return
        goal, tries = dirty.changes, dirty.attempts
        self._queue.hurry(node)
        limit = self._config.fsync_seconds or math.inf
        with trio.move_on_after(limit):
            while node.dirty is dirty and dirty.stored < goal and not node.detached:
                if dirty.attempts > tries and (error := self.take_error(node)) is not None:
                    raise error
                await self._changes.endings.waiter(node).wait()
            return
        raise StoreTimeout("fsync", self._inodes.path(node), f"not in the store after {limit:g} s")

    async def settle_names(self, folder: Node) -> None:
        """Return when the store has the changes so far of the names in `folder`, deletes included."""
        prefix = self._inodes.key(folder)
        nodes = [node for node in self._changes.files.waiting() if node is folder or node.parent is folder]
        deletes = [gone for gone in self._changes.gone.all() if _folder_of(gone.key) == prefix]
        await self._settle_all(nodes, deletes)

    async def settle_below(self, folder: Node) -> None:
        """Return when the store has all changes so far at and below `folder`, deletes included."""
        prefix = self._inodes.key(folder)
        nodes = [n for n in self._changes.files.waiting() if n is folder or self._inodes.key(n).startswith(prefix)]
        await self._settle_all(nodes, [gone for gone in self._changes.gone.all() if gone.key.startswith(prefix)])

    async def _settle_all(self, nodes: list[Node], deletes: list[Gone]) -> None:
        for gone in deletes:
            self._queue.push(gone, 0.0)
        await gather([partial(self.settle, node) for node in nodes])
        while any(self._changes.gone.get(gone.key) is gone for gone in deletes):
            await self._changes.endings.settled.wait()

    async def drain(self) -> bool:
        """Upload everything; from now on nothing waits for its quiet time. Returns whether all is in the store."""
        self._queue.draining = True
        for gone in self._changes.gone.all():
            self._queue.push(gone, 0.0)
        for node in self._changes.files.waiting():
            self._queue.hurry(node)
        with trio.move_on_after(self._config.drain_seconds or math.inf):
            while self._changes.files.waiting() or len(self._changes.gone):
                await self._changes.endings.settled.wait()
                await trio.sleep(0.01)  # many end at once
        return not self._changes.files.waiting() and not len(self._changes.gone)

    def end_drain(self) -> None:
        """The mount goes on: what is written from now on waits for its quiet time again."""
        self._queue.draining = False

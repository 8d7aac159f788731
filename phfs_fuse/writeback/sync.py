"""What waits for the store, and who waits for that: fsync, drain, room for more. Owns no state.

The rest of write-back brings the files and deletions to the store; here is only said which ones are hurried, and
looked whether they have arrived.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import trio

from phfs_fuse.config.model import WritebackConfig
from phfs_fuse.errors import (
    AccessDenied,
    CredentialsRefused,
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
from phfs_fuse.pending.changes import Changes
from phfs_fuse.pending.queue import UploadQueue
from phfs_fuse.state.refusal import Refusal, is_final
from phfs_fuse.state.staging import StagingArea
from phfs_fuse.tasks import gather
from phfs_fuse.tree.dirty import State
from phfs_fuse.tree.inodes import Inodes
from phfs_fuse.tree.node import Node

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


class RefusedByStore(PhfsError):
    """A deletion or a rename that the store has refused for good, and that was undone."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.operation.value, refusal.path.decode(errors="replace"), refusal.reason)
        self.errno = refusal.errno  # type: ignore[misc]  # that of the answer, in place of one for all


def _may_go_up(node: Node, before: Mapping[Node, int]) -> bool:
    """Whether an upload of `node` is not known to be refused again, after as many tries as there were `before`."""
    dirty = node.dirty
    return dirty is not None and (dirty.refusal is None or dirty.attempts <= before.get(node, 0))


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


class Sync:
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

    def refused(self) -> list[Refusal]:
        """What the store has refused for good: what waits here, and what was undone."""
        waiting = [node.dirty.refusal for node in self._changes.files.waiting() if node.dirty and node.dirty.refusal]
        return [*waiting, *self._changes.refusals.over()]

    def retry_refused(self) -> None:
        """Try again now what the store has refused and may take now."""
        for node in self._changes.files.waiting():
            if node.dirty is not None and node.dirty.refusal is not None:
                self._changes.files.accepted(node)  # for now
                self._queue.hurry(node)

    @property
    def store_state(self) -> str:
        """What the last answers of the store say of it."""
        waiting = [node.dirty.error for node in self._changes.files.waiting() if node.dirty]
        errors = [*waiting, *(gone.error for gone in self._changes.gone.all())]
        if any(isinstance(error, StoreUnavailable) for error in errors):
            return "unavailable"
        if any(isinstance(error, CredentialsRefused) for error in errors):
            return "refuses the credentials"
        return "refuses changes" if self.refused() else "ok"

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
        if dirty.refusal is not None and dirty.state is State.DIRTY and dirty.changes == dirty.snapshot:
            raise RefusedByStore(dirty.refusal)  # as it is; `retry_refused` has it tried again
        goal, tries = dirty.changes, dirty.attempts
        self._queue.hurry(node)
        limit = self._config.fsync_seconds or math.inf
        with trio.move_on_after(limit):
            while node.dirty is dirty and dirty.stored < goal and not node.detached:
                if dirty.attempts > tries and (error := self.take_error(node)) is not None:
                    raise error
                if dirty.attempts > tries and dirty.refusal is not None:  # somebody else was told
                    raise RefusedByStore(dirty.refusal)
                await self._changes.endings.waiter(node).wait()
            return
        raise StoreTimeout("fsync", self._inodes.path(node), f"not in the store after {limit:g} s")

    async def settle_names(self, folder: Node) -> None:
        """Return when the store has the changes so far of the names in `folder`, deletes included."""
        prefix = self._inodes.key(folder)
        nodes = [node for node in self._changes.files.waiting() if node is folder or node.parent is folder]
        await self._settle_all(nodes, lambda key: _folder_of(key) == prefix)

    async def settle_below(self, folder: Node) -> None:
        """Return when the store has all changes so far at and below `folder`, deletes included."""
        prefix = self._inodes.key(folder)
        nodes = [n for n in self._changes.files.waiting() if n is folder or self._inodes.key(n).startswith(prefix)]
        await self._settle_all(nodes, lambda key: key.startswith(prefix))

    async def _settle_all(self, nodes: list[Node], is_meant: Callable[[str], bool]) -> None:
        deletes = [gone for gone in self._changes.gone.all() if is_meant(gone.key)]
        for gone in deletes:
            self._queue.push(gone, 0.0)
        refused: list[PhfsError] = []

        async def settle(node: Node) -> None:
            try:
                await self.settle(node)
            except PhfsError as exc:
                if not (isinstance(exc, RefusedByStore) or is_final(exc)):
                    raise
                refused.append(exc)  # the rest goes up all the same

        await gather([partial(settle, node) for node in nodes])
        while any(self._changes.gone.get(gone.key) is gone for gone in deletes):
            await self._changes.endings.settled.wait()
        if (refusal := self._changes.refusals.tell(is_meant)) is not None:
            refused.append(RefusedByStore(refusal))
        if refused:
            raise refused[0]

    async def drain(self) -> bool:
        """Upload everything; from now on nothing waits for its quiet time, and what the store has refused is tried
        once more. Returns whether all is in the store."""
        self._queue.draining = True
        before = {node: node.dirty.attempts for node in self._changes.files.waiting() if node.dirty}
        for gone in self._changes.gone.all():
            self._queue.push(gone, 0.0)
        for node in self._changes.files.waiting():
            self._queue.hurry(node)
        with trio.move_on_after(self._config.drain_seconds or math.inf):
            while any(_may_go_up(node, before) for node in self._changes.files.waiting()) or len(self._changes.gone):
                await self._changes.endings.settled.wait()
                await trio.sleep(0.01)  # many end at once
        return not self._changes.files.waiting() and not len(self._changes.gone)

    def end_drain(self) -> None:
        """The mount goes on: what is written from now on waits for its quiet time again."""
        self._queue.draining = False

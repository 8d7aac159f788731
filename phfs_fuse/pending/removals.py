"""Keys that were removed here, until the store has let go of them: their journal rows and their places on the queue.
Owns the set of them. No I/O but the journal's, and no await.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from phfs_fuse.pending.in_doubt import InDoubt
from phfs_fuse.pending.queue import UploadQueue
from phfs_fuse.pending.tombstones import Tombstone, Tombstones
from phfs_fuse.pending.waiters import Waiters
from phfs_fuse.state.journal import Journal
from phfs_fuse.types import ETag, ObjectKey


class Removals:
    def __init__(
        self,
        journal: Journal,
        queue: UploadQueue,
        attempts: InDoubt,
        endings: Waiters,
        oldest_seq: Callable[[], float],
    ) -> None:
        self._journal = journal
        self._transaction = journal.transaction
        self._queue = queue
        self._attempts = attempts
        self._endings = endings
        self.keys = Tombstones(oldest_seq)

    def recover(self) -> None:
        """Take up what an earlier process left in the journal."""
        for key, etag in self._journal.gone():
            self.keys.add(gone := Tombstone(key, etag, True, 0.0))
            self._queue.push(gone, 0.0)

    def add(self, key: ObjectKey, etag: ETag | None, seq: int, *, request: bool) -> None:
        """`key` shall vanish from the store, which has version `etag` there."""
        self._keep(key)
        self._journal.put_gone(key, etag)  # of directories too: their names stay hidden after a restart
        gone = Tombstone(key, etag, request, self._queue.delete_due, seq)
        self.keys.add(gone)
        self._queue.push(gone, gone.due)

    def in_use(self, key: ObjectKey, seq: int) -> ETag | None:
        """The key is in use again; returns the version that the store still has there."""
        self._keep(key)
        if (gone := self.keys.take(key, seq)) is None:
            return None
        self._journal.drop_gone((key,))
        return gone.etag

    def deleted(self, batch: Iterable[Tombstone], seq: int) -> None:
        """They are gone from the store, or stay since they are somebody else's.
        Answers older than `seq` do not count."""
        done = [gone.key for gone in batch if self.keys.get(gone.key) is gone]
        with self._journal.batch():
            for key in done:
                self._keep(key)
                self.keys.take(key, seq)
                self._attempts.answered(key)
            self._journal.drop_gone(done)
        self._endings.announce()

    def landed(self, key: ObjectKey, etag: ETag | None) -> bool:
        """The store now has `etag` under `key` by our own doing. Returns whether that shall vanish."""
        if (gone := self.keys.get(key)) is None:
            return False
        self._journal.put_gone(key, etag)
        self._transaction.undo(partial(_set, gone, gone.etag, gone.request))
        _set(gone, etag, gone.request or etag is not None)
        return True

    def _keep(self, key: ObjectKey) -> None:
        """The entry of `key` is about to come or go."""
        if self._transaction.is_open:
            self._transaction.undo(partial(self._bring_back, key, self.keys.get(key)))

    def _bring_back(self, key: ObjectKey, before: Tombstone | None) -> None:
        self.keys.forget(key)
        if before is not None:
            self.keys.add(before)
            self._queue.push(before, before.due)


def _set(gone: Tombstone, etag: ETag | None, request: bool) -> None:
    gone.etag, gone.request = etag, request

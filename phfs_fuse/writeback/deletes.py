"""Deletes in the store what was removed here: many keys with one request. Owns the count of what stayed.

A deletion is for the version that was seen; what somebody else has stored under the key meanwhile stays.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from functools import partial

import trio

from phfs_fuse import metrics
from phfs_fuse.config.model import OnConflict, WritebackConfig
from phfs_fuse.errors import NotFound, PhfsError, VersionChanged
from phfs_fuse.pending.changes import Changes
from phfs_fuse.pending.queue import UploadQueue
from phfs_fuse.pending.tombstones import Tombstone
from phfs_fuse.state.journal import Journal
from phfs_fuse.state.refusal import is_final
from phfs_fuse.store.base import Expect, ObjectInfo, ObjectStore
from phfs_fuse.tasks import gather, unforeseen
from phfs_fuse.types import ETag, ObjectKey
from phfs_fuse.writeback.sources import Sources
from phfs_fuse.writeback.undo import Undo

log = logging.getLogger(__name__)

# Keys in one request, of 1000 that S3 allows: the fewer, the shorter between look and deletion; MinIO tells of all of
# them at once, and of more than its queue holds not at all.
BATCH_MAX = 250


Failure = PhfsError | OSError | None


class Deletes:
    def __init__(
        self,
        *,
        store: ObjectStore,
        changes: Changes,
        queue: UploadQueue,
        journal: Journal,
        sources: Sources,
        undo: Undo,
        config: WritebackConfig,
    ) -> None:
        self._undo = undo
        self._config = config
        self._store = store
        self._changes = changes
        self._queue = queue
        self._journal = journal
        self._sources = sources
        self.spared = 0  # objects that were removed here and stay, since somebody else stored them anew

    def is_ready(self, gone: Tombstone) -> bool:
        if self._changes.gone.get(gone.key) is not gone or self._sources.blocked(gone.key, gone):
            return False
        if gone.key.endswith("/") and self._changes.gone.waits_below(gone.key):
            self._queue.push(gone, trio.current_time() + max(self._queue.delay, 0.05))
            return False
        if not gone.request:
            self._changes.deleted([gone])
            return False
        return True

    async def send(self, batch: list[Tombstone]) -> None:
        failed: Mapping[ObjectKey, Failure] = {gone.key: None for gone in batch}  # None: was cancelled
        try:
            looks = await gather([partial(self._version, gone) for gone in batch])
            found = {gone.key: look for gone, look in zip(batch, looks, strict=True)}
            versions = {key: look for key, look in found.items() if not isinstance(look, PhfsError)}
            done = await self._delete(versions)
            failed = {key: look for key, look in found.items() if isinstance(look, PhfsError)} | dict(done)
            await self._journal.room_to_note()
        except PhfsError as exc:
            failed = {gone.key: exc for gone in batch}
        finally:
            again = self._deleted(batch, failed)
        await gather([partial(self._spare, gone) for gone in again])

    async def _version(self, gone: Tombstone) -> ETag | PhfsError | None:
        """The only version that the deletion is meant for; None: any. Where it is not known, since an upload of ours
        had no answer, the store is asked. VersionChanged: it has another; of a marker one that holds bytes."""
        if gone.etag is not None or self._config.on_conflict is OnConflict.OVERWRITE:
            return None if self._config.on_conflict is OnConflict.OVERWRITE else gone.etag
        try:
            found = await self._store.head(gone.key)
        except NotFound:
            return None
        except PhfsError as exc:
            return exc
        is_marker = gone.key.endswith("/") and gone.key not in self._changes.attempts.claims
        is_ours = not found.size if is_marker else self._changes.attempts.is_ours(found)
        return found.etag if is_ours else VersionChanged("delete", gone.key, "is not ours")

    async def _delete(self, versions: dict[ObjectKey, ETag | None]) -> Mapping[ObjectKey, PhfsError]:
        if len(versions) > 1:
            try:
                return await self._store.delete_many(versions)
            except PhfsError as exc:
                if not is_final(exc):
                    raise  # else perhaps because of one key, or the store deletes one at a time only
        failures = await gather([partial(self._delete_one, key, etag) for key, etag in versions.items()])
        return {key: exc for key, exc in zip(versions, failures, strict=True) if exc is not None}

    async def _delete_one(self, key: ObjectKey, etag: ETag | None) -> PhfsError | None:
        try:
            await self._store.delete(key, expect=None if etag is None else Expect(etag))
        except PhfsError as exc:
            return exc
        return None

    def _deleted(self, batch: list[Tombstone], failed: Mapping[ObjectKey, Failure]) -> list[Tombstone]:
        """Returns those of which the store has another version: their keys stay busy."""
        others: list[Tombstone] = []
        done = [gone for gone in batch if gone.key not in failed]
        try:
            self._note(done)
        except Exception as exc:  # once more, then: nothing is found
            if not isinstance(exc, OSError):
                unforeseen("deletion", exc)
            failed = {**failed, **{gone.key: exc if isinstance(exc, OSError) else None for gone in done}}
        for gone in batch:
            if isinstance(failed.get(gone.key), VersionChanged):
                if self._changes.gone.get(gone.key) is gone:
                    others.append(gone)
            elif gone.key in failed:
                self._again(gone, failed[gone.key])
        for gone in batch:
            if gone not in others:
                self._queue.free(gone.key)
        return others

    def _note(self, done: list[Tombstone]) -> None:
        with self._changes.noting():
            for gone in done:
                if self._changes.gone.get(gone.key) is not gone:
                    self._changes.landed(gone.key, None)  # the name is in use again: nothing is there to replace
            self._changes.deleted(done)

    def _again(self, gone: Tombstone, exc: Failure) -> None:
        is_wanted = self._changes.gone.get(gone.key) is gone
        if is_wanted and isinstance(exc, PhfsError) and is_final(exc) and self._journal.can_note():
            self._undo.deletion(gone, exc)
            return
        gone.error = exc if isinstance(exc, PhfsError) else None
        metrics.UPLOAD_FAILURES.add()
        log.warning("delete of key=%s failed, will be tried again: %s", gone.key, exc or "was cancelled")
        if is_wanted:
            self._queue.push(gone, trio.current_time() + self._queue.backoff(3))

    async def _spare(self, gone: Tombstone) -> None:
        """The store has another version than the one that was removed here: ours, by an upload without an answer,
        or somebody else's, which stays."""
        try:
            found: ObjectInfo | None = None
            with suppress(NotFound):
                found = await self._store.head(gone.key, surely=True)
            await self._journal.room_to_note()
            self._found(gone, found)
        except (PhfsError, OSError) as exc:
            self._again(gone, exc)
        except Exception as exc:
            unforeseen("deletion", exc)
            self._again(gone, None)
        finally:
            self._queue.free(gone.key)

    def _found(self, gone: Tombstone, found: ObjectInfo | None) -> None:
        if found is None:
            self._changes.deleted([gone])
        elif self._changes.attempts.is_ours(found):
            gone.etag = found.etag
            self._queue.push(gone, 0.0)
        elif self._changes.gone.get(gone.key) is gone:
            self.spared += 1
            log.warning("key=%s was stored anew by somebody else, its removal here leaves it there", gone.key)
            self._changes.spared(gone, found.size)

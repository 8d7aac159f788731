"""Deletes in the store what was removed here: many keys with one request. Owns their failures.

A deletion that came late looks first, and spares what somebody else has stored under the key meanwhile.
"""

from __future__ import annotations

import logging
from functools import partial

import trio

from phfs_fuse.changes import Changes
from phfs_fuse.errors import NotFound, PhfsError
from phfs_fuse.gone import Gone
from phfs_fuse.sources import Sources
from phfs_fuse.store.base import ObjectStore
from phfs_fuse.tasks import gather
from phfs_fuse.types import ObjectKey
from phfs_fuse.uploadqueue import UploadQueue

log = logging.getLogger(__name__)

BATCH_MAX = 1000  # keys; Source: S3 API reference, DeleteObjects
LATE_SECONDS = 2.0  # a deletion that has waited so much longer than meant looks first


class Deletes:
    def __init__(self, *, store: ObjectStore, changes: Changes, queue: UploadQueue, sources: Sources) -> None:
        self._store = store
        self._changes = changes
        self._queue = queue
        self._sources = sources
        self.failures = 0

    def is_ready(self, gone: Gone) -> bool:
        if self._changes.gone.get(gone.key) is not gone or self._sources.blocked(gone.key, gone):
            return False
        if gone.key.endswith("/") and self._changes.gone.waits_below(gone.key):
            self._queue.push(gone, trio.current_time() + max(self._queue.delay, 0.05))
            return False
        if not gone.request:
            self._changes.deleted([gone])
            return False
        return True

    async def send(self, batch: list[Gone]) -> None:
        failed = {gone.key: "was cancelled" for gone in batch}
        try:
            spared = await gather([partial(self._is_spared, gone) for gone in batch])
            batch = [gone for gone, is_spared in zip(batch, spared, strict=True) if not is_spared]
            failed = {gone.key: "was cancelled" for gone in batch}
            if not batch:
                pass
            elif len(batch) == 1:
                await self._store.delete(batch[0].key)
                failed = {}
            else:
                failed = dict(await self._store.delete_many([gone.key for gone in batch]))
        except PhfsError as exc:
            failed = {gone.key: str(exc) for gone in batch}
        finally:
            self._deleted(batch, failed)

    async def _is_spared(self, gone: Gone) -> bool:
        """Whether somebody else has stored the key anew while its deletion waited for the store, or over a restart:
        the deletion then ends here. Raises: PhfsError."""
        if trio.current_time() < gone.due + LATE_SECONDS or gone.key.endswith("/"):
            return False
        try:
            found = await self._store.head(gone.key)
        except NotFound:
            return False
        if found.etag == gone.etag or self._changes.is_ours(found):
            return False
        log.warning("key=%s was stored anew by somebody else after it was removed here; it is kept", gone.key)
        self._changes.spared(gone, found.size)
        self._queue.free(gone.key)
        return True

    def _deleted(self, batch: list[Gone], failed: dict[ObjectKey, str]) -> None:
        for gone in batch:
            if gone.key in failed:
                self.failures += 1
                log.warning("delete of key=%s failed, will be tried again: %s", gone.key, failed[gone.key])
                if self._changes.gone.get(gone.key) is gone:
                    self._queue.push(gone, trio.current_time() + self._queue.backoff(3))
            elif self._changes.gone.get(gone.key) is not gone:
                self._changes.landed(gone.key, None)  # the name is in use again: nothing is there to replace
        self._changes.deleted([gone for gone in batch if gone.key not in failed])
        for gone in batch:
            self._queue.free(gone.key)

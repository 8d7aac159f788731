"""How one snapshot of a file gets into the store: PUT, multipart, parts copied from the base, or a plain copy.

Owns the multipart uploads under way (they are noted in the journal, so that a crash leaves none behind).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial

import trio

from phfs_fuse.config import WritebackConfig
from phfs_fuse.errors import PhfsError
from phfs_fuse.extents import Extents, PartPlan, plan_parts
from phfs_fuse.inodes import Base
from phfs_fuse.journal import Journal
from phfs_fuse.staging import Layer
from phfs_fuse.store.base import Expect, FileRange, ObjectInfo, ObjectStore, Part
from phfs_fuse.tasks import gather
from phfs_fuse.types import ObjectKey

log = logging.getLogger(__name__)

Fill = Callable[[int, int, int], Awaitable[None]]
"""(fd, start, end): put these bytes of the base into the file at the same offsets. Raises: PhfsError, OSError."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """What to store. `layer` None: the bytes are the base's. The layer is frozen as long as this is in use."""

    key: ObjectKey
    metadata: Mapping[str, str]
    expect: Expect | None
    base: Base | None
    layer: Layer | None
    fill: Fill

    @property
    def size(self) -> int:
        return self.layer.size if self.layer else self.base.size if self.base else 0


class Uploader:
    """Puts snapshots into the store. Cancelling a call aborts what it began."""

    def __init__(self, store: ObjectStore, journal: Journal, config: WritebackConfig) -> None:
        self._store = store
        self._journal = journal
        self._config = config
        self._stale = journal.uploads()  # of the process before
        self._parts = trio.CapacityLimiter(config.uploads_max)

    async def store(self, snap: Snapshot) -> ObjectInfo:
        """Returns the stored version. Raises: PhfsError (VersionChanged: `expect` or the base failed), OSError."""
        if snap.layer is None:
            if snap.base is None:
                return await self._store.put(snap.key, b"", snap.metadata, expect=snap.expect)
            base = snap.base
            return await self._store.copy(base.key, base.etag, snap.key, base.size, snap.metadata, expect=snap.expect)
        layer = snap.layer
        if layer.size < self._config.multipart_bytes_min:
            await self._fill(snap, layer, 0, layer.size)
            return await self._put(snap, layer)
        return await self._multipart(snap, layer)

    async def _put(self, snap: Snapshot, layer: Layer) -> ObjectInfo:
        if layer.size == 0:
            return await self._store.put(snap.key, b"", snap.metadata, expect=snap.expect)
        fd = os.open(layer.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return await self._store.put(snap.key, FileRange(fd, 0, layer.size), snap.metadata, expect=snap.expect)
        finally:
            os.close(fd)

    async def _fill(self, snap: Snapshot, layer: Layer, start: int, end: int) -> None:
        """Copy what shows through within [start, end) into the layer."""
        if not layer.seen:
            return
        for gap_start, gap_end in layer.extents.gaps(start, min(end, layer.seen)):
            fd = os.open(layer.path, os.O_RDWR | os.O_CLOEXEC)
            try:
                await snap.fill(fd, gap_start, gap_end)
            finally:
                os.close(fd)
            layer.filled(gap_start, gap_end)

    def _plan(self, snap: Snapshot, layer: Layer) -> list[PartPlan]:
        if not layer.seen or snap.base is None:
            return plan_parts(layer.size, Extents([(0, layer.size)]), 0, self._config.part_bytes)
        return plan_parts(layer.size, layer.extents, min(layer.seen, layer.size), self._config.part_bytes)

    async def _multipart(self, snap: Snapshot, layer: Layer) -> ObjectInfo:
        plans = self._plan(snap, layer)
        upload_id = await self._store.create_multipart(snap.key, snap.metadata)
        self._journal.put_upload(upload_id, snap.key)
        fd = os.open(layer.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            parts = await gather(
                [
                    partial(self._part, snap, layer, fd, upload_id, part_no, plan)
                    for part_no, plan in enumerate(plans, 1)
                ]
            )
            info = await self._store.complete_multipart(snap.key, upload_id, parts, expect=snap.expect)
        except BaseException:
            await self._abort(snap.key, upload_id)
            raise
        finally:
            os.close(fd)
        self._journal.drop_upload(upload_id)
        return info

    async def _part(
        self, snap: Snapshot, layer: Layer, fd: int, upload_id: str, part_no: int, plan: PartPlan
    ) -> Part:
        async with self._parts:
            if plan.is_copy:
                assert snap.base is not None
                return await self._store.upload_part_copy(
                    snap.key, upload_id, part_no, snap.base.key, snap.base.etag, plan.start, plan.end
                )
            await self._fill(snap, layer, plan.start, plan.end)
            body = FileRange(fd, plan.start, plan.length)
            return await self._store.upload_part(snap.key, upload_id, part_no, body)

    async def _abort(self, key: ObjectKey, upload_id: str) -> None:
        with trio.CancelScope(shield=True), trio.move_on_after(10):
            try:
                await self._store.abort_multipart(key, upload_id)
            except PhfsError as exc:
                log.warning("multipart upload of key=%s is left for the next mount to abort: %s", key, exc)
            else:
                self._journal.drop_upload(upload_id)

    async def abort_stale(self) -> None:
        """Abort the uploads that an earlier process of this state directory left behind; no others."""
        for upload_id, key in self._stale:
            await self._abort(key, upload_id)

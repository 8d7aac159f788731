"""How one snapshot of a file gets into the store: PUT, multipart, parts copied from the base, or a plain copy.

The multipart uploads under way are those of `writeback.multipart_uploads`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from math import inf
from typing import Final

import trio

from phfs_fuse.attrs import STORED, others
from phfs_fuse.config.model import WritebackConfig
from phfs_fuse.errors import PhfsError, VersionChanged
from phfs_fuse.extents import Extents, PartPlan, plan_parts
from phfs_fuse.state.staging import Layer
from phfs_fuse.store.base import (
    LOOK_SECONDS,
    Expect,
    FileRange,
    ObjectInfo,
    ObjectStore,
    Part,
    Properties,
    content_type,
    fits_copy,
)
from phfs_fuse.tasks import gather
from phfs_fuse.tree.node import Base
from phfs_fuse.types import ETag, ObjectKey
from phfs_fuse.writeback.multipart_uploads import MultipartUploads

log = logging.getLogger(__name__)

LOOKS_MAX: Final = 100  # keys that are about to be copied to
LOOKS_MIN: Final = 8  # for fewer the store looks at each itself, just before its copy

Fill = Callable[[int, int, int], Awaitable[None]]
"""(fd, start, end): put these bytes of the base into the file at the same offsets. Raises: PhfsError, OSError."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """What to store. `layer` None: the bytes are the base's. The layer is frozen as long as this is in use."""

    key: ObjectKey
    metadata: Mapping[str, str] | None  # None: that of the base, which is copied with all that it has
    expect: Expect | None
    base: Base | None
    layer: Layer | None
    fill: Fill
    properties: Properties | None = None  # of the base, where they stay
    seen_at: float = -inf  # when `expect` was seen to hold

    @property
    def size(self) -> int:
        return self.layer.size if self.layer else self.base.size if self.base else 0

    @property
    def content(self) -> Mapping[str, str] | ETag:
        """By which the stored object is known again: its metadata, or the version that it is a copy of."""
        if self.metadata is not None:
            return self.metadata
        assert self.base is not None
        return self.base.etag


class CopyTargets:
    """Where copies go to, many with one look. A look is good for LOOK_SECONDS, and for one copy to each key.

    Owns the keys of copies that have begun and not been looked at, and what was seen lately of which key.
    """

    def __init__(self, store: ObjectStore, upcoming: Callable[[], Iterable[ObjectKey]]) -> None:
        self._store = store
        self._upcoming = upcoming
        self._begun: set[ObjectKey] = set()
        self._seen: dict[ObjectKey, tuple[ETag | None, float]] = {}
        self._lock = trio.Lock()

    def announce(self, key: ObjectKey) -> None:
        """A copy to `key` begins, and will ask."""
        self._begun.add(key)

    async def seen_at(self, key: ObjectKey, expect: Expect | None) -> float:
        """When `expect` was seen to hold; -inf: it was not, or not lately. Raises: PhfsError."""
        if expect is None:
            return -inf
        if not self._knows(key):
            async with self._lock:
                if not self._knows(key):
                    await self._look(key)
        elif len(self._seen) <= LOOKS_MAX // 4 and not self._lock.locked():  # the others go on meanwhile
            async with self._lock:
                await self._look(key)
        self._begun.discard(key)
        etag, at = self._seen.pop(key, (None, -inf))
        return at if etag == expect.etag else -inf

    def _knows(self, key: ObjectKey) -> bool:
        return key in self._seen and trio.current_time() <= self._seen[key][1] + LOOK_SECONDS / 2

    async def _look(self, key: ObjectKey) -> None:
        """At what has begun, and at what will, as far as that is known. A few are not worth it."""
        self._seen = {key: seen for key, seen in self._seen.items() if self._knows(key)}
        wanted = {key, *self._begun, *islice(self._upcoming(), LOOKS_MAX)} - self._seen.keys()
        if len(wanted) < LOOKS_MIN:
            return
        at = trio.current_time()
        try:
            found = await self._store.look(list(wanted))
        except PhfsError as exc:  # perhaps about another key: each copy then looks itself
            log.debug("%d keys could not be looked at together: %s", len(wanted), exc)
            return
        self._seen |= {key: (found.get(key), at) for key in wanted}


class Uploader:
    """Puts snapshots into the store. Cancelling a call aborts what it began."""

    def __init__(
        self,
        store: ObjectStore,
        multiparts: MultipartUploads,
        config: WritebackConfig,
        upcoming: Callable[[], Iterable[ObjectKey]],
    ) -> None:
        """`upcoming`: keys that will be copied to soon."""
        self._store = store
        self.looks = CopyTargets(store, upcoming)
        self.multiparts = multiparts
        self._config = config
        self._parts = trio.CapacityLimiter(config.uploads_max)

    async def inheriting(self, snap: Snapshot, *, moved_only: bool) -> Snapshot:
        """`snap` as `_inheriting` says; what is copied in parts takes nothing along by itself."""
        found = await self._inheriting(snap, moved_only=moved_only)
        base = found.base
        if found.metadata is not None or base is None or fits_copy(base.key, found.key, base.size):
            return found
        properties = await self._store.properties(base.key, base.etag)
        return replace(found, metadata=properties.metadata, properties=properties)

    async def _inheriting(self, snap: Snapshot, *, moved_only: bool) -> Snapshot:
        """`snap` with all that the store keeps with its base, which others may have given to it. A file of new bytes
        has nothing of that; one that was `moved_only` is copied as it is, unless it was written here under a name of
        another type. Raises: PhfsError (VersionChanged: the base is no more)."""
        base, layer = snap.base, snap.layer
        if base is None or (layer is not None and not layer.seen and base.size):
            return replace(snap, properties=None)
        new_type = content_type(snap.key)
        if moved_only and content_type(base.key) == new_type:
            return replace(snap, metadata=None)
        at = trio.current_time()
        try:
            found = await self._store.properties(base.key, base.etag)
        except VersionChanged:
            if layer is None or layer.gaps():
                raise
            if snap.properties is None:  # a version that is no more, of which the bytes were here
                return snap
            found = snap.properties
        headers = found.headers
        if moved_only:
            if headers.get("content-type") != content_type(base.key) or not found.metadata.keys() >= STORED:
                return replace(snap, metadata=None)
            headers = {**headers, "content-type": new_type}
        metadata = {**others(found.metadata, same_bytes=layer is None), **(snap.metadata or {})}
        is_same_key = (base.key, Expect(base.etag)) == (snap.key, snap.expect)
        return replace(
            snap,
            metadata=metadata,
            properties=replace(found, headers=headers),
            seen_at=at if is_same_key else -inf,
        )

    async def store(self, snap: Snapshot) -> ObjectInfo:
        """Returns the stored version. Raises: PhfsError (VersionChanged: `expect` or the base failed), OSError."""
        if snap.layer is None:
            if snap.base is None:
                return await self._store.put(snap.key, b"", snap.metadata or {}, expect=snap.expect)
            return await self._copy(snap, snap.base)
        layer = snap.layer
        if layer.size < self._config.multipart_bytes_min:
            await self._fill(snap, layer, 0, layer.size)
            return await self._put(snap, layer)
        return await self._multipart(snap, self._plan(snap, layer))

    async def _copy(self, snap: Snapshot, base: Base) -> ObjectInfo:
        seen_at = await self.looks.seen_at(snap.key, snap.expect)
        if not fits_copy(base.key, snap.key, base.size):
            return await self._copy_in_parts(snap, base)
        return await self._store.copy(
            base.key,
            base.etag,
            snap.key,
            base.size,
            snap.metadata,
            expect=snap.expect,
            seen_at=max(snap.seen_at, seen_at),
            properties=snap.properties,
        )

    async def _copy_in_parts(self, snap: Snapshot, base: Base) -> ObjectInfo:
        if snap.expect is not None:  # before gigabytes are moved in vain
            found = (await self._store.look([snap.key])).get(snap.key)
            if found != snap.expect.etag:
                raise VersionChanged("copy", snap.key, f"the store has version {found}, not {snap.expect.etag}")
        return await self._multipart(snap, plan_parts(base.size, Extents(), base.size, self._config.part_bytes))

    async def _put(self, snap: Snapshot, layer: Layer) -> ObjectInfo:
        metadata, kept = snap.metadata or {}, snap.properties
        if layer.size == 0:
            return await self._store.put(snap.key, b"", metadata, expect=snap.expect, properties=kept)
        fd = os.open(layer.data, os.O_RDONLY | os.O_CLOEXEC)
        try:
            body = FileRange(fd, 0, layer.size)
            return await self._store.put(snap.key, body, metadata, expect=snap.expect, properties=kept)
        finally:
            os.close(fd)

    async def _fill(self, snap: Snapshot, layer: Layer, start: int, end: int) -> None:
        """Copy what shows through within [start, end) into the layer."""
        if not layer.seen:
            return
        for gap_start, gap_end in layer.extents.gaps(start, min(end, layer.seen)):
            fd = os.open(layer.data, os.O_RDWR | os.O_CLOEXEC)
            try:
                await snap.fill(fd, gap_start, gap_end)
            finally:
                os.close(fd)
            layer.filled(gap_start, gap_end)

    def _plan(self, snap: Snapshot, layer: Layer) -> list[PartPlan]:
        if not layer.seen or snap.base is None:
            return plan_parts(layer.size, Extents([(0, layer.size)]), 0, self._config.part_bytes)
        return plan_parts(layer.size, layer.extents, min(layer.seen, layer.size), self._config.part_bytes)

    async def _multipart(self, snap: Snapshot, plans: Sequence[PartPlan]) -> ObjectInfo:
        with snap.layer.path.open("rb", buffering=0) if snap.layer else nullcontext() as file:
            send = partial(self._part, snap, file.fileno() if file else None)
            async with self.multiparts.begun(snap.key, snap.metadata or {}, snap.properties) as upload_id:
                parts = await gather([partial(send, upload_id, no, plan) for no, plan in enumerate(plans, 1)])
                return await self._store.complete_multipart(snap.key, upload_id, parts, expect=snap.expect)

    async def _part(self, snap: Snapshot, fd: int | None, upload_id: str, part_no: int, plan: PartPlan) -> Part:
        async with self._parts:
            if plan.is_copy:
                assert snap.base is not None
                return await self._store.upload_part_copy(
                    snap.key, upload_id, part_no, snap.base.key, snap.base.etag, plan.start, plan.end
                )
            assert snap.layer is not None
            assert fd is not None
            await self._fill(snap, snap.layer, plan.start, plan.end)
            body = FileRange(fd, plan.start, plan.length)
            return await self._store.upload_part(snap.key, upload_id, part_no, body)

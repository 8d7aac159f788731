"""Write-back: brings the store to what the tree says. Owns the requests under way.

The rule is one: for each key, the store shall have what the node of that name says, or nothing. A file is uploaded
when it has been quiet for a while; a rename, chmod or unlink before that only changes what will be uploaded. What
must not happen to a key waits (is parked): while a request on the same key is under way, and while somebody still
needs the bytes that the store has under it (`sources`).

All methods run on the event loop; those that do not await are atomic. Every change is in the journal before the
method returns. Source for the conditions: S3 API, conditional requests (If-Match, If-None-Match).
"""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from functools import partial

import trio

from phfs_fuse import metrics
from phfs_fuse.attrs import to_metadata
from phfs_fuse.cache.block_cache import BlockCache
from phfs_fuse.config.model import OnConflict, WritebackConfig
from phfs_fuse.errors import PhfsError, StaleVersion, VersionChanged
from phfs_fuse.extents import Extents
from phfs_fuse.pending.changes import Changes
from phfs_fuse.pending.foreground_load import ForegroundLoad
from phfs_fuse.pending.queue import UploadQueue, Work
from phfs_fuse.pending.tombstones import Tombstone
from phfs_fuse.state.journal import Journal
from phfs_fuse.state.refusal import Operation, is_final
from phfs_fuse.state.staging import Layer, StagingArea
from phfs_fuse.store.base import Expect, ObjectInfo, ObjectStore
from phfs_fuse.tasks import lasting, survived, surviving, unforeseen
from phfs_fuse.tree.default_attrs import DefaultAttrs
from phfs_fuse.tree.dirty import DirtyFile, Event, State
from phfs_fuse.tree.inodes import Inodes
from phfs_fuse.tree.node import Base, Node
from phfs_fuse.types import ETag, ObjectKey
from phfs_fuse.writeback.conflicts import Conflicts, local_error
from phfs_fuse.writeback.deletes import BATCH_MAX, Deletes
from phfs_fuse.writeback.directory_markers import DirectoryMarkers
from phfs_fuse.writeback.multipart_uploads import MultipartUploads
from phfs_fuse.writeback.rescue import Rescue
from phfs_fuse.writeback.sources import Sources
from phfs_fuse.writeback.undo import Undo
from phfs_fuse.writeback.uploader import Snapshot, Uploader

log = logging.getLogger(__name__)

TIDY_SECONDS = 30.0
TIDY_SECONDS_MAX = 3600.0
BUSY_PART = 4  # of the uploads at a time: while programs ask for much, what cannot wait any more goes up like that


def _is_copy(node: Node) -> bool:
    """Whether the store has the bytes of the file already."""
    return node.staged is None and node.base is not None and not node.is_dir


def _is_moved_only(node: Node, dirty: DirtyFile) -> bool:
    """Whether the store shall have its object as it is, under another key. The copy of one that was stored in parts
    has another ETag, and would not be known again by that."""
    return _is_copy(node) and not dirty.attrs and node.base is not None and "-" not in node.base.etag


def _is_elsewhere(node: Node, key: ObjectKey) -> bool:
    """Whether its bytes are under another key than `key`, so that it is to be seen what is there."""
    return node.base is not None and node.base.key != key


def _close_version(node: Node) -> None:
    if node.version is not None:
        node.version.close()
        node.version = None


class Writeback:
    def __init__(
        self,
        *,
        store: ObjectStore,
        inodes: Inodes,
        blocks: BlockCache,
        journal: Journal,
        area: StagingArea,
        changes: Changes,
        queue: UploadQueue,
        demand: ForegroundLoad,
        defaults: DefaultAttrs,
        aside: Rescue,
        config: WritebackConfig,
    ) -> None:
        self._inodes = inodes
        self._blocks = blocks
        self._journal = journal
        self._area = area
        self._changes = changes
        self._queue = queue
        self._config = config
        self._demand = demand
        self._store = store
        self.multiparts = MultipartUploads(store, journal, queue.backoff)
        self._uploader = Uploader(store, self.multiparts, config, self._upcoming)
        self._sources = Sources(store=store, inodes=inodes, blocks=blocks, changes=changes, queue=queue)
        self._sources.on_refused = self._unreadable
        self._markers = DirectoryMarkers(store=store, inodes=inodes, changes=changes, queue=queue)
        self._conflicts = Conflicts(
            store=store,
            inodes=inodes,
            journal=journal,
            aside=aside,
            changes=changes,
            queue=queue,
            sources=self._sources,
            on_conflict=config.on_conflict,
        )
        self._undo = Undo(inodes=inodes, changes=changes, conflicts=self._conflicts, new_folder=defaults.directory)
        self._deletes = Deletes(
            store=store,
            changes=changes,
            queue=queue,
            journal=journal,
            sources=self._sources,
            undo=self._undo,
            config=config,
        )
        self._running = 0
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Upload what is due, forever."""
        async with trio.open_nursery() as nursery:
            self._nursery = self._sources.nursery = nursery
            nursery.start_soon(lasting, "multipart uploads", self.multiparts.run)
            nursery.start_soon(lasting, "trials of the store", self._tidy)
            task_status.started()
            is_prepared = False
            while True:
                await self._journal.room_to_note()
                self._start_due()
                if not is_prepared and self._queue.next_due < math.inf:
                    is_prepared = True
                    nursery.start_soon(survived, "look at the store", self._prepare)
                wake = self._queue.wake
                with trio.move_on_at(self._next_look()):
                    await wake.wait()
                self._queue.wake = trio.Event()

    async def _tidy(self) -> None:
        """Service: have nothing in the store that no file shows."""
        pause = TIDY_SECONDS
        while True:
            try:
                await self._store.tidy()
                pause = TIDY_SECONDS
            except PhfsError as exc:
                log.info("a trial of the store has left an object: %s", exc)
                pause = min(2 * pause, TIDY_SECONDS_MAX)
            await trio.sleep(pause)

    async def _prepare(self) -> None:
        """While the first change has its quiet time."""
        if self._config.on_conflict is not OnConflict.OVERWRITE:
            with suppress(PhfsError, OSError):  # who has to write will ask again
                await self._store.prepare()

    def _next_look(self) -> float:
        if self._running >= self._config.uploads_max:
            return math.inf
        if (late := self._queue.held_until) == math.inf:
            return self._queue.next_due
        return min(
            self._queue.next_due, self._demand.high_until, late if self._running < self._late_max else math.inf
        )

    @property
    def _late_max(self) -> int:
        return max(1, self._config.uploads_max // BUSY_PART)

    def _next_work(self, now: float) -> Work | None:
        """While programs ask for much they have the machine, but for what is waited for or cannot wait."""
        is_calm = self._queue.draining or now >= self._demand.high_until
        if self._running >= self._config.uploads_max:
            return None
        if (work := self._queue.take(now, is_calm=is_calm)) is not None:
            return work
        if is_calm or self._running < self._late_max:
            return self._queue.take_held(now, is_calm=is_calm)
        return None

    def _start_due(self) -> None:
        now = trio.current_time()
        deletes: list[Tombstone] = []
        while self._journal.can_note() and (work := self._next_work(now)) is not None:
            with surviving("write-back") as outcome:
                self._look_at(work, now, deletes)
            if outcome.failure is not None:
                self._queue.look_later(work)
            if len(deletes) == BATCH_MAX:
                self._spawn(self._delete, deletes)
                deletes = []
        if deletes:
            self._spawn(self._delete, deletes)

    def _look_at(self, work: Work, now: float, deletes: list[Tombstone]) -> None:
        """Start what is due, or add it to `deletes`."""
        if isinstance(work, Tombstone):
            if self._deletes.is_ready(work):
                self._queue.claim(work.key)
                deletes.append(work)
        elif (dirty := work.dirty) is not None and dirty.state is State.DIRTY and not work.detached:
            if dirty.due > now:
                self._queue.enqueue(work, dirty, dirty.due)
            else:
                self._start(work, dirty)

    def _upcoming(self) -> Iterator[ObjectKey]:
        for node in self._queue.upcoming(trio.current_time()):
            if not node.detached and node.dirty is not None and node.dirty.state is State.DIRTY and _is_copy(node):
                key = self._inodes.key(node)
                if _is_elsewhere(node, key):
                    yield key

    def _spawn(self, task: Callable[..., Awaitable[None]], *args: object) -> None:
        assert self._nursery is not None
        self._running += 1
        self._nursery.start_soon(survived, "write-back", self._noting, task, *args)

    async def _noting(self, task: Callable[..., Awaitable[None]], *args: object) -> None:
        """What could not be noted is done once more after a restart, and finds itself done."""
        try:
            await task(*args)
        except OSError as exc:
            log.error("journal cannot be written, check the disk of the state directory: %s", exc)

    def _done(self) -> None:
        self._running -= 1
        self._queue.wake.set()

    async def _delete(self, batch: list[Tombstone]) -> None:
        try:
            await self._deletes.send(batch)
        finally:
            self._done()

    def _start(self, node: Node, dirty: DirtyFile) -> None:
        key = self._inodes.key(node)
        if self._sources.is_filling(node) or self._sources.blocked(key, node):
            return
        if (body := node.body) is not None and body.dirty is not None:  # which gets there first
            self._queue.enqueue(node, dirty, trio.current_time() + self._queue.delay)
            return
        if node.is_dir:
            task: Callable[..., Awaitable[None]] = self._store_marker
        else:
            unchanged = node.staged is None and not dirty.attrs
            if unchanged and (base := node.base) and (base.key, base.etag) == (key, dirty.over):
                self._changes.files.clean(node)  # renamed there and back
                return
            task = self._store_file
            if _is_copy(node) and _is_elsewhere(node, key):
                self._uploader.looks.announce(key)
        if node.staged is not None and len(node.staged.layers) > 1:  # the snapshot of a failed try, unchanged
            snapshot = dirty.snapshot
            dirty.on(Event.UPLOAD)
            dirty.on(Event.CHANGE)
            dirty.snapshot = snapshot
        else:
            dirty.on(Event.UPLOAD)
        dirty.target = key
        self._queue.claim(key)
        self._spawn(task, node, dirty, key)

    async def _store_file(self, node: Node, dirty: DirtyFile, key: ObjectKey) -> None:
        staged = node.staged
        if staged is not None:
            staged.frozen = True
        moved_only = _is_moved_only(node, dirty)
        began_at = trio.current_time()

        async def lost_race(exc: PhfsError) -> None:
            await self._conflicts.lost_race(node, dirty, key, snap, exc)

        async with self._storing(node, dirty, key, lost_race):
            snap = Snapshot(
                key=key,
                metadata=to_metadata(node.attrs),
                expect=None if self._config.on_conflict is OnConflict.OVERWRITE else Expect(dirty.over),
                base=node.base,
                layer=staged.bottom if staged else None,
                fill=self._sources.filler(node),
                properties=node.inherited,
            )
            dirty.attrs, dirty.sent_attrs = False, dirty.attrs
            snap = await self._uploader.inheriting(snap, moved_only=moved_only)
            self._changes.attempts.begin(key, snap.size, snap.content)
            info = await self._uploader.store(snap)
            await self._journal.room_to_note()
            self._stored(node, dirty, key, snap, info)
            node.checked_at = max(node.checked_at, began_at)

    async def _store_marker(self, node: Node, dirty: DirtyFile, key: ObjectKey) -> None:
        async with self._storing(node, dirty, key):
            marker = await self._markers.bring(node, key)
            await self._journal.room_to_note()
            self._markers.stored(node, dirty, key, marker)

    @asynccontextmanager
    async def _storing(
        self,
        node: Node,
        dirty: DirtyFile,
        key: ObjectKey,
        lost_race: Callable[[PhfsError], Awaitable[None]] | None = None,
    ) -> AsyncIterator[None]:
        """The block stores what waits of `node`. `lost_race` goes on where the store has another version."""
        try:
            yield
        except (PhfsError, OSError) as exc:
            if lost_race is not None and isinstance(exc, (VersionChanged, StaleVersion)):
                self._failed(node, dirty, key, None)
                await self._journal.room_to_note()
                await lost_race(exc)
            else:
                await self._room_for(exc)
                self._failed(node, dirty, key, exc)
        except Exception as exc:
            unforeseen("upload", exc)
            self._failed(node, dirty, key, PhfsError("upload", key, f"unforeseen {type(exc).__name__}"))
        except BaseException:
            self._failed(node, dirty, key, None)
            raise
        finally:
            self._queue.free(key)
            self._done()

    async def _room_for(self, exc: PhfsError | OSError) -> None:
        """To note what follows from it."""
        if is_final(exc):
            await self._journal.room_to_note()

    def _failed(
        self,
        node: Node,
        dirty: DirtyFile,
        key: ObjectKey,
        exc: PhfsError | OSError | None,
    ) -> None:
        dirty.on(Event.FAILED)
        dirty.target = None
        dirty.attrs = dirty.attrs or dirty.sent_attrs
        if node.staged is not None:
            node.staged.frozen = len(node.staged.layers) > 1
        if node.detached:
            if not node.opens:
                self._changes.abandon(node)
            return
        if exc is not None:
            metrics.UPLOAD_FAILURES.add()
            dirty.error = exc if isinstance(exc, PhfsError) else local_error(key, exc)
            if self._inodes.key(node) == key and is_final(dirty.error, dirty.attempts):
                self._refused(node, dirty, key, dirty.error)
            else:
                wait = self._queue.backoff(dirty.attempts)
                log.warning("upload of key=%s failed, next try in %.1f s: %s", key, wait, exc)
                self._changes.files.accepted(node)
                self._queue.enqueue(node, dirty, trio.current_time() + wait)
        self._changes.endings.announce(node)

    def _refused(self, node: Node, dirty: DirtyFile, key: ObjectKey, exc: PhfsError) -> None:
        """The store takes no upload of `node` to `key`. A move is undone, the rest is tried again now and then."""
        if self._undo.is_move(node, key) and self._undo.move(node, key, exc):
            return
        unstored = Operation.MKDIR if node.is_dir and node.marker is None else Operation.ATTRIBUTES
        self._changes.files.refuse(node, unstored if node.staged is None else Operation.UPLOAD, exc)
        self._queue.put_off(node, dirty)

    def _unreadable(self, node: Node, exc: PhfsError) -> None:
        """The store does not give the bytes that `node` needs from under another key."""
        if (dirty := node.dirty) is not None and dirty.state is State.DIRTY:
            self._refused(node, dirty, self._inodes.key(node), exc)

    def _stored(self, node: Node, dirty: DirtyFile, key: ObjectKey, snap: Snapshot, info: ObjectInfo) -> None:
        with self._changes.noting():
            self._changes.keep(node)
            dirty.target = None
            self._changes.touch(node)
            old_base, node.base = node.base, Base(key, info.etag, info.size)
            self._changes.landed(key, info.etag, except_node=node)
            if not node.detached and self._inodes.key(node) == key:
                dirty.over = info.etag
            self._changes.attempts.answered(key)
            if snap.layer is not None:
                self._uncover(node, snap.layer, old_base, info)
            elif old_base is not None:
                rekey = partial(self._blocks.rekey, old_base.key, old_base.etag, key, info.etag)
                self._journal.after(rekey)
            dirty.on(Event.STORED)
            self._changes.files.accepted(node)
            self._changes.users.track(node)
            if node.detached:
                if not node.opens:
                    self._changes.abandon(node)
                elif node.dirty is not None:
                    self._changes.files.save(node)
            elif dirty.state is State.CLEAN:
                self._changes.files.clean(node)
            else:
                dirty.since = trio.current_time()
                self._changes.files.save(node)
                self._queue.schedule(node)
        metrics.UPLOADED_FILES.add()
        log.debug("stored key=%s bytes=%d", key, info.size)
        self._changes.endings.announce(node)

    def _uncover(self, node: Node, layer: Layer, old_base: Base | None, info: ObjectInfo) -> None:
        """The bottom layer is the store's new version: its bytes become clean blocks."""
        staged = node.staged
        assert staged is not None
        metrics.UPLOADED_BYTES.add(layer.local_bytes)
        covered = layer.extents if layer.seen else Extents([(0, layer.size)])
        base = (old_base.key, old_base.etag, old_base.size) if layer.seen and old_base is not None else None
        self._journal.after(partial(_close_version, node))
        self._journal.end_layer(layer.id)
        self._journal.after(partial(self._keep, layer, info, covered, base))
        del staged.layers[0]
        staged.frozen = False
        node.inherited = None
        if not staged.layers:
            node.staged = None

    def _keep(
        self, layer: Layer, info: ObjectInfo, covered: Extents, base: tuple[ObjectKey, ETag, int] | None
    ) -> None:
        self._area.release(layer)
        self._blocks.adopt(info.key, info.etag, info.size, layer.data, covered, base=base, base_bytes=layer.seen)
        self._area.discard(layer)

    @property
    def spared(self) -> int:
        """Objects that were removed here and stay, since somebody else had stored them anew."""
        return self._deletes.spared

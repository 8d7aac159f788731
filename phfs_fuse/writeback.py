"""Write-back: brings the store to what the tree says. Owns the set of dirty files, the deleted keys, the queue.

The rule is one: for each key, the store shall have what the node of that name says, or nothing. A file is uploaded
when it has been quiet for a while; a rename, chmod or unlink before that only changes what will be uploaded. What
must not happen to a key waits (is parked): while a request on the same key is under way, and while somebody still
needs the bytes that the store has under it (a renamed file before its copy, an unlinked file that is open).

All methods run on the event loop; those that do not await are atomic. Every change is in the journal before the
method returns. Source for the conditions: S3 API, conditional requests (If-Match, If-None-Match).
"""

from __future__ import annotations

import heapq
import json
import logging
import math
import os
import random
import socket
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import trio

from phfs_fuse import keys
from phfs_fuse.attrs import to_metadata
from phfs_fuse.blocks import BlockCache
from phfs_fuse.config import OnConflict, WritebackConfig
from phfs_fuse.dirty import DirtyFile, Event, State
from phfs_fuse.errors import (
    AccessDenied,
    IllegalName,
    NameTooLong,
    NoSpace,
    NotFound,
    NotSupported,
    PhfsError,
    StaleVersion,
    StoreTimeout,
    StoreUnavailable,
    TooLarge,
    VersionChanged,
)
from phfs_fuse.extents import Extents
from phfs_fuse.gone import Gone, GoneKeys
from phfs_fuse.inodes import Base, Inodes, Node
from phfs_fuse.journal import Journal, LayerRow, PresentRow
from phfs_fuse.staging import Layer, Staged, StagingArea
from phfs_fuse.store.base import Expect, ObjectInfo, ObjectStore
from phfs_fuse.tasks import gather
from phfs_fuse.types import MIB, ETag, Ino, ObjectKey
from phfs_fuse.upload import Fill, Snapshot, Uploader

log = logging.getLogger(__name__)

FINAL = (AccessDenied, TooLarge, NameTooLong, IllegalName, NotSupported)  # asking again soon does not help
Work = Node | Gone


def _folder_of(key: str) -> str:
    """The key of the directory that has `key` (a file's or a directory's) as a name."""
    return key[: key.rstrip("/").rfind("/") + 1]


def _local(key: str, exc: OSError) -> PhfsError:
    return PhfsError("upload", key, f"staging file: {exc.strerror or exc}")


@dataclass(frozen=True, slots=True)
class Pending:
    """What waits for the store."""

    files: int
    deletes: int
    bytes: int
    oldest_seconds: float


class Writeback:
    def __init__(
        self,
        *,
        store: ObjectStore,
        inodes: Inodes,
        blocks: BlockCache,
        journal: Journal,
        area: StagingArea,
        config: WritebackConfig,
    ) -> None:
        self._store = store
        self._inodes = inodes
        self._blocks = blocks
        self._journal = journal
        self._area = area
        self._config = config
        self._uploader = Uploader(store, journal, config)
        self.gone = GoneKeys()
        self._dirty: dict[Ino, Node] = {}
        self._sources: dict[ObjectKey, set[Node]] = {}  # who needs the stored bytes of a key that is not its own
        self._source_of: dict[Node, ObjectKey] = {}
        self._busy: set[ObjectKey] = set()
        self._parked: dict[ObjectKey, list[Work]] = {}
        self._queue: list[tuple[float, int, Work]] = []
        self._ticket = 0
        self._running = 0
        self._seq = 0
        self._wake = trio.Event()
        self._settled = trio.Event()
        self._waiters: dict[Ino, trio.Event] = {}
        self._draining = False
        self._nursery: trio.Nursery | None = None
        self._materialising: set[Node] = set()
        self.uploaded_files = 0
        self.uploaded_bytes = 0
        self.conflicts = 0
        self.failures = 0

    # ---- what the tree tells us (none of these awaits) ----

    @property
    def seq(self) -> int:
        """The number of the last local change; an answer asked for before it may be outdated."""
        return self._seq

    def _touch(self, node: Node) -> None:
        self._seq += 1
        node.seq = self._seq

    def created(self, node: Node) -> None:
        """`node` has just got a name that nothing had. A file starts empty and is not in the store."""
        key = self._inodes.key(node)
        if node.is_dir:
            node.marker = self._take_gone(key)
            self.review_marker(node, changed=True)
            return
        layer = self._area.new(seen=0, size=0)
        dirty = self._make_dirty(node, self._take_gone(key))
        dirty.content = True
        node.staged = Staged([layer])
        dirty.on(Event.CHANGE)
        with self._journal.batch():
            self._journal.put_layer(LayerRow(layer.id, node.ino, 0))
            self._save(node)
        self._touch(node)
        self._schedule(node)

    def stage(self, node: Node) -> Layer:
        """The layer that takes the next write to `node`; the caller then calls `written`. Raises: OSError."""
        staged = node.staged
        if staged is not None and not staged.needs_layer:
            return staged.top
        size = node.size
        seen = size if staged is not None or node.base is not None else 0
        if staged is None and node.base is not None:
            seen = min(size, node.base.size)
        layer = self._area.new(seen=seen, size=size)
        if node.dirty is None:
            self._make_dirty(node, node.base.etag if node.base else None)
        assert node.dirty is not None
        node.dirty.content = True
        if staged is None:
            node.staged = Staged([layer])
        else:
            staged.layers.append(layer)
        with self._journal.batch():
            self._journal.put_layer(LayerRow(layer.id, node.ino, seen))
            self._save(node)
        return layer

    def written(self, node: Node) -> None:
        """Bytes of the staged `node` changed."""
        assert node.dirty is not None
        self._changed(node, node.dirty)

    def attrs_changed(self, node: Node) -> None:
        """Mode, owner, times or extended attributes of `node` changed."""
        if node.is_dir:
            self.review_marker(node, changed=True)
            return
        dirty = node.dirty or self._make_dirty(node, node.base.etag if node.base else None)
        dirty.attrs = True
        self._save(node)
        self._changed(node, dirty)

    def closed(self, node: Node) -> None:
        """The last descriptor that could write is closed: from now on the quiet time counts."""
        if node.dirty is not None and node.dirty.state is not State.CLEAN:
            if node.dirty.content:
                self._save(node)  # size and times are final
            self._schedule(node)

    def released(self, node: Node) -> None:
        """The last descriptor of `node` is closed."""
        if node.detached and node.opens == 0:
            self._abandon(node)
            self._inodes.drop_unused(node)

    def unlinked(self, node: Node, key: ObjectKey) -> None:
        """`node`, detached just now, had the name `key`; the key shall vanish from the store."""
        self._replaced(node, key, keep_gone=True)

    def replaced(self, node: Node, key: ObjectKey) -> ETag | None:
        """`node`, detached just now, gave its name to another file. Returns the version in the store."""
        return self._replaced(node, key, keep_gone=False)

    def _replaced(self, node: Node, key: ObjectKey, *, keep_gone: bool) -> ETag | None:
        self._touch(node)
        over, in_store = self._stored_as(node, key)
        with self._journal.batch():
            if keep_gone and (in_store or node.is_dir):
                self._add_gone(key, over, request=in_store)
            if node.opens and not node.is_dir:
                if node.dirty is not None:
                    self._save(node)
                self._track(node)
            else:
                self._abandon(node)
        return over

    def _stored_as(self, node: Node, key: ObjectKey) -> tuple[ETag | None, bool]:
        """(version in the store under `key` that belongs to node, whether there is or may soon be one)."""
        if node.is_dir:
            over = node.marker
        elif node.dirty is not None:
            over = node.dirty.over
        else:
            over = node.base.etag if node.base else None
        coming = node.dirty is not None and node.dirty.uploading and node.dirty.target == key
        return over, over is not None or coming

    def renamed(self, node: Node, old_key: ObjectKey, over: ETag | None) -> None:
        """`node` had the name `old_key` and now has another, where the store has version `over` (None: nothing)."""
        self._touch(node)
        key = self._inodes.key(node)
        over = self._take_gone(key) or over
        old_over, in_store = self._stored_as(node, old_key)
        with self._journal.batch():
            if in_store or node.is_dir:
                self._add_gone(old_key, old_over, request=in_store)
            if node.is_dir:
                node.marker = over
                self.review_marker(node, changed=True)
                return
            dirty = node.dirty or self._make_dirty(node, over)
            dirty.over = over
            self._track(node)
            self._save(node)
        self._changed(node, dirty)

    def batch(self) -> AbstractContextManager[None]:
        """One transaction of the journal for several changes; a context manager, not to be held over an await."""
        return self._journal.batch()

    def review_marker(self, node: Node, *, changed: bool = False) -> None:
        """A directory got or lost a child, or its attributes `changed`: decide whether it needs a marker object."""
        if node.detached or not self._inodes.key(node):
            return
        wanted = node.own_attrs or not node.kids
        if wanted == (node.marker is not None) and not (wanted and changed):
            if node.dirty is not None and not node.dirty.uploading:
                self._clean(node)
            return
        dirty = node.dirty or self._make_dirty(node, node.marker)
        dirty.attrs = True
        self._save(node)
        self._changed(node, dirty)

    # ---- bookkeeping ----

    def _make_dirty(self, node: Node, over: ETag | None) -> DirtyFile:
        dirty = node.dirty = DirtyFile(over=over, since=trio.current_time())
        self._dirty[node.ino] = node
        return dirty

    def _changed(self, node: Node, dirty: DirtyFile) -> None:
        if dirty.state is State.CLEAN:
            dirty.since = trio.current_time()
        dirty.on(Event.CHANGE)
        self._touch(node)
        if not node.detached:
            self._schedule(node)

    def _save(self, node: Node) -> None:
        """Write the row of a dirty node."""
        dirty = node.dirty
        assert dirty is not None
        base = node.base
        xattrs = node.xattrs
        self._journal.put(
            PresentRow(
                ino=node.ino,
                key=self._inodes.key(node),
                name=node.name,
                detached=node.detached,
                mode=node.mode,
                uid=node.uid,
                gid=node.gid,
                rdev=node.rdev,
                mtime_ns=node.mtime_ns,
                ctime_ns=node.ctime_ns,
                xattrs=json.dumps({k.hex(): v.hex() for k, v in xattrs.items()}).encode() if xattrs else None,
                own_attrs=node.own_attrs,
                base_key=base.key if base else None,
                base_etag=base.etag if base else None,
                base_size=base.size if base else None,
                over=dirty.over,
                content=dirty.content,
                attrs=dirty.attrs,
            )
        )

    def _clean(self, node: Node) -> None:
        """Nothing of `node` waits any more."""
        node.dirty = None
        self._dirty.pop(node.ino, None)
        self._journal.drop(node.ino)
        self._announce(node)
        self._inodes.drop_unused(node)

    def _announce(self, node: Node | None = None) -> None:
        """Something ended: wake who waits for `node`, and who waits for anything."""
        if node is not None and (waiter := self._waiters.pop(node.ino, None)) is not None:
            waiter.set()
        self._settled.set()
        self._settled = trio.Event()

    def _abandon(self, node: Node) -> None:
        """Nobody can ever read `node` again: its bytes need no upload."""
        if node.dirty is not None and node.dirty.uploading:
            return  # `_landed` comes back to this
        self._untrack(node)
        if node.staged is not None:
            for layer in node.staged.layers:
                self._area.discard(layer)
            node.staged = None
        if node.dirty is not None:
            self._clean(node)

    def _track(self, node: Node) -> None:
        """Note whether `node` needs the stored bytes of a key that is not (or no longer) its own."""
        base = node.base
        hidden = node.staged is not None and not node.staged.bottom.gaps()
        if base is None or hidden or (not node.detached and base.key == self._inodes.key(node)):
            self._untrack(node)
        elif self._source_of.get(node) != base.key:
            self._untrack(node)
            self._source_of[node] = base.key
            self._sources.setdefault(base.key, set()).add(node)

    def _untrack(self, node: Node) -> None:
        if (key := self._source_of.pop(node, None)) is None:
            return
        users = self._sources[key]
        users.discard(node)
        if not users:
            del self._sources[key]
            self._unpark(key)

    # ---- deleted keys ----

    def _add_gone(self, key: ObjectKey, etag: ETag | None, *, request: bool) -> None:
        self._seq += 1
        gone = Gone(key, etag, request, trio.current_time() + self._delay)
        self.gone.add(gone)
        if request:
            self._journal.put_gone(key, etag)
        self._push(gone, gone.due)

    def _take_gone(self, key: ObjectKey) -> ETag | None:
        """The key is in use again; returns the version that the store still has there."""
        if (gone := self.gone.take(key, self._seq)) is None:
            return None
        self._journal.drop_gone((key,))
        return gone.etag

    # ---- scheduling ----

    @property
    def _delay(self) -> float:
        return 0.0 if self._draining else self._config.delay_seconds

    def _schedule(self, node: Node) -> None:
        """Set when `node` is due: after the quiet time once nobody can write to it, by age in any case."""
        dirty = node.dirty
        assert dirty is not None
        now = trio.current_time()
        age = self._config.open_seconds * max(1.0, node.size / (64 * MIB))
        quiet = math.inf if node.writers and not self._draining else now + self._delay
        due = min(quiet, dirty.since + age)
        self._enqueue(node, dirty, max(due, dirty.due) if dirty.attempts else due)

    def _enqueue(self, node: Node, dirty: DirtyFile, due: float) -> None:
        dirty.due = due
        if due < dirty.queued:
            dirty.queued = due
            self._push(node, due)

    def _push(self, work: Work, due: float) -> None:
        self._ticket += 1
        heapq.heappush(self._queue, (due, self._ticket, work))
        if self._queue[0][2] is work:
            self._wake.set()

    def _hurry(self, node: Node) -> None:
        """Upload `node` now, if it waits for something that is not a request."""
        if node.dirty is not None:
            self._enqueue(node, node.dirty, 0.0)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Upload what is due, forever."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            while True:
                self._start_due()
                wake = self._wake
                full = self._running >= self._config.uploads_max
                until = self._queue[0][0] if self._queue and not full else math.inf
                with trio.move_on_at(until):
                    await wake.wait()
                self._wake = trio.Event()

    def _start_due(self) -> None:
        now = trio.current_time()
        deletes: list[Gone] = []
        while self._queue and self._queue[0][0] <= now and self._running < self._config.uploads_max:
            _, _, work = heapq.heappop(self._queue)
            if isinstance(work, Gone):
                if self._ready_to_delete(work):
                    deletes.append(work)
                    self._busy.add(work.key)
                    if len(deletes) == 1000:
                        self._start_deletes(deletes)
                        deletes = []
            elif (dirty := work.dirty) is not None:
                dirty.queued = math.inf
                if dirty.state is not State.DIRTY or work.detached:
                    continue
                if dirty.due > now:
                    self._enqueue(work, dirty, dirty.due)
                else:
                    self._start(work, dirty)
        if deletes:
            self._start_deletes(deletes)

    def _blocked(self, key: ObjectKey, work: Work) -> bool:
        """Park `work` if `key` is busy, or if another file still needs what the store has there."""
        users = self._sources.get(key)
        if key not in self._busy and not (users and users != {work}):
            return False
        self._parked.setdefault(key, []).append(work)
        for user in list(users or ()):
            if user is not work and (user.detached or self._waits_for(user, work)):
                self._materialise_soon(user)
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
            todo.extend(self._sources.get(self._inodes.key(at), ()))
        return False

    def _unpark(self, key: ObjectKey) -> None:
        for work in self._parked.pop(key, ()):
            if isinstance(work, Gone):
                self._push(work, 0.0)
            else:
                self._hurry(work)

    def _free(self, key: ObjectKey) -> None:
        self._busy.discard(key)
        self._unpark(key)

    def _spawn(self, task: Callable[..., Awaitable[None]], *args: object) -> None:
        assert self._nursery is not None
        self._running += 1
        self._nursery.start_soon(task, *args)

    def _done(self) -> None:
        self._running -= 1
        self._wake.set()

    # ---- deletes ----

    def _ready_to_delete(self, gone: Gone) -> bool:
        if self.gone.get(gone.key) is not gone or self._blocked(gone.key, gone):
            return False
        if gone.key.endswith("/") and self.gone.waits_below(gone.key):
            self._push(gone, trio.current_time() + max(self._delay, 0.05))
            return False
        if not gone.request:
            self._forget_gone([gone])
            return False
        return True

    def _start_deletes(self, batch: list[Gone]) -> None:
        self._spawn(self._delete, batch)

    async def _delete(self, batch: list[Gone]) -> None:
        failed: dict[ObjectKey, str] = {}
        try:
            if len(batch) == 1:
                await self._store.delete(batch[0].key)
            else:
                failed = dict(await self._store.delete_many([gone.key for gone in batch]))
        except PhfsError as exc:
            failed = {gone.key: str(exc) for gone in batch}
        finally:
            self._deleted(batch, failed)
            self._done()

    def _deleted(self, batch: list[Gone], failed: dict[ObjectKey, str]) -> None:
        for gone in batch:
            if gone.key in failed:
                self.failures += 1
                log.warning("delete of key=%s failed, will be tried again: %s", gone.key, failed[gone.key])
                if self.gone.get(gone.key) is gone:
                    self._push(gone, trio.current_time() + self._backoff(3))
            elif self.gone.get(gone.key) is not gone:
                self._landed(gone.key, None)  # the name is in use again: nothing is there to replace
        self._forget_gone([gone for gone in batch if gone.key not in failed])
        for gone in batch:
            self._free(gone.key)

    def _forget_gone(self, batch: Iterable[Gone]) -> None:
        done = [gone.key for gone in batch if self.gone.get(gone.key) is gone]
        self._seq += 1
        for key in done:
            self.gone.take(key, self._seq)
        self._journal.drop_gone(done)
        self._announce()

    # ---- uploads ----

    def _start(self, node: Node, dirty: DirtyFile) -> None:
        key = self._inodes.key(node)
        if self._blocked(key, node):
            return
        if node.is_dir:
            task: Callable[..., Awaitable[None]] = self._store_marker
        else:
            unchanged = not dirty.content and not dirty.attrs
            if unchanged and node.base and (node.base.key, node.base.etag) == (key, dirty.over):
                self._clean(node)  # renamed there and back
                return
            task = self._store_file
        if node.staged is not None and len(node.staged.layers) > 1:  # the snapshot of a failed try, unchanged
            snapshot = dirty.snapshot
            dirty.on(Event.UPLOAD)
            dirty.on(Event.CHANGE)
            dirty.snapshot = snapshot
        else:
            dirty.on(Event.UPLOAD)
        dirty.target = key
        self._busy.add(key)
        self._spawn(task, node, dirty, key)

    async def _store_file(self, node: Node, dirty: DirtyFile, key: ObjectKey) -> None:
        staged = node.staged
        if staged is not None:
            staged.frozen = True
        snap = Snapshot(
            key=key,
            metadata=to_metadata(node.attrs),
            expect=None if self._config.on_conflict is OnConflict.OVERWRITE else Expect(dirty.over),
            base=node.base,
            layer=staged.bottom if staged else None,
            fill=self._filler(node),
        )
        dirty.attrs = dirty.content = False
        try:
            info = await self._uploader.store(snap)
        except VersionChanged as exc:
            self._failed(node, dirty, key, None)
            await self._lost_race(node, dirty, key, snap, exc)
        except (PhfsError, OSError) as exc:
            self._failed(node, dirty, key, exc)
        except BaseException:
            self._failed(node, dirty, key, None)
            raise
        else:
            self._stored(node, dirty, key, snap, info)
        finally:
            self._free(key)
            self._done()

    def _filler(self, node: Node) -> Fill:
        async def fill(fd: int, start: int, end: int) -> None:
            assert node.base is not None
            version = self._blocks.open(node.base.key, node.base.etag, node.base.size)
            try:
                await version.copy_to(fd, start, end)
            finally:
                version.close()

        return fill

    def _failed(self, node: Node, dirty: DirtyFile, key: ObjectKey, exc: PhfsError | OSError | None) -> None:
        dirty.on(Event.FAILED)
        dirty.target = None
        dirty.attrs = True
        if node.staged is not None:
            dirty.content = True
            node.staged.frozen = len(node.staged.layers) > 1
        if node.detached:
            if not node.opens:
                self._abandon(node)
            return
        if exc is not None:
            self.failures += 1
            dirty.error = exc if isinstance(exc, PhfsError) else _local(key, exc)
            wait = self._backoff(dirty.attempts + (3 if isinstance(exc, FINAL) else 0))
            log.warning("upload of key=%s failed, next try in %.1f s: %s", key, wait, exc)
            self._enqueue(node, dirty, trio.current_time() + wait)
        self._announce(node)

    def _backoff(self, attempts: int) -> float:
        return random.uniform(0.5, 1.0) * min(2.0 ** min(attempts, 16) / 2, self._config.retry_seconds_max)

    def _stored(self, node: Node, dirty: DirtyFile, key: ObjectKey, snap: Snapshot, info: ObjectInfo) -> None:
        dirty.target = None
        self._touch(node)
        self.uploaded_files += 1
        old_base, node.base = node.base, Base(key, info.etag, info.size)
        self._landed(key, info.etag, except_node=node)
        if not node.detached and self._inodes.key(node) == key:
            dirty.over = info.etag
        with self._journal.batch():
            if snap.layer is not None:
                self._uncover(node, snap.layer, info)
            elif old_base is not None:
                self._blocks.rekey(old_base.key, old_base.etag, key, info.etag)
            dirty.on(Event.STORED)
            self._track(node)
            if node.detached:
                if not node.opens:
                    self._abandon(node)
                elif node.dirty is not None:
                    self._save(node)
            elif dirty.state is State.CLEAN:
                self._clean(node)
            else:
                dirty.since = trio.current_time()
                self._save(node)
                self._schedule(node)
        log.debug("stored key=%s bytes=%d", key, info.size)
        self._announce(node)

    def _uncover(self, node: Node, layer: Layer, info: ObjectInfo) -> None:
        """The bottom layer is the store's new version: its bytes become clean blocks."""
        staged = node.staged
        assert staged is not None
        self.uploaded_bytes += layer.local_bytes
        covered = layer.extents if layer.seen else Extents([(0, layer.size)])
        if node.version is not None:
            node.version.close()
            node.version = None
        self._area.release(layer)
        self._blocks.adopt(info.key, info.etag, info.size, layer.path, covered)
        self._area.discard(layer)
        self._journal.drop_layer(layer.id)
        del staged.layers[0]
        staged.frozen = False
        if not staged.layers:
            node.staged = None

    def _landed(self, key: ObjectKey, etag: ETag | None, *, except_node: Node | None = None) -> None:
        """The store now has `etag` under `key` by our own doing; whoever has the name now may replace that."""
        if (gone := self.gone.get(key)) is not None:
            gone.etag = etag
            gone.request = gone.request or etag is not None
            self._journal.put_gone(key, etag)
            return
        node = self._find(key)
        if node is not None and node is not except_node and node.dirty is not None:
            node.dirty.over = etag
            self._save(node)

    def _find(self, key: ObjectKey) -> Node | None:
        """The known node of that key."""
        prefix = self._inodes.key(self._inodes.root)
        at: Node | None = self._inodes.root
        for segment in key.removeprefix(prefix).rstrip("/").split("/"):
            if at is None or at.kids is None:
                return None
            try:
                at = at.kids.get(keys.name_of(segment))
            except IllegalName:
                return None
        return at

    # ---- markers ----

    async def _store_marker(self, node: Node, dirty: DirtyFile, key: ObjectKey) -> None:
        marker = node.marker
        try:
            wanted = node.own_attrs or (not node.kids and await self._is_empty(key))
            if wanted:
                info = await self._store.put(key, b"", to_metadata(node.attrs), expect=None)
                marker = info.etag
            elif marker is not None:
                await self._store.delete(key)
                marker = None
        except (PhfsError, OSError) as exc:
            self._failed(node, dirty, key, exc)
        except BaseException:
            self._failed(node, dirty, key, None)
            raise
        else:
            self._marker_stored(node, dirty, key, marker)
        finally:
            self._free(key)
            self._done()

    def _marker_stored(self, node: Node, dirty: DirtyFile, key: ObjectKey, marker: ETag | None) -> None:
        dirty.target = None
        dirty.on(Event.STORED)
        self._touch(node)
        if node.detached or self._inodes.key(node) != key:
            self._landed(key, marker)
            if node.detached:
                self._abandon(node)
                return
        else:
            node.marker = marker
        if dirty.state is State.CLEAN:
            self._clean(node)
            self.review_marker(node)  # a child may have come or gone meanwhile
        else:
            self._schedule(node)
        self._announce(node)

    async def _is_empty(self, key: ObjectKey) -> bool:
        """Whether the store has nothing below the directory but what is deleted here."""
        page = await self._store.list(key, delimiter=False, count_max=10)
        return all(found.key == key or found.key in self.gone for found in page.objects) and not page.next_token

    # ---- conflicts, rings ----

    async def _lost_race(
        self, node: Node, dirty: DirtyFile, key: ObjectKey, snap: Snapshot, exc: VersionChanged
    ) -> None:
        """The store moved on under our bytes (or our own earlier try did reach it). Nothing is overwritten."""
        try:
            found: ObjectInfo | None = await self._store.head(key)
        except NotFound:
            found = None
        except PhfsError as other:
            self._retry(node, dirty, other)
            return
        if node.detached or node.dirty is not dirty or self._inodes.key(node) != key:
            return
        size = snap.layer.size if snap.layer else snap.base.size if snap.base else 0
        if found is None:
            log.warning("key=%s was deleted by somebody else while changes waited; storing it again", key)
            dirty.over = None
        elif found.size == size and dict(found.metadata or {}) == dict(snap.metadata):
            dirty.over = found.etag  # our own upload, whose answer was lost: once more, over it
        elif found.etag == dirty.over:
            self._retry(node, dirty, exc)  # not our name has changed, but the base that we started from
            return
        elif self._config.on_conflict is OnConflict.FAIL:
            self._retry(node, dirty, exc)
            return
        else:
            self._keep_both(node, dirty, key)
        self._save(node)
        self._hurry(node)

    def _retry(self, node: Node, dirty: DirtyFile, exc: PhfsError) -> None:
        dirty.error = exc
        log.error("upload of key=%s waits: %s", self._inodes.key(node), exc)
        self._enqueue(node, dirty, trio.current_time() + self._backoff(dirty.attempts + 3))
        self._announce(node)

    def _keep_both(self, node: Node, dirty: DirtyFile, key: ObjectKey) -> None:
        """Our version goes on under another name beside the winner's."""
        parent = node.parent
        assert parent is not None
        assert parent.kids is not None
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        suffix = f".conflict-{socket.gethostname()}-{stamp}".encode()
        name = node.name[: 255 - len(suffix) - 4] + suffix
        extra = 0
        while name in parent.kids:
            extra += 1
            name = node.name[: 255 - len(suffix) - 4] + suffix + f"-{extra}".encode()
        path = self._inodes.path(node)
        self._inodes.move(node, parent, name)
        parent.complete_at = -math.inf
        self.conflicts += 1
        dirty.over = None
        self._track(node)
        with self._journal.batch():
            self._journal.put_conflict(path, self._inodes.path(node))
            self._save(node)
        log.warning(
            "conflict: %s was changed by somebody else, ours is kept as %s", path, name.decode(errors="replace")
        )

    def _materialise_soon(self, node: Node) -> None:
        """Fetch the stored bytes that `node` needs, so that their key is free to change."""
        if node.dirty is not None and node.dirty.uploading:
            return  # it will need them no more when that ends
        if self._nursery is not None and node not in self._materialising:
            self._materialising.add(node)
            self._nursery.start_soon(self._materialise, node)

    async def _materialise(self, node: Node) -> None:
        """Retried until it worked, the version is gone, or nobody needs it any more."""
        try:
            for attempt in range(1, 100):
                try:
                    await self._copy_base(node)
                    return
                except StaleVersion as exc:
                    log.warning("bytes of ino=%d are lost, somebody else has replaced them: %s", node.ino, exc)
                    self._untrack(node)
                    return
                except (PhfsError, OSError) as exc:
                    log.warning("bytes of ino=%d cannot be fetched yet: %s", node.ino, exc)
                    await trio.sleep(self._backoff(attempt))
        finally:
            self._materialising.discard(node)

    async def _copy_base(self, node: Node) -> None:
        if node not in self._source_of or (node.dirty is not None and node.dirty.uploading):
            return
        if node.staged is None:
            self.stage(node)
        staged = node.staged
        assert staged is not None
        staged.frozen = True
        layer = staged.bottom
        fill = self._filler(node)
        try:
            for start, end in layer.gaps():
                fd = os.open(layer.path, os.O_RDWR | os.O_CLOEXEC)
                try:
                    await fill(fd, start, end)
                finally:
                    os.close(fd)
                layer.filled(start, end)
        finally:
            staged.frozen = len(staged.layers) > 1
        if node.dirty is not None and node.dirty.state is State.CLEAN:
            node.dirty.on(Event.CHANGE)
        self._track(node)

    def recover(self, found: Iterable[tuple[Node, PresentRow]]) -> None:
        """Take up what an earlier process left in the journal (the nodes are in the tree again)."""
        for key, etag in self._journal.gone():
            self.gone.add(gone := Gone(key, etag, True, 0.0))
            self._push(gone, 0.0)
        for node, row in found:
            dirty = self._make_dirty(node, row.over)
            dirty.content, dirty.attrs = row.content, row.attrs
            if node.is_dir:
                node.marker = row.over
            self._changed(node, dirty)
            self._track(node)

    async def abort_stale_uploads(self) -> None:
        """Multipart uploads that an earlier process of this state directory began and did not end."""
        await self._uploader.abort_stale()

    # ---- waiting ----

    def _waiting(self) -> list[Node]:
        return [node for node in self._dirty.values() if not node.detached]

    def pending(self) -> Pending:
        waiting = self._waiting()
        now = trio.current_time()
        oldest = max((now - node.dirty.since for node in waiting if node.dirty), default=0.0)
        return Pending(len(waiting), len(self.gone), self._area.held_bytes, oldest)

    def errors(self) -> list[tuple[str, str, int]]:
        """(path, reason, failed tries) of what could not be uploaded so far."""
        return [
            (self._inodes.path(node), str(node.dirty.error), node.dirty.attempts)
            for node in self._waiting()
            if node.dirty and node.dirty.error
        ]

    @property
    def store_is_away(self) -> bool:
        return any(isinstance(node.dirty.error, StoreUnavailable) for node in self._waiting() if node.dirty)

    def has_room(self, size: int) -> bool:
        return self._area.held_bytes + size <= self._config.dirty_bytes_max

    async def room(self, size: int) -> None:
        """Wait until `size` more dirty bytes are allowed. Raises: NoSpace (ENOSPC) after `full_seconds`."""
        with trio.move_on_after(self._config.full_seconds):
            while not self.has_room(size):
                for node in self._waiting():
                    self._hurry(node)
                await self._settled.wait()
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
        self._hurry(node)
        limit = self._config.fsync_seconds or math.inf
        with trio.move_on_after(limit):
            while node.dirty is dirty and dirty.stored < goal and not node.detached:
                if dirty.attempts > tries and (error := self.take_error(node)) is not None:
                    raise error
                await self._waiters.setdefault(node.ino, trio.Event()).wait()
            return
        raise StoreTimeout("fsync", self._inodes.path(node), f"not in the store after {limit:g} s")

    async def settle_names(self, folder: Node) -> None:
        """Return when the store has the changes so far of the names in `folder`, deletes included."""
        prefix = self._inodes.key(folder)
        nodes = [node for node in self._waiting() if node is folder or node.parent is folder]
        deletes = [gone for gone in self.gone.all() if _folder_of(gone.key) == prefix]
        await self._settle_all(nodes, deletes)

    async def settle_below(self, folder: Node) -> None:
        """Return when the store has all changes so far at and below `folder`, deletes included."""
        prefix = self._inodes.key(folder)
        nodes = [n for n in self._waiting() if n is folder or self._inodes.key(n).startswith(prefix)]
        await self._settle_all(nodes, [gone for gone in self.gone.all() if gone.key.startswith(prefix)])

    async def _settle_all(self, nodes: list[Node], deletes: list[Gone]) -> None:
        for gone in deletes:
            self._push(gone, 0.0)
        await gather([partial(self.settle, node) for node in nodes])
        while any(self.gone.get(gone.key) is gone for gone in deletes):
            await self._settled.wait()

    async def drain(self) -> bool:
        """Upload everything; from now on nothing waits for its quiet time. Returns whether all is in the store."""
        self._draining = True
        for gone in self.gone.all():
            self._push(gone, 0.0)
        for node in self._waiting():
            self._hurry(node)
        with trio.move_on_after(self._config.drain_seconds or math.inf):
            while self._waiting() or len(self.gone):
                await self._settled.wait()
                await trio.sleep(0.01)  # many end at once
        return not self._waiting() and not len(self.gone)

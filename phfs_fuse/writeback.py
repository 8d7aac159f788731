"""Write-back: brings the store to what the tree says. Owns the set of dirty files, the deleted keys, the queue.

The rule is one: for each key, the store shall have what the node of that name says, or nothing. A file is uploaded
when it has been quiet for a while; a rename, chmod or unlink before that only changes what will be uploaded. What
must not happen to a key waits (is parked): while a request on the same key is under way, and while somebody still
needs the bytes that the store has under it (a renamed file before its copy, an unlinked file that is open).

All methods run on the event loop; those that do not await are atomic. Every change is in the journal before the
method returns. Source for the conditions: S3 API, conditional requests (If-Match, If-None-Match).
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import random
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import trio

from phfs_fuse.attrs import to_metadata
from phfs_fuse.blocks import BlockCache
from phfs_fuse.changes import Changes
from phfs_fuse.config import OnConflict, WritebackConfig
from phfs_fuse.dirty import DirtyFile, Event, State
from phfs_fuse.errors import (
    AccessDenied,
    IllegalName,
    InvalidArgument,
    NameTooLong,
    NoSpace,
    NotFound,
    NotSupported,
    PhfsError,
    QuotaExceeded,
    StaleVersion,
    StoreTimeout,
    StoreUnavailable,
    TooLarge,
    VersionChanged,
)
from phfs_fuse.extents import Extents
from phfs_fuse.gone import Gone
from phfs_fuse.inodes import Base, Inodes, Node
from phfs_fuse.journal import Journal
from phfs_fuse.staging import Layer, StagingArea
from phfs_fuse.store.base import Expect, ObjectInfo, ObjectStore
from phfs_fuse.tasks import gather
from phfs_fuse.types import KEY_BYTES_MAX, NAME_BYTES_MAX, ETag, ObjectKey
from phfs_fuse.upload import Fill, Snapshot, Uploader
from phfs_fuse.uploadqueue import UploadQueue, Work

log = logging.getLogger(__name__)

LATE_SECONDS = 2.0  # a deletion that has waited so much longer than meant looks first
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
        changes: Changes,
        queue: UploadQueue,
        config: WritebackConfig,
    ) -> None:
        self._store = store
        self._inodes = inodes
        self._blocks = blocks
        self._journal = journal
        self._area = area
        self._changes = changes
        self._queue = queue
        self._config = config
        self.dirty_bytes_max = config.dirty_bytes_max
        self._uploader = Uploader(store, journal, config)
        self._busy: set[ObjectKey] = set()  # a request on the key is under way
        self._running = 0
        self._nursery: trio.Nursery | None = None
        self._materialising: set[Node] = set()
        self._filling: set[Node] = set()  # files whose bottom layer is being completed: no upload starts
        self.uploaded_files = 0
        self.uploaded_bytes = 0
        self.conflicts = 0
        self.failures = 0

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Upload what is due, forever."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            while True:
                self._start_due()
                wake = self._queue.wake
                full = self._running >= self._config.uploads_max
                until = math.inf if full else self._queue.next_due
                with trio.move_on_at(until):
                    await wake.wait()
                self._queue.wake = trio.Event()

    def _start_due(self) -> None:
        now = trio.current_time()
        deletes: list[Gone] = []
        while self._queue.next_due <= now and self._running < self._config.uploads_max:
            work = self._queue.pop()
            if isinstance(work, Gone):
                if self._ready_to_delete(work):
                    deletes.append(work)
                    self._busy.add(work.key)
                    if len(deletes) == 1000:
                        self._start_deletes(deletes)
                        deletes = []
            elif (dirty := work.dirty) is not None:
                if dirty.state is not State.DIRTY or work.detached:
                    continue
                if dirty.due > now:
                    self._queue.enqueue(work, dirty, dirty.due)
                else:
                    self._start(work, dirty)
        if deletes:
            self._start_deletes(deletes)

    def _blocked(self, key: ObjectKey, work: Work) -> bool:
        """Park `work` if `key` is busy, or if another file still needs what the store has there."""
        users = self._changes.users(key)
        if key not in self._busy and not (users and users != {work}):
            return False
        self._queue.park(key, work)
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
            todo.extend(self._changes.users(self._inodes.key(at)))
        return False

    def _free(self, key: ObjectKey) -> None:
        self._busy.discard(key)
        self._queue.unpark(key)

    def _spawn(self, task: Callable[..., Awaitable[None]], *args: object) -> None:
        assert self._nursery is not None
        self._running += 1
        self._nursery.start_soon(task, *args)

    def _done(self) -> None:
        self._running -= 1
        self._queue.wake.set()

    def _ready_to_delete(self, gone: Gone) -> bool:
        if self._changes.gone.get(gone.key) is not gone or self._blocked(gone.key, gone):
            return False
        if gone.key.endswith("/") and self._changes.gone.waits_below(gone.key):
            self._queue.push(gone, trio.current_time() + max(self._queue.delay, 0.05))
            return False
        if not gone.request:
            self._changes.deleted([gone])
            return False
        return True

    def _start_deletes(self, batch: list[Gone]) -> None:
        self._spawn(self._delete, batch)

    async def _delete(self, batch: list[Gone]) -> None:
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
            self._done()

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
        self._changes.deleted([gone])
        self._free(gone.key)
        return True

    def _deleted(self, batch: list[Gone], failed: dict[ObjectKey, str]) -> None:
        for gone in batch:
            if gone.key in failed:
                self.failures += 1
                log.warning("delete of key=%s failed, will be tried again: %s", gone.key, failed[gone.key])
                if self._changes.gone.get(gone.key) is gone:
                    self._queue.push(gone, trio.current_time() + self._backoff(3))
            elif self._changes.gone.get(gone.key) is not gone:
                self._changes.landed(gone.key, None)  # the name is in use again: nothing is there to replace
        self._changes.deleted([gone for gone in batch if gone.key not in failed])
        for gone in batch:
            self._free(gone.key)

    def _start(self, node: Node, dirty: DirtyFile) -> None:
        key = self._inodes.key(node)
        if node in self._filling or self._blocked(key, node):
            return
        if node.is_dir:
            task: Callable[..., Awaitable[None]] = self._store_marker
        else:
            unchanged = node.staged is None and not dirty.attrs
            if unchanged and node.base and (node.base.key, node.base.etag) == (key, dirty.over):
                self._changes.clean(node)  # renamed there and back
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
        dirty.attrs = False
        try:
            self._changes.attempt(key, snap.size, snap.metadata)
            info = await self._uploader.store(snap)
        except (VersionChanged, StaleVersion) as exc:
            self._failed(node, dirty, key, None)
            await self._lost_race(node, dirty, key, snap, exc)
        except (PhfsError, OSError) as exc:
            self._failed(node, dirty, key, exc)
        except BaseException:
            self._failed(node, dirty, key, None)
            raise
        else:
            try:
                self._stored(node, dirty, key, snap, info)
            except OSError as exc:  # after a restart it goes up once more
                log.error("journal cannot be written, check the disk of the state directory: %s", exc)
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
            node.staged.frozen = len(node.staged.layers) > 1
        if node.detached:
            if not node.opens:
                self._changes.abandon(node)
            return
        if exc is not None:
            self.failures += 1
            dirty.error = exc if isinstance(exc, PhfsError) else _local(key, exc)
            wait = self._backoff(dirty.attempts + (3 if isinstance(exc, FINAL) else 0))
            log.warning("upload of key=%s failed, next try in %.1f s: %s", key, wait, exc)
            self._queue.enqueue(node, dirty, trio.current_time() + wait)
        self._changes.announce(node)

    def _backoff(self, attempts: int) -> float:
        return random.uniform(0.5, 1.0) * min(2.0 ** min(attempts, 16) / 2, self._config.retry_seconds_max)

    def _stored(self, node: Node, dirty: DirtyFile, key: ObjectKey, snap: Snapshot, info: ObjectInfo) -> None:
        dirty.target = None
        self._changes.touch(node)
        self.uploaded_files += 1
        old_base, node.base = node.base, Base(key, info.etag, info.size)
        self._changes.landed(key, info.etag, except_node=node)
        if not node.detached and self._inodes.key(node) == key:
            dirty.over = info.etag
        with self._journal.batch():
            self._changes.answered(key)
            if snap.layer is not None:
                self._uncover(node, snap.layer, old_base, info)
            elif old_base is not None:
                self._blocks.rekey(old_base.key, old_base.etag, key, info.etag)
            dirty.on(Event.STORED)
            self._changes.track(node)
            if node.detached:
                if not node.opens:
                    self._changes.abandon(node)
                elif node.dirty is not None:
                    self._changes.save(node)
            elif dirty.state is State.CLEAN:
                self._changes.clean(node)
            else:
                dirty.since = trio.current_time()
                self._changes.save(node)
                self._queue.schedule(node)
        log.debug("stored key=%s bytes=%d", key, info.size)
        self._changes.announce(node)

    def _uncover(self, node: Node, layer: Layer, old_base: Base | None, info: ObjectInfo) -> None:
        """The bottom layer is the store's new version: its bytes become clean blocks."""
        staged = node.staged
        assert staged is not None
        self.uploaded_bytes += layer.local_bytes
        covered = layer.extents if layer.seen else Extents([(0, layer.size)])
        base = (old_base.key, old_base.etag, old_base.size) if layer.seen and old_base is not None else None
        if node.version is not None:
            node.version.close()
            node.version = None
        self._journal.end_layer(layer.id)
        self._journal.after(partial(self._keep, layer, info, covered, base))
        del staged.layers[0]
        staged.frozen = False
        if not staged.layers:
            node.staged = None

    def _keep(
        self, layer: Layer, info: ObjectInfo, covered: Extents, base: tuple[ObjectKey, ETag, int] | None
    ) -> None:
        self._area.release(layer)
        self._blocks.adopt(info.key, info.etag, info.size, layer.path, covered, base=base, base_bytes=layer.seen)
        self._area.discard(layer)

    async def _store_marker(self, node: Node, dirty: DirtyFile, key: ObjectKey) -> None:
        marker = node.marker
        try:
            if not node.own_attrs and not node.kids:
                node.unseen = await self._has_more(key)
            if node.own_attrs or not (node.kids or node.unseen):
                self._changes.attempt(key, 0, {})
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
        self._changes.touch(node)
        self._changes.answered(key)
        if node.detached or self._inodes.key(node) != key:
            self._changes.landed(key, marker)
            if node.detached:
                self._changes.abandon(node)
                return
        else:
            node.marker = marker
        if dirty.state is State.CLEAN:
            self._changes.clean(node)
            self._changes.review_marker(node)  # a child may have come or gone meanwhile
        else:
            self._queue.schedule(node)
        self._changes.announce(node)

    async def _has_more(self, key: ObjectKey) -> bool:
        """Whether the store has more below the directory than what is removed here, or was while it was asked."""
        seq, token = self._changes.seq, None
        while True:
            page = await self._store.list(key, delimiter=False, token=token)
            for found in page.objects:
                if found.key != key and found.key not in self._busy and not self._changes.gone.hides(found.key, seq):
                    return True
            if (token := page.next_token) is None:
                return False

    async def _lost_race(self, node: Node, dirty: DirtyFile, key: ObjectKey, snap: Snapshot, exc: PhfsError) -> None:
        """The store moved on under our bytes (or our own earlier try did reach it). Nothing is overwritten."""
        try:
            if not await self._has_base(node, dirty, snap):
                return
            found: ObjectInfo | None = await self._store.head(key)
        except NotFound:
            found = None
        except PhfsError as other:
            self._retry(node, dirty, other)
            return
        if node.detached or node.dirty is not dirty or self._inodes.key(node) != key:
            return
        if found is None:
            log.warning("key=%s was deleted by somebody else while changes waited; storing it again", key)
            dirty.over = None
        elif self._changes.is_ours(found):
            dirty.over = found.etag  # an upload whose answer was lost: once more, over it
        elif found.etag == dirty.over:
            self._retry(node, dirty, exc)  # not our name has changed, but the base that we started from
            return
        elif self._config.on_conflict is OnConflict.FAIL:
            self._retry(node, dirty, exc)
            return
        else:
            self._keep_both(node, dirty, key)
        self._changes.save(node)
        self._queue.hurry(node)

    async def _has_base(self, node: Node, dirty: DirtyFile, snap: Snapshot) -> bool:
        """Whether what `node` takes from the stored version can be had. If not, its changes end here: they are
        dropped (attributes of a version that is no more) or saved aside. Raises: PhfsError."""
        base = snap.base
        if base is None or (snap.layer is not None and not snap.layer.gaps()):
            return True
        with suppress(NotFound):
            if (await self._store.head(base.key)).etag == base.etag:
                return True
        if node.detached or node.dirty is not dirty:
            return False
        if snap.layer is None and self._inodes.key(node) == base.key:
            log.warning("attributes of key=%s are dropped: somebody else has stored a new version", base.key)
            self._forget_changes(node)
            return False
        try:
            await self._copy_base(node)  # the block cache may have all of it
            return True
        except StaleVersion as exc:
            if node.opens and not self._queue.draining:
                self._retry(node, dirty, exc)
            else:
                self._save_aside(node, exc)
        except OSError as exc:
            self._retry(node, dirty, _local(base.key, exc))
        return False

    def _forget_changes(self, node: Node) -> None:
        """Show what the store has instead of `node`."""
        if node.parent is not None:
            self._inodes.incomplete(node.parent)
        self._inodes.detach(node)
        self._changes.abandon(node)

    def _save_aside(self, node: Node, exc: PhfsError) -> None:
        path = self._inodes.path(node)
        layers = node.staged.layers if node.staged else []
        saved = [target for layer in layers if (target := self._area.save_aside(layer.path)) is not None]
        self.conflicts += 1
        for kept_as in [os.fsencode(target) for target in saved] or [b""]:
            self._journal.put_conflict(self._inodes.raw_path(node), kept_as, outside=True)
        log.error(
            "%s cannot be stored: somebody else has replaced the version it was made from (%s); changes are in %s",
            path,
            exc,
            ", ".join(map(str, saved)) or "no file, there were none to its bytes",
        )
        self._forget_changes(node)

    def _retry(self, node: Node, dirty: DirtyFile, exc: PhfsError) -> None:
        dirty.error = exc
        log.error("upload of key=%s waits: %s", self._inodes.key(node), exc)
        self._queue.enqueue(node, dirty, trio.current_time() + self._backoff(dirty.attempts + 3))
        self._changes.announce(node)

    def _keep_both(self, node: Node, dirty: DirtyFile, key: ObjectKey) -> None:
        """Our version goes on under another name beside the winner's."""
        parent = node.parent
        assert parent is not None
        if (name := self._conflict_name(parent, node.name)) is None:
            self._save_aside(node, NameTooLong("rename", key, "there is no room for a second name"))
            return
        path = self._inodes.raw_path(node)
        self._inodes.move(node, parent, name)
        self._changes.answered(key)
        self._inodes.incomplete(parent)
        self.conflicts += 1
        dirty.over = None
        self._changes.track(node)
        with self._journal.batch():
            self._journal.put_conflict(path, self._inodes.raw_path(node), outside=False)
            self._changes.save(node)
        log.warning(
            "conflict: %s was changed by somebody else, ours is kept as %s",
            path.decode(errors="replace"),
            name.decode(errors="replace"),
        )

    def _conflict_name(self, parent: Node, name: bytes) -> bytes | None:
        """A free name `NAME.conflict-HOST-TIME`, with NAME cut off where it would be too long; None if all are."""
        assert parent.kids is not None
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        suffix = f".conflict-{socket.gethostname()}-{stamp}".encode()
        room = min(NAME_BYTES_MAX, KEY_BYTES_MAX - len(self._inodes.key(parent).encode()))
        for extra in (b"", *(b"-%d" % number for number in range(1, 1000))):
            stem = name[: max(0, room - len(suffix) - len(extra))].decode(errors="ignore").encode()
            found = stem + suffix + extra
            if len(found) <= room and found not in parent.kids:
                return found
        return None

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
            for attempt in itertools.count(1):
                try:
                    if self._changes.is_tracked(node) and not (node.dirty and node.dirty.uploading):
                        await self._copy_base(node)
                    return
                except StaleVersion as exc:
                    log.warning("bytes of ino=%d are lost, somebody else has replaced them: %s", node.ino, exc)
                    self._changes.untrack(node)
                    return
                except (PhfsError, OSError) as exc:
                    log.warning("bytes of ino=%d cannot be fetched yet: %s", node.ino, exc)
                    await trio.sleep(self._backoff(attempt))
        finally:
            self._materialising.discard(node)

    async def _copy_base(self, node: Node) -> None:
        if node.staged is None:
            self._changes.stage(node)
        staged = node.staged
        assert staged is not None
        self._filling.add(node)
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
            self._filling.discard(node)
            self._queue.hurry(node)
        if node.dirty is not None and node.dirty.state is State.CLEAN:
            node.dirty.on(Event.CHANGE)
        self._changes.track(node)

    async def abort_stale_uploads(self) -> None:
        """Multipart uploads that an earlier process of this state directory began and did not end."""
        await self._uploader.abort_stale()

    def pending(self) -> Pending:
        waiting = self._changes.waiting()
        now = trio.current_time()
        oldest = max((now - node.dirty.since for node in waiting if node.dirty), default=0.0)
        return Pending(len(waiting), len(self._changes.gone), self._area.held_bytes, oldest)

    def errors(self) -> list[tuple[str, str, int]]:
        """(path, reason, failed tries) of what could not be uploaded so far."""
        return [
            (self._inodes.path(node), str(node.dirty.error), node.dirty.attempts)
            for node in self._changes.waiting()
            if node.dirty and node.dirty.error
        ]

    @property
    def store_is_away(self) -> bool:
        return any(isinstance(node.dirty.error, StoreUnavailable) for node in self._changes.waiting() if node.dirty)

    def limit(self, dirty_bytes_max: int) -> None:
        """Keep to another limit from now on; who waits for room looks again."""
        self.dirty_bytes_max = dirty_bytes_max
        self._changes.announce()

    def has_room(self, size: int) -> bool:
        return self._area.held_bytes + size <= self.dirty_bytes_max

    async def room(self, size: int) -> None:
        """Wait until `size` more dirty bytes are allowed. Raises: NoSpace (ENOSPC) after `full_seconds`."""
        with trio.move_on_after(self._config.full_seconds):
            while not self.has_room(size):
                for node in self._changes.waiting():
                    self._queue.hurry(node)
                await self._changes.settled.wait()
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
                await self._changes.waiter(node).wait()
            return
        raise StoreTimeout("fsync", self._inodes.path(node), f"not in the store after {limit:g} s")

    async def settle_names(self, folder: Node) -> None:
        """Return when the store has the changes so far of the names in `folder`, deletes included."""
        prefix = self._inodes.key(folder)
        nodes = [node for node in self._changes.waiting() if node is folder or node.parent is folder]
        deletes = [gone for gone in self._changes.gone.all() if _folder_of(gone.key) == prefix]
        await self._settle_all(nodes, deletes)

    async def settle_below(self, folder: Node) -> None:
        """Return when the store has all changes so far at and below `folder`, deletes included."""
        prefix = self._inodes.key(folder)
        nodes = [n for n in self._changes.waiting() if n is folder or self._inodes.key(n).startswith(prefix)]
        await self._settle_all(nodes, [gone for gone in self._changes.gone.all() if gone.key.startswith(prefix)])

    async def _settle_all(self, nodes: list[Node], deletes: list[Gone]) -> None:
        for gone in deletes:
            self._queue.push(gone, 0.0)
        await gather([partial(self.settle, node) for node in nodes])
        while any(self._changes.gone.get(gone.key) is gone for gone in deletes):
            await self._changes.settled.wait()

    async def drain(self) -> bool:
        """Upload everything; from now on nothing waits for its quiet time. Returns whether all is in the store."""
        self._queue.draining = True
        for gone in self._changes.gone.all():
            self._queue.push(gone, 0.0)
        for node in self._changes.waiting():
            self._queue.hurry(node)
        with trio.move_on_after(self._config.drain_seconds or math.inf):
            while self._changes.waiting() or len(self._changes.gone):
                await self._changes.settled.wait()
                await trio.sleep(0.01)  # many end at once
        return not self._changes.waiting() and not len(self._changes.gone)

    def end_drain(self) -> None:
        """The mount goes on: what is written from now on waits for its quiet time again."""
        self._queue.draining = False

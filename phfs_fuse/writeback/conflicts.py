"""What becomes of changes whose base or whose name in the store somebody else has changed. Owns no state.

Nothing is overwritten: whose upload loses is kept beside the winner, or saved outside of the mount.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from contextlib import suppress

import trio

from phfs_fuse import keys, metrics
from phfs_fuse.config.model import OnConflict
from phfs_fuse.errors import NameTooLong, NoSpace, NotFound, PhfsError, StaleVersion
from phfs_fuse.pending.changes import Changes
from phfs_fuse.pending.queue import UploadQueue
from phfs_fuse.state.journal import Journal
from phfs_fuse.state.refusal import Operation
from phfs_fuse.store.base import ObjectInfo, ObjectStore
from phfs_fuse.tasks import unforeseen
from phfs_fuse.tree.dirty import DirtyFile
from phfs_fuse.tree.inodes import Inodes
from phfs_fuse.tree.node import Node, Pages
from phfs_fuse.types import KEY_BYTES_MAX, NAME_BYTES_MAX, ObjectKey
from phfs_fuse.writeback.rescue import Rescue
from phfs_fuse.writeback.sources import Sources
from phfs_fuse.writeback.uploader import Snapshot

log = logging.getLogger(__name__)


def local_error(key: str, exc: OSError) -> PhfsError:
    """An error of the local disk, as one of the upload."""
    return PhfsError("upload", key, f"staging file: {exc.strerror or exc}")


def _log_conflict(path: bytes, name: bytes) -> None:
    log.warning(
        "conflict: %s was changed by somebody else, ours is kept as %s",
        path.decode(errors="replace"),
        name.decode(errors="replace"),
    )


class Conflicts:
    def __init__(
        self,
        *,
        store: ObjectStore,
        inodes: Inodes,
        journal: Journal,
        aside: Rescue,
        changes: Changes,
        queue: UploadQueue,
        sources: Sources,
        on_conflict: OnConflict,
    ) -> None:
        self._store = store
        self._inodes = inodes
        self._journal = journal
        self._aside = aside
        self._changes = changes
        self._queue = queue
        self._sources = sources
        self._on_conflict = on_conflict
        changes.on_displaced = self.give_name
        changes.on_shadowed = self.keep_folder

    async def lost_race(self, node: Node, dirty: DirtyFile, key: ObjectKey, snap: Snapshot, exc: PhfsError) -> None:
        """The store moved on under our bytes (or our own earlier try did reach it). Nothing is overwritten."""
        try:
            await self._lost_race(node, dirty, key, snap, exc)
        except PhfsError as other:
            self._retry(node, dirty, other)
        except OSError as other:
            self._retry(node, dirty, local_error(key, other))
        except Exception as other:
            unforeseen("conflict", other)
            self._retry(node, dirty, exc)

    async def _lost_race(self, node: Node, dirty: DirtyFile, key: ObjectKey, snap: Snapshot, exc: PhfsError) -> None:
        try:
            if not await self._has_base(node, dirty, snap):
                return
            found: ObjectInfo | None = await self._store.head(key, surely=True)
        except NotFound:
            found = None
        await self._journal.room_to_note()
        if node.detached or node.dirty is not dirty:
            return
        if self._inodes.key(node) != key:  # it has another name by now, which was put into the queue too early
            self._queue.hurry(node)
            return
        if found is None:
            log.warning("key=%s was deleted by somebody else while changes waited; storing it again", key)
            dirty.over = None
        elif self._changes.attempts.is_ours(found):
            dirty.over = found.etag  # an upload whose answer was lost: once more, over it
        elif found.etag == dirty.over:
            self._retry(node, dirty, exc)  # not our name has changed, but the base that we started from
            return
        elif self._on_conflict is OnConflict.FAIL:
            self._refuse(node, dirty, exc)
            return
        else:
            self.keep_both(node, found.size)
        self._changes.files.save(node)
        self._queue.hurry(node)

    async def _has_base(self, node: Node, dirty: DirtyFile, snap: Snapshot) -> bool:
        """Whether what `node` takes from the stored version can be had. If not, its changes end here: they are
        dropped (attributes of a version that is no more) or saved aside. Raises: PhfsError."""
        base = snap.base
        if base is None or (snap.layer is not None and not snap.layer.gaps()):
            return True
        with suppress(NotFound):
            if (await self._store.head(base.key, surely=True)).etag == base.etag:
                return True
        if node.detached or node.dirty is not dirty:
            return False
        if node.staged is None and self._inodes.key(node) == base.key:
            log.warning("attributes of key=%s are dropped: somebody else has stored a new version", base.key)
            self._forget_changes(node)
            return False
        try:
            await self._sources.copy_base(node)  # the block cache may have all of it
            return True
        except StaleVersion as exc:
            if node.opens and not self._queue.draining:
                self._retry(node, dirty, exc)
            else:
                self._save_aside(node, dirty, exc)
        except OSError as exc:
            self._retry(node, dirty, local_error(base.key, exc))
        return False

    def _forget_changes(self, node: Node) -> None:
        """Show what the store has instead of `node`."""
        key = self._inodes.key(node)
        with self._changes.noting():
            if node.parent is not None:
                self._inodes.incomplete(node.parent)
            self._inodes.displace(node)
            self._changes.displaced(node, key, None)
            self._changes.abandon(node)
            node.pages = Pages.DOUBTED  # they have what was changed, should anybody have it open

    def _save_aside(self, node: Node, dirty: DirtyFile, exc: PhfsError) -> None:
        path = self._inodes.path(node)
        if not self._aside.has_room(node):
            self._refuse(node, dirty, NoSpace("save", path, f"{exc}, and there is no room for it in saved/"))
            return
        with self._changes.noting():
            saved = self._aside.keep(node, str(exc), is_waiting=False)
            for kept_as in [os.fsencode(target) for target in saved] or [b""]:
                self._journal.put_conflict(self._inodes.raw_path(node), kept_as, outside=True)
            self._forget_changes(node)
        metrics.CONFLICTS.add()
        log.error(
            "%s cannot be stored: somebody else has replaced the version it was made from (%s); changes are in %s",
            path,
            exc,
            ", ".join(map(str, saved)) or "no file, there were none to its bytes",
        )

    def _retry(self, node: Node, dirty: DirtyFile, exc: PhfsError) -> None:
        dirty.error = exc
        log.error("upload of key=%s waits: %s", self._inodes.key(node), exc)
        self._queue.enqueue(node, dirty, trio.current_time() + self._queue.backoff(dirty.attempts + 3))
        self._changes.endings.announce(node)

    def _refuse(self, node: Node, dirty: DirtyFile, exc: PhfsError) -> None:
        """Only its user, or the other client, can settle it."""
        dirty.error = exc
        self._changes.files.refuse(node, Operation.UPLOAD, exc)
        self._queue.put_off(node, dirty)
        self._changes.endings.announce(node)

    def keep_both(self, node: Node, winner_size: int) -> None:
        """The dirty `node` goes on under another name, beside what the store has under its own."""
        parent, dirty, key = node.parent, node.dirty, self._inodes.key(node)
        assert parent is not None
        assert dirty is not None
        if (name := self._conflict_name(parent, node.name)) is None:
            self._save_aside(node, dirty, NameTooLong("rename", key, "there is no room for a second name"))
            return
        path = self._inodes.raw_path(node)
        with self._changes.noting():
            self._inodes.move(node, parent, name)
            self._changes.displaced(node, key, winner_size)
            self._changes.attempts.answered(key)
            self._inodes.incomplete(parent)
            dirty.over = None
            self._changes.users.track(node)
            self._journal.put_conflict(path, self._inodes.raw_path(node), outside=False)
            self._changes.files.save(node)
        metrics.CONFLICTS.add()
        _log_conflict(path, name)

    def give_name(self, node: Node) -> None:
        """Somebody is about to write to a file that was open while others took its name: the bytes go on under that
        name if it is free again, else beside the winner."""
        parent = node.parent
        while parent is not None and parent.detached:
            parent = parent.parent
        assert parent is not None
        assert parent.kids is not None
        path = self._inodes.raw_path(node)
        is_free = node.name not in parent.kids
        name = node.name if is_free else self._conflict_name(parent, node.name)
        if name is None:
            raise NoSpace("write", self._inodes.path(node), "others have replaced it, and there is no second name")
        with self._changes.batch():
            self._inodes.attach(parent, name, node)
            self._changes.reappeared(node)
            if not is_free:
                self._journal.put_conflict(path, self._inodes.raw_path(node), outside=False)
        if not is_free:
            metrics.CONFLICTS.add()
            _log_conflict(path, name)

    def keep_folder(self, folder: Node) -> bool:
        """The store lists nothing below the object that another client has stored under the name of `folder`: the
        folder goes on beside it, with all that is known of it. Returns whether it does."""
        parent = folder.parent
        if (
            not self._store.hides_below
            or parent is None
            or (name := self._conflict_name(parent, folder.name)) is None
        ):
            return False
        path = self._inodes.raw_path(folder)
        moved = [folder, *self._inodes.descendants(folder)]
        old = [self._inodes.key(node) for node in moved]
        try:
            with self._changes.noting():
                self._inodes.move(folder, parent, name)
                for node, key in reversed(list(zip(moved, old, strict=True))):
                    self._changes.renamed(node, key, None, at_once=True)
                self._journal.put_conflict(path, self._inodes.raw_path(folder), outside=False)
        except OSError:  # it cannot be noted now: as it was
            return False
        metrics.CONFLICTS.add()
        _log_conflict(path, name)
        return True

    def _conflict_name(self, parent: Node, name: bytes) -> bytes | None:
        """A free name `NAME.conflict-HOST-TIME`, with NAME cut off where it, or its segment of the key,
        would be too long for some store; None if all are."""
        assert parent.kids is not None
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        suffix = f".conflict-{socket.gethostname()}-{stamp}".encode()
        room = min(NAME_BYTES_MAX, KEY_BYTES_MAX - len(self._inodes.key(parent).encode()))
        for extra in (b"", *(b"-%d" % number for number in range(1, 1000))):
            end = suffix + extra
            if len(end) > room:
                return None
            found = keys.shortened(name, room - len(end)) + end
            if found not in parent.kids:
                return found
        return None

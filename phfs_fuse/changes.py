"""What was changed here and is not in the store yet. Owns the dirty files, the deleted keys and their journal rows.

The tree tells what happened (created, written, renamed, unlinked, ...); from that follows what the store shall have
under each key. No I/O but the journal's and the staging area's, and no await: each call is atomic, and what it noted
is in the journal when it returns. It does not upload: it puts the file on the queue.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager
from functools import partial

import trio

from phfs_fuse import keys
from phfs_fuse.attrs import to_metadata
from phfs_fuse.dirty import DirtyFile, Event, State
from phfs_fuse.errors import IllegalName
from phfs_fuse.gone import Gone, GoneKeys
from phfs_fuse.inodes import Base, Inodes, Node
from phfs_fuse.journal import Act, Journal, LayerRow, PresentRow
from phfs_fuse.kernelstate import KernelState
from phfs_fuse.quota import Quotas
from phfs_fuse.staging import Layer, Staged, StagingArea
from phfs_fuse.store.base import ObjectInfo
from phfs_fuse.types import ETag, Ino, ObjectKey
from phfs_fuse.uploadqueue import UploadQueue

ATTEMPTS_MAX = 8  # of one key that are remembered


class Changes:
    def __init__(
        self,
        *,
        inodes: Inodes,
        journal: Journal,
        area: StagingArea,
        queue: UploadQueue,
        kernel: KernelState,
        quotas: Quotas,
    ) -> None:
        self._inodes = inodes
        self._kernel = kernel
        inodes.on_changed = self._moved
        self._journal = journal
        self._area = area
        self._queue = queue
        self._quotas = quotas
        self.gone = GoneKeys()
        self._dirty: dict[Ino, Node] = {}
        self._sources: dict[ObjectKey, set[Node]] = {}  # who needs the stored bytes of a key that is not its own
        self._source_of: dict[Node, ObjectKey] = {}
        self._attempts: dict[ObjectKey, list[tuple[int, str]]] = {}  # (size, metadata) that the store may have
        self._seq = 0
        self._waiters: dict[Ino, trio.Event] = {}
        self.on_met: Callable[[ObjectKey], None] | None = None
        self.on_displaced: Callable[[Node], None] | None = None  # one that was displaced is about to be changed
        self.settled = trio.Event()  # set, and replaced, when something has reached the store or failed

    def users(self, key: ObjectKey) -> Collection[Node]:
        """The files that still need the bytes which the store has under `key`, and are named otherwise."""
        return self._sources.get(key, ())

    def is_tracked(self, node: Node) -> bool:
        return node in self._source_of

    def waiter(self, node: Node) -> trio.Event:
        """Set when the state of `node` changes next."""
        return self._waiters.setdefault(node.ino, trio.Event())

    @property
    def seq(self) -> int:
        """The number of the last local change; an answer asked for before it may be outdated."""
        return self._seq

    def go_on(self, seq: int) -> None:
        """The process before had come to `seq`."""
        self._seq = max(self._seq, seq)

    def touch(self, node: Node) -> None:
        """`node` changed, and with it the directories that are there because of it."""
        self._seq += 1
        at: Node | None = node
        while at is not None:
            at.seq = self._seq
            at = at.parent

    def require_space(self, size: int = 0) -> None:
        """Before a change that makes the local state grow by `size`. Raises: OSError (ENOSPC)."""
        self._journal.reserve.require(size)

    def require_some_space(self) -> None:
        """Before one that will give space back. Raises: OSError (ENOSPC)."""
        self._journal.reserve.require_some()

    async def room_to_note(self) -> None:
        """Before what is noted of the store: returns at once, but for a disk that is full."""
        await self._journal.reserve.some()

    def created(self, node: Node) -> None:
        """`node` has just got a name that nothing had. A file starts empty and is not in the store."""
        key = self._inodes.key(node)
        if node.is_dir:
            node.marker = self._take_gone(key)
            self.review_marker(node, changed=True)
            return
        layer = self._area.new(seen=0, size=0)
        dirty = self._make_dirty(node, self._take_gone(key))
        node.staged = Staged([layer])
        dirty.on(Event.CHANGE)
        with self._journal.batch():
            self._journal.put_layer(LayerRow(layer.id, node.ino, 0))
            self.save(node)
        self.touch(node)
        self._queue.schedule(node)

    def not_created(self, node: Node, waiting: Gone | None) -> None:
        """The journal could not take `node`, made just now: it goes, and what waited for its deletion under that key
        does so again. Notes nothing."""
        key = self._inodes.key(node)
        self._quotas.changed(key, node.stored_size, 0)
        for layer in node.staged.layers if node.staged is not None else ():
            self._area.discard(layer)
        node.staged = node.dirty = None
        self._dirty.pop(node.ino, None)
        self.untrack(node)
        self._inodes.detach(node)
        if waiting is not None:
            self.gone.add(waiting)
            self._queue.push(waiting, trio.current_time())

    def created_in_store(self, node: Node, info: ObjectInfo) -> None:
        """`node` has just got a name under which the store has `info`, which is all of it."""
        self._take_gone(info.key)
        if node.is_dir:
            node.marker = info.etag
        else:
            node.base, node.size = Base(info.key, info.etag, info.size), info.size
            self._quotas.changed(info.key, 0, node.stored_size)
        self.touch(node)

    def give_back(self, key: ObjectKey, etag: ETag | None) -> None:
        """The object that was made there for a name which is not made now shall vanish (`etag` None: if it came to
        be)."""
        self._add_gone(key, etag, request=True)

    def stage(self, node: Node) -> Layer:
        """The layer that takes the next write to `node`; the caller then calls `written`. Raises: OSError."""
        if self.on_displaced is not None and self._inodes.is_displaced(node):
            self.on_displaced(node)
        staged = node.staged
        if staged is not None and not staged.needs_layer:
            return staged.top
        size = node.size
        seen = size if staged is not None or node.base is not None else 0
        if staged is None and node.base is not None:
            seen = min(size, node.base.size)
        layer = self._area.new(seen=seen, size=size)
        was_dirty = node.dirty is not None
        if not was_dirty:
            self._make_dirty(node, node.base.etag if node.base else None)
        try:
            with self._journal.batch():
                self._journal.put_layer(LayerRow(layer.id, node.ino, seen))
                self.save(node)
        except OSError:  # a layer without a row would not be found again
            self._area.discard(layer)
            if not was_dirty:
                node.dirty = None
                del self._dirty[node.ino]
            raise
        if staged is None:
            node.staged = Staged([layer])
        else:
            staged.layers.append(layer)
        return layer

    def written(self, node: Node, size: int) -> None:
        """Bytes of the staged `node` changed; it is `size` long now."""
        assert node.dirty is not None
        if size != node.size:
            if self._quotas and not node.detached:
                self._quotas.changed(self._inodes.key(node), node.stored_size, size)
            node.size = size
        self._changed(node, node.dirty)

    def attrs_changed(self, node: Node) -> None:
        """Mode, owner, times or extended attributes of `node` changed."""
        if node.is_dir:
            self.review_marker(node, changed=True)
            return
        dirty = node.dirty or self._make_dirty(node, node.base.etag if node.base else None)
        dirty.attrs = True
        self.save(node)
        self._changed(node, dirty)

    def closed(self, node: Node) -> None:
        """The last descriptor that could write is closed: from now on the quiet time counts."""
        if node.dirty is not None and node.dirty.state is not State.CLEAN:
            if node.staged is not None:
                self.save(node)  # size and times are final
            self._queue.schedule(node)

    def released(self, node: Node) -> None:
        """The last descriptor of `node` is closed."""
        if node.detached and node.opens == 0:
            self.abandon(node)
            self._inodes.drop_unused(node)

    def unlinked(self, node: Node, key: ObjectKey) -> None:
        """`node`, detached just now, had the name `key`; the key shall vanish from the store."""
        self._replaced(node, key, keep_gone=True)

    def replaced(self, node: Node, key: ObjectKey) -> ETag | None:
        """`node`, detached just now, gave its name to another file. Returns the version in the store."""
        return self._replaced(node, key, keep_gone=False)

    def _replaced(self, node: Node, key: ObjectKey, *, keep_gone: bool) -> ETag | None:
        self.touch(node)
        self._quotas.changed(key, node.stored_size, 0)
        over, in_store = self._stored_as(node, key)
        with self._journal.batch():
            if keep_gone and (in_store or node.is_dir):
                self._add_gone(key, over, request=in_store)
            if node.opens and not node.is_dir:
                if node.dirty is not None:
                    self.save(node)
                self.track(node)
            else:
                self.abandon(node)
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
        return over, over is not None or coming or key in self._attempts

    def attempt(self, key: ObjectKey, size: int, metadata: Mapping[str, str]) -> None:
        """An upload is about to be sent. Until its answer is known the store may have it, also after a restart."""
        known = self._attempts.setdefault(key, [])
        text = json.dumps(dict(metadata), sort_keys=True)
        if (size, text) in known:
            return
        known.append((size, text))
        if len(known) > ATTEMPTS_MAX:
            self.answered(key)
            known = self._attempts[key] = known[-ATTEMPTS_MAX:]
        with self._journal.batch():
            for row in known:
                self._journal.put_attempt(key, *row)

    def answered(self, key: ObjectKey) -> None:
        """What the store has under `key` is known now."""
        if self._attempts.pop(key, None) is not None:
            self._journal.drop_attempts(key)

    def is_ours(self, found: ObjectInfo) -> bool:
        """Whether the store has what an upload of ours has sent without getting an answer."""
        text = json.dumps(dict(found.metadata or {}), sort_keys=True)
        return (found.size, text) in self._attempts.get(found.key, ())

    def made_before(self, node: Node) -> bool:
        """Whether `node` is what a call that got no answer has made: then that ends here."""
        if node.base is None or node.dirty is not None:
            return False
        text = json.dumps(to_metadata(node.attrs), sort_keys=True)
        if (node.base.size, text) not in self._attempts.get(node.base.key, ()):
            return False
        self.answered(node.base.key)
        return True

    def renamed(self, node: Node, old_key: ObjectKey, over: ETag | None, *, at_once: bool) -> None:
        """`node` had the name `old_key` and now has another, where the store has version `over` (None: nothing).
        `at_once`: what the store has of it waits for no quiet time."""
        self.touch(node)
        key = self._inodes.key(node)
        self._quotas.changed(old_key, node.stored_size, 0)
        self._quotas.changed(key, 0, node.stored_size)
        over = self._take_gone(key) or over
        old_over, in_store = self._stored_as(node, old_key)
        with self._journal.batch():
            if in_store or node.is_dir:
                self._add_gone(old_key, old_over, request=in_store)
            if node.is_dir:
                node.marker = over
                self.review_marker(node, changed=True)
                return
            dirty = self._named(node, over)
        self._changed(node, dirty)
        if at_once and node.staged is None:
            self._queue.enqueue(node, dirty, trio.current_time())

    def displaced(self, node: Node, key: ObjectKey, winner_size: int | None) -> None:
        """`node` lost its name `key` to what somebody else has stored there (None: of a size that is not known),
        and has another one now, or none."""
        if winner_size is None:
            self._quotas.foreign(key, None, 0)
        else:
            self._quotas.changed(key, node.stored_size, winner_size)
        if not node.detached:
            self._quotas.changed(self._inodes.key(node), 0, node.stored_size)

    def reappeared(self, node: Node) -> None:
        """`node`, which others had displaced, has a name again, where the store is not known to have anything."""
        self._quotas.changed(self._inodes.key(node), 0, node.stored_size)
        dirty = self._named(node, None)
        self._moved(node)
        self._changed(node, dirty)

    def _named(self, node: Node, over: ETag | None) -> DirtyFile:
        """The file has a key under which the store has yet to get it, over version `over`."""
        dirty = node.dirty or self._make_dirty(node, over)
        dirty.over = over
        self.track(node)
        self.save(node)
        return dirty

    def spared(self, gone: Gone, size: int) -> None:
        """Somebody else has stored `size` bytes under a key that was to be deleted: it stays."""
        self._quotas.changed(gone.key, 0, size)
        self.deleted([gone])
        self.met(gone.key)

    def met(self, key: ObjectKey) -> None:
        """Somebody else's object was found under `key`."""
        if self.on_met is not None:
            self.on_met(key)

    def known_sizes(self) -> dict[str, int]:
        """The keys of which the store does not know yet what they are here: the sizes of the files, 0: deleted."""
        sizes = {str(gone.key): 0 for gone in self.gone.all()}
        return sizes | {str(self._inodes.key(node)): node.stored_size for node in self.waiting()}

    def _moved(self, node: Node) -> None:
        self._journal.after(partial(self._kernel.changed, node))

    def refreshed(self, node: Node) -> None:
        """The store says other attributes of a version that is known."""
        self._kernel.changed(node)

    def did(self, act: Act | None, node: Node) -> None:
        """`act` is done with this transaction."""
        if act is not None:
            self._journal.put_act(act, node.ino, self._seq)

    def batch(self) -> AbstractContextManager[None]:
        """One transaction of the journal for several changes; a context manager, not to be held over an await."""
        return self._journal.batch()

    def review_marker(self, node: Node, *, changed: bool = False) -> None:
        """A directory got or lost a child, or its attributes `changed`: decide whether it needs a marker object."""
        if node.detached or not self._inodes.key(node):
            return
        wanted = node.own_attrs or not (node.kids or node.unseen)
        if wanted == (node.marker is not None) and not (wanted and changed):
            if not wanted and node.dirty is not None and not node.dirty.uploading:
                self.clean(node)
            return
        dirty = node.dirty or self._make_dirty(node, node.marker)
        dirty.attrs = True
        self.save(node)
        self._changed(node, dirty)

    def recover(self, found: Iterable[tuple[Node, PresentRow]]) -> None:
        """Take up what an earlier process left in the journal (the nodes are in the tree again)."""
        for known_key, size, metadata in self._journal.attempts():
            self._attempts.setdefault(known_key, []).append((size, metadata))
        for key, etag in self._journal.gone():
            self.gone.add(gone := Gone(key, etag, True, 0.0))
            self._queue.push(gone, 0.0)
        for node, row in found:
            dirty = self._make_dirty(node, row.over)
            dirty.attrs = row.attrs
            if node.is_dir:
                node.marker = row.over
            self._changed(node, dirty)
            self.track(node)

    def _make_dirty(self, node: Node, over: ETag | None) -> DirtyFile:
        dirty = node.dirty = DirtyFile(over=over, since=trio.current_time())
        self._dirty[node.ino] = node
        return dirty

    def _changed(self, node: Node, dirty: DirtyFile) -> None:
        if dirty.state is State.CLEAN:
            dirty.since = trio.current_time()
        dirty.on(Event.CHANGE)
        self.touch(node)
        if not node.detached:
            self._queue.schedule(node)

    def save(self, node: Node) -> None:
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
                link=node.link,
                own_attrs=node.own_attrs,
                base_key=base.key if base else None,
                base_etag=base.etag if base else None,
                base_size=base.size if base else None,
                over=dirty.over,
                attrs=dirty.attrs or dirty.uploading,  # what an upload took is not stored yet
            )
        )

    def clean(self, node: Node) -> None:
        """Nothing of `node` waits any more."""
        node.dirty = None
        self._dirty.pop(node.ino, None)
        self._kernel.changed(node)  # before the row goes, so that one of both says what it is
        self._journal.drop(node.ino)
        self.announce(node)
        self._inodes.drop_unused(node)

    def announce(self, node: Node | None = None) -> None:
        """Something ended: wake who waits for `node`, and who waits for anything."""
        if node is not None and (waiter := self._waiters.pop(node.ino, None)) is not None:
            waiter.set()
        self.settled.set()
        self.settled = trio.Event()

    def abandon(self, node: Node) -> None:
        """Nobody can ever read `node` again: its bytes need no upload."""
        if node.dirty is not None and node.dirty.uploading:
            self.save(node)  # as detached: a restart must not take it for what has the name now
            return  # the end of the upload comes back to this
        self.untrack(node)
        if node.staged is not None:
            for layer in node.staged.layers:
                self._journal.end_layer(layer.id)
                self._journal.after(partial(self._area.discard, layer))
            node.staged = None
        if node.dirty is not None:
            self.clean(node)

    def track(self, node: Node) -> None:
        """Note whether `node` needs the stored bytes of a key that is not (or no longer) its own."""
        base = node.base
        hidden = node.staged is not None and not node.staged.bottom.gaps()
        if base is None or hidden or (not node.detached and base.key == self._inodes.key(node)):
            self.untrack(node)
        elif self._source_of.get(node) != base.key:
            self.untrack(node)
            self._source_of[node] = base.key
            self._sources.setdefault(base.key, set()).add(node)

    def untrack(self, node: Node) -> None:
        if (key := self._source_of.pop(node, None)) is None:
            return
        users = self._sources[key]
        users.discard(node)
        if not users:
            del self._sources[key]
            self._queue.unpark(key)

    def _add_gone(self, key: ObjectKey, etag: ETag | None, *, request: bool) -> None:
        self._seq += 1
        gone = Gone(key, etag, request, self._queue.delete_due)
        self.gone.add(gone)
        self._journal.put_gone(key, etag)  # of directories too: their names stay hidden after a restart
        self._queue.push(gone, gone.due)

    def _take_gone(self, key: ObjectKey) -> ETag | None:
        """The key is in use again; returns the version that the store still has there."""
        if (gone := self.gone.take(key, self._seq)) is None:
            return None
        self._journal.drop_gone((key,))
        return gone.etag

    def deleted(self, batch: Iterable[Gone]) -> None:
        done = [gone.key for gone in batch if self.gone.get(gone.key) is gone]
        self._seq += 1
        with self._journal.batch():
            for key in done:
                self.gone.take(key, self._seq)
                self.answered(key)
            self._journal.drop_gone(done)
        self.announce()

    def landed(self, key: ObjectKey, etag: ETag | None, *, except_node: Node | None = None) -> None:
        """The store now has `etag` under `key` by our own doing; whoever has the name now may replace that."""
        if (gone := self.gone.get(key)) is not None:
            gone.etag = etag
            gone.request = gone.request or etag is not None
            self._journal.put_gone(key, etag)
            return
        node = self.find(key)
        if node is None:
            if etag is not None:  # it was renamed or removed while it went up, and who had the name then is gone too
                self._add_gone(key, etag, request=True)
        elif node is not except_node and node.dirty is not None:
            node.dirty.over = etag
            self.save(node)

    def find(self, key: ObjectKey) -> Node | None:
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

    def waiting(self) -> list[Node]:
        return [node for node in self._dirty.values() if not node.detached]

"""What was changed here and is not in the store yet. Owns the number of the last change, and the parts that own what
follows from changes: the dirty files, the removed keys, who needs a key's bytes, requests without an answer.

The tree tells what happened (created, written, renamed, unlinked, ...); from that follows what the store shall have
under each key. No I/O but the journal's and the staging area's, and no await: each call is atomic, and what it noted
is in the journal when it returns. It does not upload: it puts the file on the queue.

On a disk without room a change is refused before the tree has it: by `batch`, or, where no await lies between, by
`vfs.admission`, or the journal's `room_to_note` for what follows from answers of the store. What comes without these
(a close, what is let go of) begins its transaction before it changes anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, suppress
from functools import partial

import trio

from phfs_fuse.pending.dirty_files import DirtyFiles
from phfs_fuse.pending.in_doubt import InDoubt
from phfs_fuse.pending.pins import Pins
from phfs_fuse.pending.queue import UploadQueue
from phfs_fuse.pending.refusals import Refusals
from phfs_fuse.pending.removals import Removals
from phfs_fuse.pending.tombstones import Tombstone, ancestors
from phfs_fuse.pending.waiters import Waiters
from phfs_fuse.quota.limits import Quotas
from phfs_fuse.state.journal import Journal
from phfs_fuse.state.log_space import CHANGE_BYTES
from phfs_fuse.state.schema import ENDED, LayerRow, PresentRow
from phfs_fuse.state.staging import Layer, Staged, StagingArea
from phfs_fuse.store.base import ObjectInfo
from phfs_fuse.tree.dirty import DirtyFile, Event, State
from phfs_fuse.tree.inodes import Inodes
from phfs_fuse.tree.kernel_log import KernelLog
from phfs_fuse.tree.node import Base, Node
from phfs_fuse.types import Act, ETag, ObjectKey


class Changes:
    def __init__(
        self,
        *,
        inodes: Inodes,
        journal: Journal,
        area: StagingArea,
        queue: UploadQueue,
        kernel: KernelLog,
        quotas: Quotas,
    ) -> None:
        self._inodes = inodes
        self._kernel = kernel
        inodes.on_changed = self._moved
        inodes.transaction = self._transaction = journal.transaction
        self._journal = journal
        self._area = area
        self._queue = queue
        self._quotas = quotas
        self._seq = 0
        self.attempts = InDoubt(journal)
        self.users = Pins(inodes, queue)
        self.endings = Waiters()
        self.refusals = Refusals(journal)
        self.files = DirtyFiles(inodes, journal, kernel, self.endings, self.refusals)
        self._removed = Removals(journal, queue, self.attempts, self.endings, inodes.questions.oldest_seq)
        self.gone = self._removed.keys
        self.on_met: Callable[[ObjectKey], None] | None = None
        self.on_displaced: Callable[[Node], None] | None = None  # one that was displaced is about to be changed
        self.on_shadowed: Callable[[Node], bool] | None = None

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

    def new_layer(self, content: bytes) -> Layer:
        """For a file that is to be `created`, in a transaction that begins after this. Until that is done a restart
        takes the layer for one that has ended: nobody was told of its bytes. Raises: OSError."""
        layer = self._area.new(seen=0, size=0)
        try:
            if content:
                with self.batch():
                    self._journal.put_layer(LayerRow(layer.id, ENDED, 0))
                layer.write(0, content)
        except BaseException:
            self.drop_layer(layer)
            raise
        return layer

    def drop_layer(self, layer: Layer) -> None:
        """It was not `created` after all."""
        self._area.discard(layer)

    def created(self, node: Node, layer: Layer | None) -> None:
        """`node` has just got a name that nothing had, and is not in the store. A file has a `layer`."""
        over = self._removed.in_use(self._inodes.key(node), self._seq)
        if layer is None:
            node.marker = over
            self.review_marker(node, changed=True)
            return
        self.files.begin(node, over)
        node.staged = Staged([layer])
        self.written(node, layer.size)
        with self._journal.batch():
            self._journal.put_layer(LayerRow(layer.id, node.ino, 0))
            self.files.save(node)

    def created_in_store(self, node: Node, info: ObjectInfo) -> None:
        """`node` has just got a name under which the store has `info`, which is all of it."""
        self.attempts.answered(info.key)
        self._removed.in_use(info.key, self._seq)
        if node.is_dir:
            node.marker = info.etag
        else:
            node.base, node.size = Base(info.key, info.etag, info.size), info.size
            self._counted(info.key, 0, node.stored_size)
        self.touch(node)

    def give_back(self, key: ObjectKey, etag: ETag | None) -> None:
        """The object that was made there for a name which is not made now shall vanish (`etag` None: if it came to
        be)."""
        self._add_gone(key, etag, request=True)

    def give_back_claims(self) -> None:
        """Objects that an earlier process has made for calls that got no answer, and that nobody repeats any more."""
        for key in list(self.attempts.claims):
            if key in self.gone:
                continue
            if self._inodes.named(key) is None:
                self.give_back(key, None)
            else:  # somebody has seen it: it is a file
                self.attempts.answered(key)

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
        with self.batch():
            layer = self._area.new(seen=seen, size=size)
            self._transaction.undo(partial(self._area.discard, layer))  # it would not be found again
            self._transaction.keep(node)
            if node.dirty is None:
                self.files.begin(node, node.base.etag if node.base else None)
            self._journal.put_layer(LayerRow(layer.id, node.ino, seen))
            self.files.save(node)
            if staged is None:
                node.staged = Staged([layer])
            else:
                staged.layers.append(layer)
            assert node.dirty is not None
            if node.dirty.state is State.CLEAN:  # what has a row must come to an end, also if no byte follows
                self._changed(node, node.dirty)
        return layer

    def written(self, node: Node, size: int) -> None:
        """Bytes of the staged `node` changed; it is `size` long now."""
        assert node.dirty is not None
        if size != node.size:
            self._transaction.keep(node)
            if self._quotas and not node.detached:
                self._counted(self._inodes.key(node), node.stored_size, size)
            node.size = size
        self._changed(node, node.dirty)

    def attrs_changed(self, node: Node) -> None:
        """Mode, owner, times or extended attributes of `node` changed."""
        if node.is_dir:
            self.review_marker(node, changed=True)
            return
        self._transaction.keep(node)
        dirty = node.dirty or self.files.begin(node, node.base.etag if node.base else None)
        dirty.attrs = dirty.asked = True
        self.files.save(node)
        self._changed(node, dirty)

    def closed(self, node: Node) -> None:
        """The last descriptor that could write is closed: from now on the quiet time counts."""
        if node.dirty is not None and node.dirty.state is not State.CLEAN:
            self._queue.schedule(node)
            if node.staged is not None:
                self.files.save(node)  # size and times are final

    def released(self, node: Node) -> None:
        """The last descriptor of `node` is closed."""
        if node.detached and node.opens == 0:
            self.abandon(node)
            self._inodes.drop_unused(node)

    def unlinked(self, node: Node, key: ObjectKey) -> None:
        """`node`, detached just now, had the name `key`; the key shall vanish from the store."""
        self._replaced(node, key, keep_gone=True)

    def emptied(self, folder: Node, body: Node) -> None:
        """`body`, detached just now, were the bytes of the marker of `folder`, which is an empty one from now on."""
        self.touch(body)
        key = self._inodes.key(folder)
        over, _ = self._stored_as(body, key)
        with self._journal.batch():
            self._transaction.keep(folder)
            folder.marker = over
            if body.opens:
                if body.dirty is not None:
                    self.files.save(body)
                self.users.track(body)
            else:
                self.abandon(body)
            self.review_marker(folder, changed=True)

    def replaced(self, node: Node, key: ObjectKey) -> ETag | None:
        """`node`, detached just now, gave its name to another file. Returns the version in the store."""
        return self._replaced(node, key, keep_gone=False)

    def _replaced(self, node: Node, key: ObjectKey, *, keep_gone: bool) -> ETag | None:
        self.touch(node)
        self._counted(key, node.stored_size, 0)
        over, in_store = self._stored_as(node, key)
        with self._journal.batch():
            if keep_gone and (in_store or node.is_dir):
                self._add_gone(key, over, request=in_store)
            if node.opens and not node.is_dir:
                if node.dirty is not None:
                    self.files.save(node)
                self.users.track(node)
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
        return over, over is not None or coming or key in self.attempts

    def renamed(self, node: Node, old_key: ObjectKey, over: ETag | None, *, at_once: bool) -> None:
        """`node` had the name `old_key` and now has another, where the store has version `over` (None: nothing).
        `at_once`: what the store has of it waits for no quiet time."""
        self.touch(node)
        key = self._inodes.key(node)
        self._counted(old_key, node.stored_size, 0)
        self._counted(key, 0, node.stored_size)
        over = self._removed.in_use(key, self._seq) or over
        old_over, in_store = self._stored_as(node, old_key)
        with self._journal.batch():
            if node.body is not None:  # its object is the marker, and takes the attributes along
                if node.dirty is not None:
                    self.files.save(node)
                return
            if in_store or node.is_dir:
                self._add_gone(old_key, old_over, request=in_store)
            if node.is_dir:
                self._transaction.keep(node)
                node.marker = over
                self.review_marker(node, changed=True)
                return
            dirty = self._named(node, over)
            if node.is_dated_by_store and not at_once:
                dirty.attrs = True  # a copy has a time of its own; a folder's many are copied as they are
                self.files.save(node)
        self._changed(node, dirty)
        if at_once and node.staged is None:
            self._queue.enqueue(node, dirty, trio.current_time())

    def displaced(self, node: Node, key: ObjectKey, winner_size: int | None) -> None:
        """`node` lost its name `key` to what somebody else has stored there (None: of a size that is not known),
        and has another one now, or none."""
        if winner_size is None:
            self._quotas.foreign(key, None, 0)
        else:
            self._counted(key, node.stored_size, winner_size)
        if not node.detached:
            self._counted(self._inodes.key(node), 0, node.stored_size)

    def reappeared(self, node: Node) -> None:
        """`node`, which others had displaced, has a name again, where the store is not known to have anything."""
        self._counted(self._inodes.key(node), 0, node.stored_size)
        dirty = self._named(node, None)
        self._moved(node)
        self._changed(node, dirty)

    def _named(self, node: Node, over: ETag | None) -> DirtyFile:
        """The file has a key under which the store has yet to get it, over version `over`."""
        self._transaction.keep(node)
        dirty = node.dirty or self.files.begin(node, over)
        dirty.over = over
        self.files.accepted(node)
        dirty.attempts = 0
        self.users.track(node)
        self.files.save(node)
        return dirty

    def spared(self, gone: Tombstone, size: int) -> None:
        """Another client has stored `size` bytes under a key that was to be deleted: it stays."""
        self._left(gone, size)
        self.met(gone.key)

    def _left(self, gone: Tombstone, size: int) -> None:
        self.deleted([gone])
        self._counted(gone.key, 0, size)

    def shadowed(self, folder: Node) -> bool:
        """Another client has stored an object under the name of `folder`, which has something that exists only here.
        Returns whether the folder has another name now."""
        return self.on_shadowed is not None and self.on_shadowed(folder)

    def hides(self, info: ObjectInfo, asked_seq: int) -> bool:
        """Whether the answer `info` (with metadata), asked for at change number `asked_seq`, speaks of something
        deleted. A version that another client has stored since then stays, and its deletion ends here."""
        if not self.gone.outdates(info.key, asked_seq):
            return False
        hidden, gone = self.gone.hides(info.key, info.etag, asked_seq), self.gone.get(info.key)
        if gone is None or (hidden and gone.etag == info.etag):
            return hidden
        if not hidden and not self._queue.is_busy(info.key) and not self.attempts.is_ours(info):
            with suppress(OSError):  # it cannot be noted now
                self._left(gone, info.size)
                return False
        gone.hid = True
        return True

    def reappears(self, folder: Node) -> None:
        """`folder`, whose name was deleted here, is in the tree again: another client has stored something in it."""
        with suppress(OSError), self._journal.batch():  # it cannot be noted now: the marker goes all the same
            self._transaction.keep(folder)
            folder.marker = self._removed.in_use(self._inodes.key(folder), self._seq)
            folder.unseen = True
            self.review_marker(folder)

    def reclaim(self, key: ObjectKey) -> bool:
        """What was to be deleted under `key` stays, and so do the folders that it lies in. Returns whether it was to
        be deleted."""
        kept = [ancestor for ancestor in (key, *ancestors(key)) if ancestor in self.gone]
        self._seq += 1
        with self._journal.batch():
            for each in kept:
                self._removed.in_use(ObjectKey(each), self._seq)
        if key in kept:
            self._quotas.foreign(key, None, 0)
        self.met(key)
        return key in kept

    def moved_back(self, node: Node, key: ObjectKey) -> None:
        """`node`, whose move to `key` the store refuses, has the name of its base again."""
        assert node.base is not None
        self._quotas.foreign(key, None, 0)
        dirty = self._named(node, node.base.etag)
        dirty.attrs = dirty.attrs and dirty.asked
        dirty.error = None
        if node.staged is None and not dirty.attrs:
            self.touch(node)
            self.files.clean(node)
        else:
            self._changed(node, dirty)

    def met(self, key: ObjectKey) -> None:
        """Somebody else's object was found under `key`."""
        if self.on_met is not None:
            self.on_met(key)

    def known_sizes(self) -> dict[str, int]:
        """The keys of which the store does not know yet what they are here: the sizes of the files, 0: deleted."""
        sizes = {str(gone.key): 0 for gone in self.gone.all()}
        return sizes | {str(self._inodes.key(node)): node.stored_size for node in self.files.waiting()}

    def _moved(self, node: Node) -> None:
        self._journal.after(partial(self._kernel.changed, node))

    def refreshed(self, node: Node) -> None:
        """The store says other attributes of a version that is known."""
        self._kernel.changed(node)

    def did(self, act: Act | None, node: Node) -> None:
        """`act` is done with this transaction."""
        if act is not None:
            self._journal.put_act(act, node.ino, self._seq)

    def batch(self, log_bytes: int = 0) -> AbstractContextManager[None]:
        """One transaction of the journal for what a program asks for, of up to `log_bytes` if that is much; a context
        manager, not to be held over an await. Raises: OSError (ENOSPC), before anything has changed."""
        return self._journal.batch(CHANGE_BYTES + log_bytes)

    def noting(self) -> AbstractContextManager[None]:
        """The same for what has happened already."""
        return self._journal.batch()

    def keep(self, node: Node) -> None:
        """`node` is about to change within a transaction: should that fail, it is as it was."""
        self._transaction.keep(node)

    def review_marker(self, node: Node, *, changed: bool = False) -> None:
        """A directory got or lost a child, or its attributes `changed`: decide whether it needs a marker object."""
        if node.detached or not self._inodes.key(node):
            return
        if node.body is not None and not changed:
            return
        wanted = node.own_attrs or node.body is not None or not (node.kids or node.unseen)
        is_stored = node.marker is not None or (not wanted and self._may_have_marker(node))
        if wanted == is_stored and not (wanted and changed):
            if not wanted and node.dirty is not None:
                if not node.dirty.uploading:
                    self.files.clean(node)
                elif changed:  # its row says by which name it is found after a restart
                    self.files.save(node)
            return
        self._transaction.keep(node)
        dirty = node.dirty or self.files.begin(node, node.marker)
        dirty.attrs = True
        self.files.save(node)
        self._changed(node, dirty)

    def _may_have_marker(self, node: Node) -> bool:
        """Whether a request for the marker got no answer."""
        is_under_way = node.dirty is not None and node.dirty.uploading
        return not is_under_way and self._inodes.key(node) in self.attempts

    def recover(self, found: Iterable[tuple[Node, PresentRow]]) -> None:
        """Take up what an earlier process left in the journal (the nodes are in the tree again)."""
        self.attempts.recover()
        self._removed.recover()
        refused = {refusal.key: refusal for refusal in self.refusals.recover()}
        for node, row in found:
            dirty = self.files.begin(node, row.over)
            dirty.attrs = True  # what has changed beside the name is not known
            if node.is_dir:
                node.marker = row.over
            dirty.refusal = refused.pop(row.key, None)
            self._changed(node, dirty)
            self.users.track(node)
        for refusal in refused.values():
            self.refusals.accepted(refusal)

    def _counted(self, key: ObjectKey, old: int, new: int) -> None:
        """A file under `key` has another size, once that is noted."""
        if self._quotas:
            self._transaction.after(partial(self._quotas.changed, key, old, new))

    def _changed(self, node: Node, dirty: DirtyFile) -> None:
        self._transaction.keep(node)
        if dirty.state is State.CLEAN:
            dirty.since = trio.current_time()
        dirty.on(Event.CHANGE)
        self.touch(node)
        if not node.detached:
            self._queue.schedule(node)

    def abandon(self, node: Node) -> None:
        """Nobody can ever read `node` again: its bytes need no upload."""
        if node.dirty is not None and node.dirty.uploading:
            self.files.save(node)  # as detached: a restart must not take it for what has the name now
            return  # the end of the upload comes back to this
        if node.staged is not None or node.dirty is not None:
            self._end(node)
        self.users.untrack(node)

    def _end(self, node: Node) -> None:
        with self._journal.batch():
            for layer in node.staged.layers if node.staged is not None else ():
                self._journal.end_layer(layer.id)
                self._journal.after(partial(self._area.discard, layer))
            self._transaction.keep(node)
            node.staged = None
            if node.dirty is not None:
                self.files.clean(node)

    def _add_gone(self, key: ObjectKey, etag: ETag | None, *, request: bool) -> None:
        self._seq += 1
        self._removed.add(key, etag, self._seq, request=request)

    def deleted(self, batch: Sequence[Tombstone]) -> None:
        """They are gone from the store, or stay since they are somebody else's."""
        with self._journal.batch():
            self._seq += 1
            for gone in batch:
                self.refusals.forget(gone.key)
            self._removed.deleted(batch, self._seq)
        for gone in batch:
            if gone.hid:
                self.met(gone.key)

    def landed(self, key: ObjectKey, etag: ETag | None, *, except_node: Node | None = None) -> None:
        """The store now has `etag` under `key` by our own doing; whoever has the name now may replace that."""
        if self._removed.landed(key, etag):
            return
        node = self._inodes.named(key)
        if node is None:
            if etag is not None:  # it was renamed or removed while it went up, and who had the name then is gone too
                self._add_gone(key, etag, request=True)
        elif node is not except_node and node.dirty is not None and node.body is None:
            self._transaction.keep(node)
            if node.is_dir:
                node.marker = etag
            node.dirty.over = etag
            self.files.save(node)

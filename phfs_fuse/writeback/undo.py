"""What becomes of deletions and moves that the store refuses for good: they are undone in the tree, and over.

The name shows what the store has, and only its user repeats the call: a file that is seen and used again must not
vanish when the store changes its mind. Owns which folders were moved, and lose again what was moved with them. No I/O
but the journal's, and no await.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from phfs_fuse import keys
from phfs_fuse.attrs import Attrs
from phfs_fuse.errors import PhfsError
from phfs_fuse.pending.changes import Changes
from phfs_fuse.pending.tombstones import Tombstone, ancestors
from phfs_fuse.state.refusal import Operation, Refusal
from phfs_fuse.tree.inodes import Inodes
from phfs_fuse.tree.node import Node
from phfs_fuse.types import Ino, ObjectKey
from phfs_fuse.writeback.conflicts import Conflicts


class Undo:
    def __init__(
        self, *, inodes: Inodes, changes: Changes, conflicts: Conflicts, new_folder: Callable[[], Attrs]
    ) -> None:
        """`new_folder` gives the attributes of a folder that is not known yet."""
        self._inodes = inodes
        self._changes = changes
        self._conflicts = conflicts
        self._new_folder = new_folder
        self._moved: set[Ino] = set()

    def deletion(self, gone: Tombstone, exc: PhfsError) -> None:
        """The store keeps `gone`: it shows again, with the folders that it lies in."""
        gone.error = exc
        path = self._path(gone.key)
        with self._changes.noting():
            self._changes.reclaim(gone.key)
            self._changes.refusals.note(Refusal.of(Operation.DELETE, gone.key, path, exc))
        self._changes.endings.announce()

    def is_move(self, node: Node, key: ObjectKey) -> bool:
        """Whether the upload of `node` to `key` is a move: the store has its bytes under another key, still or in
        part."""
        base = node.base
        if node.is_dir or base is None or base.key == key:
            return False
        return node.staged is None or base.key in self._changes.gone or node in self._changes.users

    def move(self, node: Node, key: ObjectKey, exc: PhfsError) -> bool:
        """Give `node` the name of its base again; what was changed of it meanwhile goes there. Whatever has got that
        name since then is kept beside it. False: something that cannot be moved has the name, and `node` stays."""
        assert node.base is not None
        old = node.base.key
        self._changes.met(key)
        with self._changes.noting():
            self._note_moved(node, old)
            self._changes.reclaim(old)
            if (place := self._place(old, node)) is None:
                return False
            left = node.parent
            assert left is not None
            self._inodes.incomplete(left)
            self._inodes.move(node, *place)
            self._inodes.incomplete(place[0])
            self._changes.refusals.note(Refusal.of(Operation.RENAME, key, self._inodes.raw_path(node), exc))
            self._changes.moved_back(node, key)
            self._review(left)
        self._changes.endings.announce(node)
        return True

    def _note_moved(self, node: Node, old: ObjectKey) -> None:
        """Which folders around `node` are here since they were moved with it from around `old`."""
        at = node.parent
        for folder in ancestors(old):
            if at is None or at.parent is None or folder not in self._changes.gone:
                return
            self._moved.add(at.ino)
            at = at.parent

    def _path(self, key: ObjectKey) -> bytes:
        """Below the mount point."""
        segments = key.removeprefix(self._inodes.key(self._inodes.root)).rstrip("/").split("/")
        return b"/".join(keys.name_of(segment) for segment in segments)

    def _place(self, key: ObjectKey, node: Node) -> tuple[Node, bytes] | None:
        """The folder and the name of `key`, which is free then; a folder that was removed or moved is made again."""
        at = self._inodes.root
        *folders, name = self._path(key).split(b"/")
        for folder in folders:
            assert at.kids is not None
            if folder not in at.kids:
                made = self._inodes.new(self._new_folder(), ctime_ns=time.time_ns())
                self._inodes.attach(at, folder, made)
                self._inodes.incomplete(at)
            at = at.kids[folder]
            if not at.is_dir:
                return None
        assert at.kids is not None
        other = at.kids.get(name)
        if other is None or other is node:
            return at, name
        if other.is_dir or other.dirty is None or other.dirty.uploading:
            return None
        self._conflicts.keep_both(other, node.base.size if node.base else 0)
        return (at, name) if name not in at.kids else None

    def _review(self, folder: Node) -> None:
        """A child was moved out of `folder`. One that was moved itself goes with its last child."""
        folder.unseen = False
        self._changes.review_marker(folder)
        if folder.ino in self._moved and not folder.kids and folder.marker is None and folder.parent is not None:
            self._moved.discard(folder.ino)
            parent, key = folder.parent, self._inodes.key(folder)
            self._inodes.detach(folder)
            self._changes.unlinked(folder, key)
            self._review(parent)

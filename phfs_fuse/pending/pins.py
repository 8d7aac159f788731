"""Who needs the bytes which the store has under a key that is not (or no longer) its own: a file that was renamed, or
that is open without a name. Owns that relation. No I/O, no await.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial

from phfs_fuse.pending.queue import UploadQueue
from phfs_fuse.tree.inodes import Inodes
from phfs_fuse.tree.node import Node
from phfs_fuse.types import ObjectKey


class Pins:
    def __init__(self, inodes: Inodes, queue: UploadQueue) -> None:
        self._inodes = inodes
        self._transaction = inodes.transaction
        self._queue = queue
        self._users: dict[ObjectKey, set[Node]] = {}
        self._key_of: dict[Node, ObjectKey] = {}

    def of(self, key: ObjectKey) -> Collection[Node]:
        """The files that still need what the store has under `key`, and are named otherwise."""
        return self._users.get(key, ())

    def __contains__(self, node: Node) -> bool:
        return node in self._key_of

    def track(self, node: Node) -> None:
        """Note whether `node` is one."""
        base = node.base
        hidden = node.staged is not None and not node.staged.bottom.gaps()
        if base is None or hidden or (not node.detached and base.key == self._inodes.key(node)):
            self.untrack(node)
        elif self._key_of.get(node) != base.key:
            self._set(node, base.key)

    def untrack(self, node: Node) -> None:
        if node in self._key_of:
            self._set(node, None)

    def _set(self, node: Node, key: ObjectKey | None) -> None:
        """`node` needs the bytes under `key` from now on (None: under no other than its own)."""
        self._transaction.undo(partial(self._set, node, self._key_of.get(node)))
        self._forget(node)
        if key is not None:
            self._key_of[node] = key
            self._users.setdefault(key, set()).add(node)

    def _forget(self, node: Node) -> None:
        if (key := self._key_of.pop(node, None)) is None:
            return
        users = self._users[key]
        users.discard(node)
        if not users:
            del self._users[key]
            self._queue.unpark(key)

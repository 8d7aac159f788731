"""What is known of names without asking the store, and for how long it is believed. No I/O, no await.

What is there is in the tree. Owns what the tree cannot hold: which names are known not to be there, and until when
the store is taken for being away. Meanwhile what was known last counts, however long ago that was.
"""

from __future__ import annotations

import math

import trio
from cachetools import LRUCache

from phfs_fuse.errors import AccessDenied, BucketNotFound, NotADirectory, NotFound, PhfsError, StoreUnavailable
from phfs_fuse.namespace.lifetimes import Lifetimes
from phfs_fuse.tree.inodes import Inodes
from phfs_fuse.tree.node import NEVER, Node

AWAY_SECONDS = 2.0  # after a request that found the store away, names are answered from memory
MISSING_SECONDS = 0.5  # for which a name is known not to be there, without any lifetime: create follows lookup
REFUSED = (StoreUnavailable, BucketNotFound, AccessDenied)  # answers that say nothing about a name


class NameCache:
    def __init__(self, inodes: Inodes, trust: Lifetimes) -> None:
        self._inodes = inodes
        self._trust = trust
        self.ttl = trust.short_seconds  # for which an answer of the store is believed
        # names that the kernel was told are not there, and when they were asked for
        self._missing: LRUCache[tuple[int, bytes], float] = LRUCache(100_000)
        self._away_until = -math.inf

    def lifetime(self, node: Node) -> float:
        """Seconds for which the kernel may believe what it is told of `node`."""
        now = trio.current_time()
        is_ours = node.dirty is not None or node.detached or node.parent is None
        return self._trust.kernel_seconds(now if is_ours else self._at(node), now)

    def _at(self, node: Node) -> float:
        """When the store was asked last what the name of `node` means; NEVER if somebody else changed it since."""
        parent = node.parent
        at = node.checked_at if parent is None else max(node.checked_at, parent.complete_at)
        return at if at > node.doubted_at else NEVER

    def is_believed(self, node: Node) -> bool:
        """Whether nobody was heard to have changed its name since the store was asked."""
        return self._at(node) > NEVER

    # ---- one name ----

    def find(self, parent: Node, name: bytes) -> Node | None:
        """The child if what is known of it is recent enough. Raises: NotFound if it is known not to be there."""
        kids = parent.kids
        if kids is None:
            raise NotADirectory("lookup", self._inodes.path(parent))
        now = trio.current_time()
        node = kids.get(name)
        if node is not None:
            if node.dirty is not None or self._trust.holds(self._at(node), now):
                return node
        elif self._trust.holds(parent.complete_at, now) or self._is_missing(parent, name, now):
            self._missing[parent.ino, name] = max(parent.complete_at, self._missing.get((parent.ino, name), NEVER))
            raise NotFound("lookup", name.decode(errors="replace"))
        return None

    def _is_missing(self, parent: Node, name: bytes, now: float) -> bool:
        """Whether `name` was asked for, not long ago, and is not there."""
        asked_at = self._missing.get((parent.ino, name), NEVER)
        return self._trust.holds(asked_at, now) or now < asked_at + MISSING_SECONDS

    def missing_at(self, parent: Node, name: bytes) -> float:
        """When the store was asked last and had nothing of that name, which the tree has not; NEVER."""
        return max(parent.complete_at, self._missing.get((parent.ino, name), NEVER))

    def note_missing(self, parent: Node, name: bytes, asked_at: float) -> None:
        self._missing[parent.ino, name] = asked_at

    def forget_missing(self, parent: Node, name: bytes) -> bool:
        """`name` may be there now. Returns whether it was known not to be."""
        return self._missing.pop((parent.ino, name), None) is not None

    # ---- whole directories ----

    def is_complete(self, folder: Node) -> bool:
        """Whether all its names are known and recent enough."""
        return self._trust.holds(folder.complete_at, trio.current_time())

    def has_all(self, folder: Node) -> bool:
        """Whether its names need not be asked for: they are known and recent enough, or nobody could be asked."""
        return self.is_complete(folder) or (self.is_away and folder.complete_at > NEVER)

    def complete_listing(self, folder: Node) -> list[Node] | None:
        """All children, if they need not be asked for."""
        return list((folder.kids or {}).values()) if self.has_all(folder) else None

    # ---- while the store is away ----

    @property
    def is_away(self) -> bool:
        """Whether the store was found to be away a moment ago."""
        return trio.current_time() < self._away_until

    def found_away(self, exc: PhfsError) -> None:
        if not isinstance(exc, AccessDenied):  # that may be so for one key
            self._away_until = trio.current_time() + AWAY_SECONDS

    def remembered(self, parent: Node, name: bytes) -> Node | None:
        """While the store is away what was known last counts, and a directory that was seen whole has no other
        names. What is made on that ground replaces nothing of somebody else: uploads are conditional.
        Raises: NotFound. None: nothing is known."""
        node = (parent.kids or {}).get(name)
        if node is None and parent.complete_at > NEVER:
            raise NotFound("lookup", name.decode(errors="replace"), "as far as known: the store is away")
        return node

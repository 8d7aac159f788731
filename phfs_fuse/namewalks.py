"""Notices who asks for the names of a big folder one after the other, as `rm -r` does: a page of a listing from there
on answers the next thousand. Owns the walks that were noticed; no I/O, no await.
"""

from __future__ import annotations

import trio
from cachetools import LRUCache

from phfs_fuse.inodes import Node
from phfs_fuse.types import Ino

WALKS_MAX = 8
AGE_SECONDS = 1.0  # of a walk, until names that it does not know are looked for: sorting a big folder takes a while
STEP_MAX = 16  # what lies between two names was known well enough not to be asked for


class _Walk:
    """The files of a folder in the order of their keys, and which of them was asked for last."""

    def __init__(self, parent: Node) -> None:
        self.segments = sorted(kid.segment for kid in (parent.kids or {}).values() if not kid.is_dir)
        self.index = {segment: at for at, segment in enumerate(self.segments)}
        self.last = len(self.segments)
        self.made_at = trio.current_time()


class NameWalks:
    def __init__(self) -> None:
        self._walks: LRUCache[Ino, _Walk] = LRUCache(WALKS_MAX)

    def before(self, parent: Node, segment: str) -> str | None:
        """`segment` is asked for. The one before it, if `segment` follows what was asked for last."""
        walk = self._walks.get(parent.ino)
        if walk is None or (segment not in walk.index and trio.current_time() > walk.made_at + AGE_SECONDS):
            walk = self._walks[parent.ino] = _Walk(parent)
        if (at := walk.index.get(segment)) is None:
            return None
        follows = 0 < at - walk.last <= STEP_MAX
        walk.last = at
        return walk.segments[at - 1] if follows else None

    def reached(self, parent: Node, segment: str) -> None:
        """What comes up to `segment` is known now."""
        if (walk := self._walks.get(parent.ino)) is not None:
            walk.last = walk.index.get(segment, walk.last)

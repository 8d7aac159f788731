"""Notices who asks for the names of a big folder in their order, as `rm -r` does: a page of a listing from there on
answers the next thousand. Owns the walks that were noticed; no I/O, no await.
"""

from __future__ import annotations

from dataclasses import dataclass

from cachetools import LRUCache

from phfs_fuse.tree.node import Node
from phfs_fuse.types import Ino

WALKS_MAX = 16
RUN_MIN = 4  # names in ascending order: one of 24 times it is chance
FAILED_MAX = 8


@dataclass(slots=True)
class _Walk:
    last: str = ""  # segment that was asked for last
    run: int = 0  # how many came in order
    failed: int = 0  # pages in a row that did not have what was asked for


class NameWalks:
    def __init__(self) -> None:
        self._walks: LRUCache[Ino, _Walk] = LRUCache(WALKS_MAX)

    def before(self, parent: Node, segment: str) -> str | None:
        """`segment` is asked for. What came before it, if that is worth a page."""
        if (walk := self._walks.get(parent.ino)) is None:
            walk = self._walks[parent.ino] = _Walk()
        last, walk.last = walk.last, segment
        walk.run = walk.run + 1 if segment > last else min(walk.run, 0)
        return last if walk.run >= RUN_MIN else None

    def listed(self, parent: Node, last: str, *, helped: bool) -> None:
        """A page had the names up to `last`, and did or did not help. If not, who asks may be making new names."""
        if (walk := self._walks.get(parent.ino)) is None:
            return
        walk.failed = 0 if helped else min(walk.failed + 1, FAILED_MAX)
        if helped:
            walk.last = last
        else:
            walk.run = -(RUN_MIN << walk.failed)

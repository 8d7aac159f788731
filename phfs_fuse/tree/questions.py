"""Questions to the store about the names of one folder, and what their answers may claim to know. Owns those that are
open; no I/O, no await.

An answer is as old as the first request of the walk that it came from: a store may take later pages of a listing
out of a walk over its disk that it began with an earlier page. Newer than the answer is what this mount changed after
that moment, what a later question has found, and what other clients were heard to have changed. An answer displaces
nothing newer, and what it says of names that were heard of is doubted.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import inf, nextafter

import trio

from phfs_fuse.tree.node import Node
from phfs_fuse.types import Ino

WALK_SECONDS_MAX = 60.0  # a walk that lasts longer begins anew: what has to be kept for it is bounded
HEARD_MAX = 10_000  # and so does one that heard of so many names


class Question:
    """A question about the names below `prefix`, the key of a folder then: put at local change number `seq` and at
    time `at`. It is open until the answer, or the last page of it, is in the tree."""

    __slots__ = ("at", "heard", "kept", "prefix", "rests", "seq")

    def __init__(self, prefix: str, seq: int, at: float) -> None:
        self.prefix = prefix
        self.kept: list[Node] = []  # nodes that nothing refers to: without them the answer would bring back others
        self.rests = False  # the next page is not asked for yet
        self.put(seq, at)

    def put(self, seq: int, at: float) -> None:
        """Put it anew: from now on what it is told is as old as this moment."""
        self.seq, self.at = seq, at
        self.heard: dict[bytes, bool] = {}  # names that others changed since; True: they removed something

    def predates(self, node: Node) -> bool:
        """Whether more is known of `node` than the answer can tell."""
        return node.dirty is not None or node.seq > self.seq or node.checked_at > self.at

    @property
    def is_spent(self) -> bool:
        """Whether the next page should be asked for as a walk of its own."""
        return trio.current_time() > self.at + WALK_SECONDS_MAX or len(self.heard) > HEARD_MAX


class Questions:
    """By folder. One that is spent while it rests hears nothing any more: it will be put anew."""

    def __init__(self) -> None:
        self._open: dict[Ino, list[Question]] = {}
        self._moment = -inf

    def moment(self) -> float:
        """Now, by trio's clock, but later than each moment that was given before: of two questions one is older."""
        self._moment = max(trio.current_time(), nextafter(self._moment, inf))
        return self._moment

    def open(self, folder: Node, question: Question) -> None:
        self._open.setdefault(folder.ino, []).append(question)

    def close(self, folder: Node, question: Question) -> None:
        asked = self._open[folder.ino]
        asked.remove(question)
        if not asked:
            del self._open[folder.ino]

    def about(self, folder: Node) -> Iterator[Question]:
        """Those that are open about names in `folder`."""
        return (question for question in self._open.get(folder.ino, ()) if _listens(question))

    def keeps(self, node: Node) -> bool:
        """Whether an answer that is to come could bring back what `node` was before: then the node has to stay."""
        if not self._open or node.detached or node.parent is None:
            return False
        keepers = [question for question in self.about(node.parent) if question.predates(node)]
        for question in keepers:
            question.kept.append(node)
        return bool(keepers)

    def oldest_seq(self) -> float:
        """Of what changed here no later than this, all answers know."""
        listening = (question.seq for asked in self._open.values() for question in asked if _listens(question))
        return min(listening, default=inf)


def _listens(question: Question) -> bool:
    return not (question.rests and question.is_spent)

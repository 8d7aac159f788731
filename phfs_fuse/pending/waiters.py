"""Who waits for an upload or a deletion to end. Owns the events; no await of its own."""

from __future__ import annotations

import trio

from phfs_fuse.tree.node import Node
from phfs_fuse.types import Ino


class Waiters:
    def __init__(self) -> None:
        self._waiters: dict[Ino, trio.Event] = {}
        self.settled = trio.Event()  # set, and replaced, when something has reached the store or failed

    def waiter(self, node: Node) -> trio.Event:
        """Set when the state of `node` changes next."""
        return self._waiters.setdefault(node.ino, trio.Event())

    def announce(self, node: Node | None = None) -> None:
        """Something ended: wake who waits for `node`, and who waits for anything."""
        if node is not None and (waiter := self._waiters.pop(node.ino, None)) is not None:
            waiter.set()
        self.settled.set()
        self.settled = trio.Event()

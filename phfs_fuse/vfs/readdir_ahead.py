"""Lists the folders that a walk over a tree (`ls -R`, `find`, `rm -r`) comes to next, while it looks at this one.

Owns the walks that were noticed and the listings under way. A listing costs the store far longer than this process,
so a few at a time take a walk no longer than one did. What comes is as fresh as any listing; nobody waits for it but
who wants that folder.
"""

from __future__ import annotations

from contextlib import aclosing

import trio
from cachetools import LRUCache

from phfs_fuse.errors import PhfsError
from phfs_fuse.namespace.namespace import Namespace
from phfs_fuse.tasks import survived
from phfs_fuse.tree.inodes import Inodes
from phfs_fuse.tree.node import Node
from phfs_fuse.types import Ino

AHEAD = 4  # folders at a time
WALKS_MAX = 16
TTL_SECONDS_MIN = 1.0  # what is not believed for so long would be asked for twice


class _Walk:
    """The folders of one folder in the order of their keys, and which of them was looked at last. Their numbers: what
    is forgotten meanwhile shall go."""

    def __init__(self, parent: Node) -> None:
        kids = [kid for kid in (parent.kids or {}).values() if kid.is_dir]
        self.folders = [kid.ino for kid in sorted(kids, key=lambda kid: kid.segment)]
        self.index = {ino: at for at, ino in enumerate(self.folders)}
        self._last = -2

    def next(self, folder: Node) -> list[Ino]:
        """`folder` is looked at; those that should be listed ahead: none, unless it follows the one before."""
        at = self.index.get(folder.ino, -2)
        is_next = at == self._last + 1 and at > 0
        self._last = at
        return self.folders[at + 1 : at + 1 + AHEAD] if is_next else []


class ReaddirAhead:
    def __init__(self, namespace: Namespace, inodes: Inodes) -> None:
        self._namespace = namespace
        self._inodes = inodes
        self._walks: LRUCache[Ino, _Walk] = LRUCache(WALKS_MAX)
        self._coming: dict[Ino, trio.Event] = {}
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Service: until cancelled. Without it nothing is listed ahead."""
        async with trio.open_nursery() as self._nursery:
            task_status.started()
            await trio.sleep_forever()

    async def arrival(self, folder: Node) -> None:
        """Somebody looks at `folder`: start what may come next; return when a listing of `folder` itself that is
        under way has ended."""
        self._note(folder)
        if (event := self._coming.get(folder.ino)) is not None:
            await event.wait()

    def _note(self, folder: Node) -> None:
        parent = folder.parent
        if self._nursery is None or parent is None or self._namespace.ttl < TTL_SECONDS_MIN:
            return
        walk = self._walks.get(parent.ino)
        if walk is None or folder.ino not in walk.index:
            walk = self._walks[parent.ino] = _Walk(parent)
        for ino in walk.next(folder):
            if len(self._coming) >= AHEAD:
                break
            kid = self._inodes.find(ino)
            if kid is None or kid.detached or ino in self._coming:
                continue
            if self._namespace.complete_listing(kid) is None:
                self._coming[ino] = trio.Event()
                self._nursery.start_soon(survived, "listing ahead", self._list, kid)

    async def _list(self, folder: Node) -> None:
        """One page: of a large folder the reader gets the rest itself."""
        folder.holds += 1
        try:
            async with aclosing(self._namespace.pages(folder, pages_max=1)) as pages:
                async for _ in pages:
                    pass
        except PhfsError:
            self._walks.clear()  # whoever wants the folder asks, and hears why
        finally:
            folder.holds -= 1
            self._coming.pop(folder.ino).set()
            self._inodes.drop_unused(folder)

"""One open directory: its names in a fixed order, page by page. Owns the position of one reader.

First come the names that exist only here, then the pages of the store. A window of about one page is held; reading
again from an earlier offset starts the listing over.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator

import trio

from phfs_fuse.inodes import Node
from phfs_fuse.namespace import Namespace


class DirStream:
    def __init__(self, namespace: Namespace, node: Node) -> None:
        self._namespace = namespace
        self._node = node
        self._lock = trio.Lock()
        self._rewind()

    def _rewind(self) -> None:
        self._window: deque[tuple[int, Node]] = deque()
        self._cookie = 0
        self._pages = self._all()

    async def _all(self) -> AsyncIterator[list[Node]]:
        """Every child once."""
        if (known := self._namespace.complete_listing(self._node)) is not None:
            yield known
            return
        local = self._namespace.local_only(self._node)
        shown = set(local)
        yield local
        async for page in self._namespace.pages(self._node):
            yield [node for node in page if node not in shown]

    async def read(self, offset: int) -> list[tuple[int, Node]]:
        """Some entries after `offset` (a cookie that came with an entry, 0: from the start), each with its own
        cookie; empty at the end. Raises: PhfsError."""
        async with self._lock:
            first = self._window[0][0] if self._window else self._cookie + 1
            if offset == 0 or offset + 1 < first:
                await self.aclose()
                self._rewind()
            while True:
                while self._window and self._window[0][0] <= offset:
                    self._window.popleft()
                found = [(cookie, node) for cookie, node in self._window if not node.detached]
                if found:
                    return found
                try:
                    page = await anext(self._pages)
                except StopAsyncIteration:
                    return []
                for node in page:
                    self._cookie += 1
                    self._window.append((self._cookie, node))

    async def aclose(self) -> None:
        await self._pages.aclose()  # type: ignore[attr-defined]

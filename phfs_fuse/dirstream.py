"""Open directories: their names in the order of their keys, page by page. Owns the streams and their positions.

The names that exist only here are merged into the pages of the store. A window of about one page is held, and what is
in it is not forgotten meanwhile; reading again from an earlier offset starts the listing over. The order is fixed, so
that a reader can go on after a restart behind the last name it was given.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

import trio

from phfs_fuse.inodes import Inodes
from phfs_fuse.kernelstate import KernelState
from phfs_fuse.listahead import ListAhead
from phfs_fuse.namespace import Namespace
from phfs_fuse.nodes import Node
from phfs_fuse.settling import Settling
from phfs_fuse.types import Fh

STREAM_BITS = 20  # of the handle of a directory stream: which one of its directory
STREAM_MASK = (1 << STREAM_BITS) - 1


def sort_key(node: Node) -> bytes:
    """Where `node` stands in its directory: the order of a store's listing."""
    return (node.segment + "/" * node.is_dir).encode("utf-8", "surrogatepass")


class DirStream:
    """`cookie` and `after` are where an earlier process was: the last cookie that it gave, and for which name."""

    def __init__(
        self,
        namespace: Namespace,
        ahead: ListAhead,
        inodes: Inodes,
        node: Node,
        cookie: int = 0,
        after: bytes = b"",
    ) -> None:
        self._namespace = namespace
        self._ahead = ahead
        self._inodes = inodes
        self._node = node
        self._lock = trio.Lock()
        self._start(cookie, after)

    def _start(self, cookie: int, after: bytes) -> None:
        self._window: deque[tuple[int, Node]] = deque()
        self._cookie = cookie
        self._pages = self._behind(after)

    async def _behind(self, after: bytes) -> AsyncGenerator[list[Node]]:
        async with aclosing(self._all()) as pages:
            async for page in pages:
                yield [node for node in page if sort_key(node) > after] if after else page

    async def _all(self) -> AsyncGenerator[list[Node]]:
        """Every child once, in order."""
        await self._ahead.arrival(self._node)
        if (known := self._namespace.complete_listing(self._node)) is not None:
            yield sorted(known, key=sort_key)
            return
        local = deque(sorted(self._namespace.local_only(self._node), key=sort_key))
        shown = set(local)
        try:
            for node in shown:
                node.holds += 1
            async with aclosing(self._namespace.pages(self._node)) as pages:
                async for page in pages:
                    stored = sorted((node for node in page if node not in shown), key=sort_key)
                    before = []
                    while local and stored and sort_key(local[0]) < sort_key(stored[-1]):
                        before.append(local.popleft())
                    yield sorted(before + stored, key=sort_key) if before else stored
            yield list(local)
        finally:
            for node in shown:
                self._release(node)

    def _current(self, node: Node) -> Node | None:
        """What has the name of `node` now: maybe a newer version."""
        return (self._node.kids or {}).get(node.name) if node.detached else node

    def _release(self, node: Node) -> None:
        node.holds -= 1
        if node.detached:
            self._inodes.drop_unused(node)

    async def read(self, offset: int) -> list[tuple[int, Node]]:
        """Some entries after `offset` (a cookie that came with an entry, 0: from the start), each with its own
        cookie; empty at the end. Raises: PhfsError."""
        async with self._lock:
            first = self._window[0][0] if self._window else self._cookie + 1
            if (offset == 0 and self._cookie) or offset + 1 < first:
                await self.aclose()
                self._start(0, b"")
            while True:
                while self._window and self._window[0][0] <= offset:
                    self._release(self._window.popleft()[1])
                found = [(cookie, now) for cookie, node in self._window if (now := self._current(node)) is not None]
                if found:
                    return found
                try:
                    page = await anext(self._pages)
                except StopAsyncIteration:
                    return []
                for node in page:
                    self._cookie += 1
                    node.holds += 1
                    self._window.append((self._cookie, node))

    async def aclose(self) -> None:
        while self._window:
            self._release(self._window.pop()[1])
        await self._pages.aclose()


class DirStreams:
    """The open directories. A handle is the inode number and which one of its streams."""

    def __init__(self, *, inodes: Inodes, namespace: Namespace, kernel: KernelState, settling: Settling) -> None:
        self._inodes = inodes
        self._namespace = namespace
        self._kernel = kernel
        self._settling = settling
        self.ahead = ListAhead(namespace, inodes)
        self._streams: dict[int, DirStream] = {}
        self._stream_no = 0
        self._positions: dict[int, tuple[int, bytes]] = {}  # of streams that the process before had open

    def resume(self, positions: dict[int, tuple[int, bytes]]) -> None:
        """Go on for a process that died, from the positions that it had noted."""
        self._positions = positions
        self._stream_no = max((fh & STREAM_MASK for fh in positions), default=0)

    def opendir(self, ino: int) -> Fh:
        node = self._inodes.get(ino)
        node.opens += 1
        self._kernel.referred(node)
        self._stream_no = (self._stream_no + 1) & STREAM_MASK
        return Fh(node.ino << STREAM_BITS | self._stream_no)

    async def readdir(self, fh: int, offset: int) -> list[tuple[int, Node]]:
        """Some entries after the cookie `offset`, each with its cookie; empty at the end."""
        stream = self._streams.get(fh)
        if stream is None:
            node, position = self._inodes.get(fh >> STREAM_BITS), self._positions.pop(fh, (0, b""))
            stream = self._streams[fh] = DirStream(self._namespace, self.ahead, self._inodes, node, *position)
        return await stream.read(offset)

    def told_page(self, fh: int, page: Sequence[tuple[int, Node]]) -> None:
        """A reply hands out these entries of a directory stream."""
        if page:
            cookie, last = page[-1]
            self._kernel.told_all([node for _, node in page], fh, cookie, sort_key(last))

    async def releasedir(self, fh: int) -> None:
        if (stream := self._streams.pop(fh, None)) is not None:
            await stream.aclose()
        self._positions.pop(fh, None)
        self._kernel.stream_closed(fh)
        node = self._inodes.get(fh >> STREAM_BITS)
        node.opens -= 1
        self._kernel.referred(node)
        self._inodes.drop_unused(node)

    async def fsyncdir(self, fh: int) -> None:
        """Return when the store has what was changed at the names in the directory."""
        await self._settling.settle_names(self._inodes.get(fh >> STREAM_BITS))

"""Open directories: their names in the order of their keys, page by page. Owns the streams.

The names that exist only here are merged into the pages of the store. What was listed since the directory was opened
is remembered by name (`tree.directory_cookies`): a reader that seeks, or goes on after a restart, is shown it from
the tree, and the store is asked from there on where the tree has forgotten a name, or nobody has listed further. Only
a seek to the start begins a new listing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from itertools import islice

import trio

from phfs_fuse.namespace.namespace import Namespace
from phfs_fuse.tree.directory_cookies import START, DirectoryCookies, Told, key_of, name_of, segment_of
from phfs_fuse.tree.inodes import Inodes
from phfs_fuse.tree.kernel_log import KernelLog
from phfs_fuse.tree.node import NEVER, Node
from phfs_fuse.types import Fh
from phfs_fuse.vfs.readdir_ahead import ReaddirAhead
from phfs_fuse.writeback.sync import Sync

STREAM_BITS = 20  # of the handle of a directory stream: which one of its directory
STREAM_MASK = (1 << STREAM_BITS) - 1
GIVEN_MAX = 512  # names that get their cookies at once: more than fit into a reply

Entry = tuple[bytes, Node]
"""A name of a directory by its place there (see `tree.directory_cookies`), and what had the name when it was
listed."""


class DirStream:
    """One reader. `cookie` and `after` are where an earlier process was: the last cookie that it gave, its key."""

    def __init__(
        self,
        namespace: Namespace,
        ahead: ReaddirAhead,
        inodes: Inodes,
        node: Node,
        places: DirectoryCookies,
        cookie: int = 0,
        after: bytes = START,
    ) -> None:
        self._namespace = namespace
        self._ahead = ahead
        self._inodes = inodes
        self._node = node
        self._places = places
        self._lock = trio.Lock()
        self._start(cookie, after)

    def _start(self, cookie: int, after: bytes) -> None:
        self._cookie, self._before = cookie, after  # of the name before those in `_given`
        self._given: deque[tuple[int, bytes, Node]] = deque()  # with their cookies; the reader may have them, or not
        self._after = after  # of the last of them
        self._window: deque[Entry] = deque()  # listed, to be given next
        self._pages = self._behind(after) if cookie else self._listed(after)

    # ---- where the names come from ----

    async def _behind(self, after: bytes) -> AsyncGenerator[list[Entry]]:
        """What was listed behind `after` is taken from the tree, as far as it has all of that."""
        while (keys := self._places.behind(after)) is not None:
            if not keys:
                return
            found = []
            for key in keys:
                node = self._current(key)
                if node is None and not self._has_forgotten_none():
                    break
                if node is not None and key_of(node) == key:
                    found.append((key, node))
                after = key
            yield found
            if after != keys[-1]:
                break
        async with aclosing(self._listed(after)) as pages:
            async for page in pages:
                yield page

    def _has_forgotten_none(self) -> bool:
        """Whether each listed name that the tree lacks now has been removed."""
        return self._node.complete_at > NEVER or self._node.gaps == self._places.gaps

    def _current(self, key: bytes) -> Node | None:
        """What has the name of the place `key` now: maybe a newer version."""
        return (self._node.kids or {}).get(name_of(key))

    async def _listed(self, after: bytes) -> AsyncGenerator[list[Entry]]:
        """Every child behind `after`, in order."""
        if after == START:
            await self._ahead.arrival(self._node)
        if (known := self._namespace.complete_listing(self._node)) is not None:
            yield self._entries(known, after)
            return
        held = self._namespace.local_only(self._node)
        shown = {node.name for node in held}  # names: a file may give its own to another while the pages come
        local = deque(self._entries(held, after))
        try:
            for node in held:
                node.holds += 1
            async with aclosing(self._namespace.pages(self._node, after=segment_of(after))) as pages:
                async for page in pages:
                    stored = self._entries((node for node in page if node.name not in shown), after)
                    before = []
                    while local and stored and local[0][0] < stored[-1][0]:
                        before.append(local.popleft())
                    yield sorted(before + stored, key=_place) if before else stored
            yield list(local)
        finally:
            for node in held:
                self._release(node)

    def _entries(self, nodes: Iterable[Node], after: bytes) -> list[Entry]:
        """Those behind `after` that are shown, in order."""
        found = ((key, node) for node in nodes if (key := key_of(node)) > after and self._inodes.is_listed(node))
        return sorted(found, key=_place)

    def _release(self, node: Node) -> None:
        node.holds -= 1
        if node.detached:
            self._inodes.drop_unused(node)

    # ---- reading ----

    async def read(self, offset: int) -> list[tuple[int, Node]]:
        """Some entries after `offset` (a cookie that came with an entry, 0: from the start), each with its own
        cookie; empty at the end. Raises: PhfsError."""
        async with self._lock:
            if not self._goes_on(offset):
                await self.aclose()
                self._start(offset, self._places.at(offset) if offset else START)
            while True:
                if found := self._found():
                    return found
                self._pass(len(self._given))
                if not await self._give():
                    return []

    def _goes_on(self, offset: int) -> bool:
        """Whether `offset` is where the last reply began, or in it, or at its end; what is before it is let go of."""
        for index, (cookie, _, _) in enumerate(self._given):
            if cookie == offset:
                self._pass(index + 1)
                return True
        return offset == self._cookie and offset != 0

    def _pass(self, count: int) -> None:
        for _ in range(count):
            self._cookie, self._before, node = self._given.popleft()
            self._release(node)

    def _found(self) -> list[tuple[int, Node]]:
        """What of `_given` is there still; of some with one cookie (see `tree.directory_cookies`) the first alone."""
        found: list[tuple[int, Node]] = []
        for cookie, key, _ in self._given:
            if found and found[-1][0] == cookie:
                break
            if (node := self._current(key)) is not None:
                found.append((cookie, node))
        return found

    async def _give(self) -> bool:
        """Get the next names and their cookies; False: there are none."""
        while not self._window:
            try:
                page = await anext(self._pages)
            except StopAsyncIteration:
                self._places.ended(self._after)
                return False
            except BaseException:
                self._pages = self._behind(self._after)  # whoever asks again is not to be told that this was all
                raise
            last = self._after
            for key, node in page:
                if key > last:  # a file that was replaced and stored meanwhile may come twice
                    node.holds += 1
                    self._window.append((key, node))
                    last = key
        entries = [self._window.popleft() for _ in range(min(len(self._window), GIVEN_MAX))]
        keys = [key for key, _ in entries]
        cookies = self._places.place(self._after, keys, lambda key: self._current(key) is not None)
        self._given.extend((cookie, key, node) for cookie, (key, node) in zip(cookies, entries, strict=True))
        self._after = keys[-1]
        return True

    def told(self, last: int) -> Told:
        """The names up to the first with the cookie `last`, which are told to the reader now."""
        cookies = [cookie for cookie, _, _ in self._given]
        count = cookies.index(last) + 1
        return Told(self._before, [key for _, key, _ in islice(self._given, count)], cookies[:count])

    async def aclose(self) -> None:
        self._pass(len(self._given))
        while self._window:
            self._release(self._window.pop()[1])
        await self._pages.aclose()


def _place(entry: Entry) -> bytes:
    return entry[0]


class DirStreams:
    """The open directories. A handle is the inode number and which one of its streams."""

    def __init__(self, *, inodes: Inodes, namespace: Namespace, kernel: KernelLog, settling: Sync) -> None:
        self._inodes = inodes
        self._namespace = namespace
        self._kernel = kernel
        self._settling = settling
        self.ahead = ReaddirAhead(namespace, inodes)
        self._streams: dict[int, DirStream] = {}
        self._stream_no = 0

    def resume(self, positions: dict[int, tuple[int, bytes]]) -> None:
        """Go on for a process that died, from the positions that it had noted."""
        for fh, position in positions.items():
            if self._inodes.find(fh >> STREAM_BITS) is not None:
                self._stream(fh, *position)
        self._stream_no = max((fh & STREAM_MASK for fh in positions), default=0)

    def opendir(self, ino: int) -> Fh:
        node = self._inodes.get(ino)
        node.opens += 1
        self._kernel.referred(node)
        self._stream_no = (self._stream_no + 1) & STREAM_MASK
        return Fh(node.ino << STREAM_BITS | self._stream_no)

    def _stream(self, fh: int, cookie: int = 0, after: bytes = START) -> DirStream:
        node = self._inodes.get(fh >> STREAM_BITS)
        places = self._kernel.places(node)
        stream = DirStream(self._namespace, self.ahead, self._inodes, node, places, cookie, after)
        self._streams[fh] = stream
        return stream

    async def readdir(self, fh: int, offset: int) -> list[tuple[int, Node]]:
        """Some entries after the cookie `offset`, each with its cookie; empty at the end."""
        return await (self._streams.get(fh) or self._stream(fh)).read(offset)

    def told_page(self, fh: int, page: Sequence[tuple[int, Node]]) -> None:
        """A reply hands out these entries of a directory stream."""
        if page:
            nodes, told = [node for _, node in page], self._streams[fh].told(page[-1][0])
            self._kernel.told_all(nodes, fh, fh >> STREAM_BITS, told)

    async def releasedir(self, fh: int) -> None:
        node = self._inodes.get(fh >> STREAM_BITS)
        if (stream := self._streams.pop(fh, None)) is not None:
            await stream.aclose()
            self._kernel.stream_closed(fh, node)
        node.opens -= 1
        self._kernel.referred(node)
        self._inodes.drop_unused(node)

    async def fsyncdir(self, fh: int) -> None:
        """Return when the store has what was changed at the names in the directory."""
        await self._settling.settle_names(self._inodes.get(fh >> STREAM_BITS))

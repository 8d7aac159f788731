"""What is on its way into the file of one version, and who waits for it. Owns the *busy* blocks.

A block is busy while one task fetches, checks, copies or drops it, so there is one fetch per block however many
readers. All state changes on the trio thread; the threads of the store write into the file and say how far they got.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import trio

from phfs_fuse.cache.block_file import BlockFile
from phfs_fuse.cache.file_format import BlockWriter
from phfs_fuse.errors import BadAnswer, NotFound, PhfsError, StaleVersion, StoreUnavailable, VersionChanged
from phfs_fuse.extents import Extent, Extents
from phfs_fuse.store.base import ObjectStore
from phfs_fuse.tasks import survived, surviving

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Fetching:
    """Where bytes come from, for all versions; the tasks and the thread bridge are there while the cache runs."""

    store: ObjectStore
    nursery: trio.Nursery | None = None
    token: trio.lowlevel.TrioToken | None = None


@dataclass(eq=False, slots=True)
class _Reader:
    """Someone who waits until the blocks of [start, end) are ready, or one of them failed."""

    start: int
    end: int
    error: Exception | None = None
    event: trio.Event = field(default_factory=trio.Event)


@dataclass(eq=False, slots=True)
class _Fill:
    """The task that makes the blocks of [start, end) ready; they are busy meanwhile."""

    start: int
    end: int
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    fd: int = -1
    writer: BlockWriter | None = None  # while it may write and what it wrote counts
    published: int = 0
    notified: bool = False


class Fills:
    __slots__ = ("_fetching", "_file", "_fills", "_readers", "busy")

    def __init__(self, fetching: Fetching, file: BlockFile) -> None:
        self._fetching = fetching
        self._file = file
        file.on_replaced = self._replaced
        self.busy = Extents()
        self._readers: list[_Reader] = []
        self._fills: set[_Fill] = set()

    @property
    def awaited(self) -> list[Extent]:
        return [(reader.start, reader.end) for reader in self._readers]

    async def arrival(self, start: int, end: int, wanted: Iterable[Extent]) -> None:
        """Request `wanted`. Return when [start, end) is ready, or may be asked for again. Raises: what the fetch of
        it raised."""
        reader = _Reader(start, end)
        self._readers.append(reader)
        try:
            if (own := self._request(wanted, self._file.blocks(start, end))) is not None:
                await self._run(own)
            await reader.event.wait()
        finally:
            self._readers.remove(reader)
        if reader.error is not None:
            raise for_reader(reader.error) from reader.error

    def request(self, wanted: Iterable[Extent]) -> None:
        """See to it that the blocks of `wanted` are ready or busy."""
        self._request(wanted, None)

    def _request(self, wanted: Iterable[Extent], own: Extent | None) -> _Fill | None:
        """As `request`, but for a fill that lies in `own`, if there is one: the caller, who would only wait for it,
        runs that itself."""
        nursery = self._fetching.nursery
        if nursery is None:
            raise StoreUnavailable("read", self._file.key, "the block cache is not running")
        kept = None
        for piece in self._missing(wanted):
            self.busy.add(*piece)
            self._fills.add(fill := _Fill(*piece))
            if kept is None and own is not None and own[0] <= fill.start and fill.end <= own[1]:
                kept = fill
            else:
                nursery.start_soon(survived, "reading", self._run, fill)
        return kept

    def _missing(self, wanted: Iterable[Extent]) -> Iterator[Extent]:
        """What is neither ready nor busy, as it is by then."""
        for extent in wanted:
            for gap in self._file.ready.gaps(*extent):
                yield from self.busy.gaps(*gap)

    def cancel(self) -> None:
        """Nobody wants what is being fetched ahead."""
        for fill in self._fills:
            fill.scope.cancel()

    def _replaced(self) -> None:
        """The file is another one: what is being written into the old one does not count."""
        for fill in self._fills:
            fill.scope.cancel()
            if fill.writer is not None:
                fill.writer.revoke()
                fill.writer = None

    def add(self, start: int, end: int) -> None:
        """These blocks are in the file now: who waits for no more than these goes on."""
        self._file.add(start, end)
        for reader in self._readers:
            if self._file.ready.covers(reader.start, reader.end):
                reader.event.set()

    def free(self, start: int, end: int, error: Exception | None = None) -> None:
        """The range is not busy any more: its readers look again, or fail."""
        self.busy.remove(start, end)
        for reader in self._readers:
            if reader.start < end and start < reader.end:
                if not self._file.ready.covers(reader.start, reader.end):
                    reader.error = reader.error or error
                reader.event.set()

    async def fetch(self, start: int, end: int, sink: Callable[[int, bytes | memoryview], None]) -> None:
        """From the store to `sink`. Raises: PhfsError."""
        counts = self._file.disk.counts
        counts.fetches += 1
        counts.fetch_bytes += end - start
        await self._fetching.store.get(self._file.key, start, end, etag=self._file.etag, sink=sink)

    async def _run(self, fill: _Fill) -> None:
        """Owns the busy range of `fill` and tells the readers how it ended."""
        error: Exception | None = None
        key = self._file.key
        try:
            with fill.scope:
                await self._load(fill)
        except OSError as exc:
            self._file.disk.failed(exc)
        except Exception as exc:
            if key == self._file.key:  # else it was asked for under the old name: ask again
                error = exc
            if not isinstance(exc, PhfsError):  # a bug: the readers get it, the mount goes on
                log.exception("reading key=%s failed", key)
        finally:
            self._fills.discard(fill)
            self.free(fill.start, fill.end, error)

    async def _load(self, fill: _Fill) -> None:
        """Look what an earlier process left, fetch the rest."""
        if self._file.unchecked.overlap(fill.start, fill.end):
            for piece in await self._file.check(fill.start, fill.end):
                self.add(*piece)
        for start, end in self._file.ready.gaps(fill.start, fill.end):
            await self._get(fill, start, end)

    async def _get(self, fill: _Fill, start: int, end: int) -> None:
        file = self._file
        if not file.attach():
            return
        fill.fd, fill.published = os.dup(file.fd), start
        assert self._fetching.token is not None
        token = self._fetching.token

        def notify() -> None:  # on a thread of the store
            if not fill.notified:
                fill.notified = True
                token.run_sync_soon(self._told, fill, writer)

        writer = fill.writer = BlockWriter(fill.fd, file.layout, file.disk.checksum, start, end, notify)
        try:
            await self.fetch(start, end, writer)
        finally:
            writer.revoke()
            self._publish(fill, writer)
            counted, fill.writer = fill.writer is writer, None
            os.close(fill.fd)
        if counted and writer.error is None and writer.done != end:
            raise BadAnswer("get", self._file.key, f"ended at {writer.done} instead of {end}")

    def _told(self, fill: _Fill, writer: BlockWriter) -> None:
        """`_publish`, called by the loop itself, which an exception would end."""
        with surviving("reading") as outcome:
            self._publish(fill, writer)
        if outcome.failure is not None:
            fill.scope.cancel()

    def _publish(self, fill: _Fill, writer: BlockWriter) -> None:
        """Blocks are in the file."""
        if fill.writer is not writer:
            return
        file = self._file
        fill.notified = False
        if writer.error is not None:
            file.disk.failed(writer.error)
            fill.scope.cancel()
        if os.fstat(fill.fd).st_size != file.layout.file_bytes:
            file.restart("not as long as it was")
            return
        done = writer.done
        if done > fill.published:
            start, fill.published = fill.published, done
            self.add(start, done)
            file.disk.charge(file.name, done - start)


def for_reader(exc: Exception) -> Exception:
    """A new exception for one of several readers."""
    if isinstance(exc, (VersionChanged, NotFound)):
        return StaleVersion(exc.op, exc.subject, exc.reason)
    if isinstance(exc, PhfsError):
        return type(exc)(exc.op, exc.subject, exc.reason)
    return StoreUnavailable("read", "", str(exc))

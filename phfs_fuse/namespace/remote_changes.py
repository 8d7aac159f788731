"""What the store's stream of changes means for the tree and for the kernel. Owns the state of the stream.

While it is open, answers of the store are believed for long (`Lifetimes`), and what others change is looked up again.
What was learned before it opened, and when it may have left something out, counts for the short time only. Our own
changes come back as events too: they are known by version and metadata, or by the key that was deleted.

The kernel is told by the keeper (see `keeper.kernel_notify`), some names at a time; what comes meanwhile is
collected.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from enum import Enum
from typing import Final

import trio

from phfs_fuse.attrs import from_metadata
from phfs_fuse.errors import (
    AccessDenied,
    ClockOff,
    InvalidArgument,
    NotFound,
    NotSupported,
    PhfsError,
    StoreUnavailable,
)
from phfs_fuse.namespace.lifetimes import Lifetimes
from phfs_fuse.namespace.namespace import Namespace
from phfs_fuse.pending.changes import Changes
from phfs_fuse.pending.queue import UploadQueue
from phfs_fuse.store.base import ObjectStore, StoreEvent
from phfs_fuse.tasks import lasting, surviving
from phfs_fuse.tree.inodes import Inodes
from phfs_fuse.types import Ino, ObjectKey

log = logging.getLogger(__name__)

RETRY_SECONDS: Final = 0.5
RETRY_SECONDS_MAX: Final = 30.0
NEVER_OPENED_SECONDS_MAX: Final = 300.0
SETTLE_SECONDS: Final = 10.0  # without a gap, after one, until the stream is relied on again
HELD_MAX: Final = 10_000  # events on keys that we are changing ourselves
PACKET_CHARS_MAX: Final = 12_000  # of names for the keeper, a packet holds 16 KiB
NONE_HERE: Final = (NotSupported, AccessDenied, NotFound, InvalidArgument)  # if that is the first answer

Name = tuple[Ino, bytes]
Expire = Callable[[Sequence[Name]], Awaitable[None]]
"""Have the kernel look these names up again. Returns when it knows."""


class StreamState(Enum):
    OFF = "off"
    LIVE = "live"
    RECONNECTING = "reconnecting"


class RemoteChanges:
    """`on_foreign` is called with each object that somebody else stored or removed: its key, the size that was known
    of it (None: nothing was), its size now."""

    def __init__(
        self,
        *,
        store: ObjectStore,
        inodes: Inodes,
        changes: Changes,
        queue: UploadQueue,
        namespace: Namespace,
        trust: Lifetimes,
    ) -> None:
        self._store = store
        self._inodes = inodes
        self._changes = changes
        self._queue = queue
        self._namespace = namespace
        self._trust = trust
        self._held: dict[ObjectKey, list[StoreEvent]] = {}
        self._expire: dict[Name, None] = {}  # in order
        self._expire_wake = trio.Event()
        self._failures = 0
        self.state = StreamState.OFF
        self.on_foreign: Callable[[str, int | None, int], None] | None = None
        changes.on_met = self._met
        self.heard_count = self.foreign_count = self.gaps = self.opened_count = 0

    async def run(self) -> None:
        """Service: listen for ever; returns at once where the store has no stream."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lasting, "events", self._judge_held)
            await self._listen()
            nursery.cancel_scope.cancel()

    async def _listen(self) -> None:
        prefix = self._inodes.key(self._inodes.root)
        while True:
            failure: PhfsError = StoreUnavailable("listen", prefix, "the stream has failed")
            with surviving("event stream"):
                try:
                    await self._store.listen(prefix, self)
                except PhfsError as exc:
                    failure = exc
            if self.opened_count:
                self._lost(failure)
            elif isinstance(failure, NONE_HERE) and not isinstance(failure, ClockOff):
                log.info("changes of others show after a while: %s", failure)
                return
            elif not self._failures:
                log.info("changes of others show after a while, for now: %s", failure)
            await trio.sleep(self._backoff())

    def _backoff(self) -> float:
        self._failures += 1
        longest = RETRY_SECONDS_MAX if self.opened_count else NEVER_OPENED_SECONDS_MAX
        return random.uniform(0.5, 1.0) * min(RETRY_SECONDS * 2.0 ** min(self._failures, 16), longest)

    def _lost(self, exc: PhfsError) -> None:
        was_live, self.state = self.state is StreamState.LIVE, StreamState.RECONNECTING
        if was_live:
            log.info("the stream of changes is lost: %s", exc)
            self._trust.lost()
            self.expire_all()

    # ---- Listener ----

    def opened(self) -> None:
        log.info("changes of others are heard of")
        self.state = StreamState.LIVE
        self.opened_count += 1
        self._failures = 0
        self._trust.live(trio.current_time())

    def missed(self) -> None:
        self.gaps += 1
        now = trio.current_time()
        was_live = self._trust.is_live(now)
        self._trust.live(now + SETTLE_SECONDS)
        if was_live:
            self.expire_all()

    def heard(self, events: Sequence[StoreEvent]) -> None:
        self.heard_count += len(events)
        for event in events:
            if self._queue.is_busy(event.key) and len(self._held) < HELD_MAX:
                self._held.setdefault(event.key, []).append(event)  # ours or not: known when that has ended
            else:
                self._judged(event)

    async def _judge_held(self) -> None:
        while True:
            await self._changes.endings.settled.wait()
            for key in [key for key in self._held if not self._queue.is_busy(key)]:
                for event in self._held.pop(key):
                    self._judged(event)

    def _judged(self, event: StoreEvent) -> None:
        """An event that cannot be judged is one that was not heard."""
        with surviving("event") as outcome:
            self._judge(event)
        if outcome.failure is not None:
            self.missed()

    def _judge(self, event: StoreEvent) -> None:
        if self._is_ours(event):
            return
        self.foreign_count += 1
        node = self._inodes.named(event.key)
        known = node.stored_size if node is not None and node.dirty is None else None
        self._tell_kernel(self._namespace.changed_by_others(event.key, removed=event.etag is None))
        if self.on_foreign is not None and not event.key.endswith("/"):
            self.on_foreign(event.key, known, event.size)

    def _met(self, key: ObjectKey) -> None:
        self._tell_kernel(self._namespace.changed_by_others(key, removed=False))

    def _is_ours(self, event: StoreEvent) -> bool:
        """Whether the event tells of what the tree shows already, because it was done here."""
        node, gone = self._inodes.named(event.key), self._changes.gone.get(event.key)
        is_folder_key = event.key.endswith("/")
        if event.etag is None:
            if is_folder_key and node is not None and node.is_dir:
                return node.marker is None and bool(node.kids) and node.body is None
            return (node is None or node.dirty is not None) and self._changes.gone.was_deleted(event.key)
        if gone is not None and gone.etag == event.etag:
            return True
        if node is None or node.is_dir != is_folder_key:
            return False
        shown = node.marker if is_folder_key else node.base.etag if node.base else None
        if node.dirty is not None:
            return event.etag in (node.dirty.over, shown)
        return shown == event.etag and from_metadata(event.metadata, node.mtime_ns, node.attrs) == node.attrs

    # ---- the kernel ----

    def expire_all(self) -> None:
        """Whatever the kernel was told has to be looked up again."""
        if self._trust.kernel_takes_back:
            nodes = self._inodes.all()
            self._tell_kernel((n.parent.ino, n.name) for n in nodes if n.parent and n.lookups and not n.detached)

    def _tell_kernel(self, names: Iterable[Name]) -> None:
        for name in names:
            if self._trust.kernel_takes_back or not self._is_folder(name):
                self._expire[name] = None
        if self._expire:
            self._expire_wake.set()

    def _is_folder(self, name: Name) -> bool:
        parent = self._inodes.find(name[0])
        kid = (parent.kids or {}).get(name[1]) if parent is not None else None
        return kid is not None and kid.is_dir

    async def tell_kernel(self, expire: Expire) -> None:
        """Service: pass on which names have to be looked up again."""
        while True:
            await self._expire_wake.wait()
            while self._expire:
                batch: list[Name] = []
                room = PACKET_CHARS_MAX
                while self._expire and room > 0:
                    name = next(iter(self._expire))
                    del self._expire[name]
                    batch.append(name)
                    room -= 32 + 2 * len(name[1])
                await expire(batch)
            self._expire_wake = trio.Event()

    # ---- for the control socket ----

    def status(self) -> Mapping[str, object]:
        return {
            "state": self.state.value,
            "trusted": self._trust.is_live(trio.current_time()),
            "heard": self.heard_count,
            "foreign": self.foreign_count,
            "gaps": self.gaps,
            "opened": self.opened_count,
            "untold": len(self._expire),
        }

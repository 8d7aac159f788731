"""The upload queue: when to look at which dirty file or deleted key. No I/O, no await.

An entry of the heap says when to look; when a file is really due is in its `DirtyFile`, since each further change
moves that on. Work that must wait for a key is parked there and comes back when the key is free. Owns the times, and
which keys have a request under way or had one lately.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Callable, Iterator

import trio
from cachetools import TTLCache

from phfs_fuse.config.model import WritebackConfig
from phfs_fuse.pending.tombstones import Tombstone
from phfs_fuse.tree.dirty import DirtyFile
from phfs_fuse.tree.node import Node
from phfs_fuse.types import MIB, ObjectKey

Work = Node | Tombstone

TOGETHER_SECONDS = 0.25  # deletions that are due within this time go in one request
REST_PART = 10  # a file that the store has had for so many quiet times waits for this part of one
RECENT_MAX = 4096  # of which it is known that they were stored lately
HOLD_SECONDS = 2.0  # for which what is due waits until programs ask for less
HELD_BYTES_MAX = MIB  # bigger files take the store longer than us: they do not wait
UPCOMING_MAX = 512


def _can_wait(work: Work) -> bool:
    """Not a file that is open for writing, which has waited for its age, nor a folder that others look for."""
    return isinstance(work, Tombstone) or not (work.writers or work.is_dir or work.size >= HELD_BYTES_MAX)


def _together(due: float) -> float:
    """A time after `due`, so that what comes up at the very same time still goes with it."""
    return (math.floor(due / TOGETHER_SECONDS) + 1) * TOGETHER_SECONDS


class UploadQueue:
    def __init__(self, config: WritebackConfig, key_of: Callable[[Node], ObjectKey]) -> None:
        self._config = config
        self._key_of = key_of
        self._recent: TTLCache[ObjectKey, None] = TTLCache(
            RECENT_MAX, ttl=REST_PART * config.delay_seconds, timer=trio.current_time
        )
        self._heap: list[tuple[float, int, Work]] = []
        self._held: deque[tuple[float, Work]] = deque()  # until when each may wait
        self._busy: set[ObjectKey] = set()
        self._parked: dict[ObjectKey, list[Work]] = {}
        self._ticket = 0
        self.draining = False  # nothing waits for its quiet time any more
        self.wake = trio.Event()  # set when there may be something to do earlier than was thought

    @property
    def next_due(self) -> float:
        return self._heap[0][0] if self._heap else math.inf

    @property
    def held_until(self) -> float:
        """When what is held back may wait no longer."""
        return self._held[0][0] if self._held else math.inf

    def take(self, now: float, *, is_calm: bool) -> Work | None:
        """What to look at now. What can wait is held back, for HOLD_SECONDS at most, while it is not calm."""
        while self.next_due <= now:
            due, work = self._pop()
            if is_calm or due == 0.0 or not _can_wait(work):
                return work
            self._held.append((due + HOLD_SECONDS, work))
        return None

    def take_held(self, now: float, *, is_calm: bool) -> Work | None:
        """What was held back and is not any more."""
        return self._held.popleft()[1] if self._held and (is_calm or self.held_until <= now) else None

    def _pop(self) -> tuple[float, Work]:
        due, _, work = heapq.heappop(self._heap)
        if isinstance(work, Node) and work.dirty is not None:
            work.dirty.queued = math.inf
        return due, work

    def upcoming(self, now: float) -> Iterator[Node]:
        """Files that are to be looked at next, more or less in this order."""
        yield from (work for _, work in self._held if isinstance(work, Node))
        for due, _, work in sorted(self._heap[:UPCOMING_MAX]):
            if due <= now and isinstance(work, Node):
                yield work

    def is_busy(self, key: ObjectKey) -> bool:
        """Whether a request on the key is under way."""
        return key in self._busy

    def claim(self, key: ObjectKey) -> None:
        """A request on the key begins."""
        self._busy.add(key)

    def free(self, key: ObjectKey) -> None:
        """It has ended."""
        self._busy.discard(key)
        self._recent[key] = None
        self.unpark(key)

    def park(self, key: ObjectKey, work: Work) -> None:
        self._parked.setdefault(key, []).append(work)

    def unpark(self, key: ObjectKey) -> None:
        for work in self._parked.pop(key, ()):
            if isinstance(work, Tombstone):
                self.push(work, _together(trio.current_time()))
            else:
                self.hurry(work)

    @property
    def delay(self) -> float:
        return 0.0 if self.draining else self._config.delay_seconds

    @property
    def delete_due(self) -> float:
        """When a key that is removed now shall be deleted: many that are removed one after the other at once."""
        due = trio.current_time() + self.delay
        return _together(due) if self.delay else due

    def schedule(self, node: Node) -> None:
        """Set when `node` is due: after the quiet time once nobody can write to it, by age in any case."""
        dirty = node.dirty
        assert dirty is not None
        now = trio.current_time()
        age = self._config.open_seconds * max(1.0, node.size / (64 * MIB))
        quiet = math.inf if node.writers and not self.draining else now + self._quiet_seconds(node, dirty)
        due = min(quiet, dirty.since + age)
        self.enqueue(node, dirty, max(due, dirty.due) if dirty.attempts else due)

    def _quiet_seconds(self, node: Node, dirty: DirtyFile) -> float:
        """Short for new bytes of a file that has been left alone for long: somebody saved it; and for a big new one,
        which nothing but its size takes longer. A small new file may be gone or get its name in a moment; what was
        stored lately may be written once more."""
        is_worth_it = dirty.over is not None or node.size >= self._config.multipart_bytes_min
        if is_worth_it and node.staged is not None and self._key_of(node) not in self._recent:
            return self.delay / REST_PART
        return self.delay

    def enqueue(self, node: Node, dirty: DirtyFile, due: float) -> None:
        dirty.due = due
        if due < dirty.queued:
            dirty.queued = due
            self.push(node, due)

    def backoff(self, attempts: int) -> float:
        """Seconds until the next try."""
        return random.uniform(0.5, 1.0) * min(2.0 ** min(attempts, 16) / 2, self._config.retry_seconds_max)

    def put_off(self, node: Node, dirty: DirtyFile) -> None:
        """Until the store may have changed its mind: it has refused `node` for good."""
        self.enqueue(node, dirty, trio.current_time() + random.uniform(0.9, 1.1) * self._config.refused_seconds)

    def push(self, work: Work, due: float) -> None:
        self._ticket += 1
        heapq.heappush(self._heap, (due, self._ticket, work))
        if self._heap[0][2] is work:
            self.wake.set()

    def look_later(self, work: Work) -> None:
        """At what could not be begun."""
        due = trio.current_time() + self.backoff(3)
        if isinstance(work, Tombstone):
            self.push(work, due)
        elif work.dirty is not None:
            self.enqueue(work, work.dirty, due)

    def hurry(self, node: Node) -> None:
        """Upload `node` now, if it waits for something that is not a request."""
        if node.dirty is not None:
            self.enqueue(node, node.dirty, 0.0)

"""A `FakeStore` with the habits of MinIO that cost bytes before. Owns the walks that pages are taken from.

- The pages of a listing from the second on come out of a walk that began with the second page: what is stored or
  removed meanwhile shows as it was.
- A page is as small as a test asks for.
- Names longer than a limit are refused.
- With a seed, answers to listings and HEADs, and events, come late and in another order; those of one key in order.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

import trio

from phfs_fuse.errors import NameTooLong
from phfs_fuse.store.base import Listing, ObjectInfo, StoreEvent
from phfs_fuse.types import ObjectKey
from tests.support.fake_store import FakeStore, StoredObject

SEGMENT_BYTES_MAX = 255


@dataclass(slots=True)
class Walk:
    """What one listing found on the disk: names in order, with the objects of those that are none but a prefix."""

    names: list[str]
    objects: Mapping[str, ObjectInfo]


class HabitStore(FakeStore):
    """`page_max` names a page. `between` is called with the number of each page of a listing before it is made."""

    def __init__(self, page_max: int = 1000, seed: int | None = None, **more: Any) -> None:
        super().__init__(**more)
        self.page_max = page_max
        self._random = None if seed is None else Random(seed)
        self._events: list[tuple[float, int, StoreEvent]] = []  # that are to be told, and when
        self._told_at: dict[str, float] = {}  # when the last event of a key is told
        self._told_count = 0
        self._sorted: list[ObjectKey] | None = None
        self.between: Callable[[int], None] | None = None
        self._walks: dict[str, Walk] = {}

    async def list(
        self,
        prefix: str,
        *,
        delimiter: bool,
        token: str | None = None,
        start_after: str = "",
        count_max: int = 1000,
    ) -> Listing:
        await self._request("list", prefix)
        await self._late()
        number, walk_id, after = token.split(" ", 2) if token else ("1", "", start_after)
        if self.between is not None and count_max > 1:
            self.between(int(number))
        count = min(count_max, self.page_max)
        if (walk := self._walks.get(walk_id)) is None:
            walk = self._walked(prefix, delimiter, after, None if number == "2" else count + 1)
        names = walk.names[bisect_right(walk.names, after) :]
        page = names[:count]
        next_token = None
        if len(names) > len(page):
            if number == "2":
                walk_id = f"walk-{len(self._walks)}"
                self._walks[walk_id] = walk
            next_token = f"{int(number) + 1} {walk_id} {page[-1]}"
        await self._late()
        return Listing(
            objects=[walk.objects[name] for name in page if name in walk.objects],
            prefixes=[name for name in page if name not in walk.objects],
            next_token=next_token,
        )

    async def head(self, key: ObjectKey, *, surely: bool = False) -> ObjectInfo:
        await self._late()
        try:
            return await super().head(key, surely=surely)
        finally:
            await self._late()

    async def _late(self) -> None:
        if self._random is not None and self._random.random() < 0.3:
            await trio.sleep(self._random.choice([0.01, 0.1, 0.5, 3.0]))

    def _tell(self, event: StoreEvent) -> None:
        if self._random is None:
            super()._tell(event)
            return
        due = trio.current_time() + self._random.choice([0.0, 0.01, 0.2, 2.0])
        due = self._told_at[event.key] = max(due, self._told_at.get(event.key, 0.0))
        self._told_count += 1
        self._events.append((due, self._told_count, event))

    async def tell_late(self) -> None:
        """Service: tell the events, with a seed."""
        while True:
            now = trio.current_time()
            for entry in sorted(entry for entry in self._events if entry[0] <= now):
                self._events.remove(entry)
                super()._tell(entry[2])
            await trio.sleep(0.1)

    def _walked(self, prefix: str, delimiter: bool, after: str, count: int | None) -> Walk:
        """Of what is below `prefix` and behind `after`, `count` names, or all."""
        if self._sorted is None:
            self._sorted = sorted(self.objects)  # the names of these tests are ASCII
        names: list[str] = []
        objects: dict[str, ObjectInfo] = {}
        for at in range(bisect_left(self._sorted, max(prefix, after)), len(self._sorted)):
            key = self._sorted[at]
            if not key.startswith(prefix) or len(names) == count:
                break
            name, is_prefix = self._rolled(key, prefix, delimiter)
            if name <= after or names[-1:] == [name]:
                continue
            names.append(name)
            if not is_prefix:
                objects[name] = self._listed(ObjectKey(name))
        return Walk(names, objects)

    def _store(self, *what: Any) -> StoredObject:
        self._sorted = None
        return super()._store(*what)

    def _remove(self, key: ObjectKey) -> None:
        self._sorted = None
        super()._remove(key)

    async def put(self, key: ObjectKey, *body: Any, **more: Any) -> ObjectInfo:
        if any(len(segment.encode()) > SEGMENT_BYTES_MAX for segment in key.split("/")):
            raise NameTooLong("put", key, "XMinioInvalidObjectName")
        return await super().put(key, *body, **more)

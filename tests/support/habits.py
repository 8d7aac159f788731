"""A `FakeStore` with the habits of MinIO that cost bytes before. Owns the walks that pages are taken from.

- The pages of a listing from the second on come out of a walk that began with the second page: what is stored or
  removed meanwhile shows as it was.
- A page is as small as a test asks for.
- Names longer than a limit are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from phfs_fuse.errors import NameTooLong
from phfs_fuse.store.base import Listing, ObjectInfo
from phfs_fuse.types import ObjectKey
from tests.support.fake_store import FakeStore

SEGMENT_BYTES_MAX = 255


@dataclass(slots=True)
class Walk:
    """What one listing found on the disk: names in order, with the objects of those that are none but a prefix."""

    names: list[str]
    objects: Mapping[str, ObjectInfo]


class HabitStore(FakeStore):
    """`page_max` names a page. `between` is called with the number of each page of a listing before it is made."""

    def __init__(self, page_max: int = 1000, **more: Any) -> None:
        super().__init__(**more)
        self.page_max = page_max
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
        number, walk_id, after = token.split(" ", 2) if token else ("1", "", start_after)
        if self.between is not None and count_max > 1:
            self.between(int(number))
        walk = self._walks.get(walk_id) or self._walked(prefix, delimiter)
        names = [name for name in walk.names if name.encode() > after.encode()]
        page = names[: min(count_max, self.page_max)]
        next_token = None
        if len(names) > len(page):
            if number == "2":
                walk_id = f"walk-{len(self._walks)}"
                self._walks[walk_id] = walk
            next_token = f"{int(number) + 1} {walk_id} {page[-1]}"
        return Listing(
            objects=[walk.objects[name] for name in page if name in walk.objects],
            prefixes=[name for name in page if name not in walk.objects],
            next_token=next_token,
        )

    def _walked(self, prefix: str, delimiter: bool) -> Walk:
        entries = self._entries(prefix, delimiter)
        objects = {name: self._listed(ObjectKey(name)) for name, is_prefix in entries if not is_prefix}
        return Walk([name for name, _ in entries], objects)

    async def put(self, key: ObjectKey, *body: Any, **more: Any) -> ObjectInfo:
        if any(len(segment.encode()) > SEGMENT_BYTES_MAX for segment in key.split("/")):
            raise NameTooLong("put", key, "XMinioInvalidObjectName")
        return await super().put(key, *body, **more)

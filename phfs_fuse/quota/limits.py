"""Quotas: how many bytes may be below a folder, and how many are. Owns limits and counts; no I/O, no await.

The use of a folder is the sum of the sizes of its files as this mount shows them: what the store has, with what was
changed here and waits for its upload. It is counted by going through the store's keys once (`Count`) and kept up by
`changed`. What somebody else does is in it after the next count, or when `foreign` is told. Folders are named by the
prefix of their keys; one within another counts for both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from phfs_fuse.errors import QuotaExceeded

TIGHT_BYTES: Final = 64 << 20
TIGHT_PART: Final = 20  # of the limit, if that is more


@dataclass(slots=True, eq=False)
class Quota:
    """`used` is what was found by an earlier process, or since, until it is `counted`. In bytes."""

    prefix: str
    limit: int
    used: int = 0
    counted: bool = False
    refused: int = 0  # writes, creates and renames

    @property
    def tight(self) -> bool:
        """Whether the next file may be one too many."""
        return self.limit - self.used < max(TIGHT_BYTES, self.limit // TIGHT_PART)

    @property
    def free(self) -> int:
        return max(0, self.limit - self.used)


@dataclass(frozen=True, slots=True)
class Room:
    """What statfs tells: `available` is less than `free` where a quota further up has less."""

    size: int
    free: int
    available: int


class Count:
    """One pass over the keys below `root`, in ascending order, while the tree goes on changing.

    `known` are the keys below it of which this mount knows more than the store: their sizes, 0 for deleted ones.
    """

    def __init__(self, root: str, known: Mapping[str, int], prefixes: Iterable[str]) -> None:
        self.root = root
        self._touched = dict(known)
        self._listed_to = ""
        self._sums = dict.fromkeys(prefixes, 0)

    def _add(self, key: str, size: int) -> None:
        for prefix in _folders(key):
            if prefix in self._sums:
                self._sums[prefix] += size

    def listed(self, found: Iterable[tuple[str, int]]) -> None:
        """The next keys of the store with their sizes."""
        for key, size in found:
            self._listed_to = key
            if key not in self._touched:
                self._add(key, size)

    def changed(self, key: str, old: int, new: int) -> None:
        """A file of this mount has another size. What is not listed yet may come with either."""
        if key > self._listed_to:
            self._touched[key] = new
        else:
            self._add(key, new - old)

    def end(self) -> Mapping[str, int]:
        """Bytes by prefix."""
        for key, size in self._touched.items():
            self._add(key, size)
        self._touched.clear()
        return self._sums


class Quotas:
    """Empty, and then false, in a mount without quotas."""

    def __init__(self) -> None:
        self._quotas: dict[str, Quota] = {}
        self._count: Count | None = None
        self.outdated = False  # a count is wanted before its time

    def __bool__(self) -> bool:
        return bool(self._quotas)

    def __iter__(self) -> Iterator[Quota]:
        return iter(self._quotas.values())

    def limit(self, limits: Mapping[str, int], used: Mapping[str, int] | None = None) -> None:
        """These are the quotas from now on, by prefix; `used` is what an earlier process knew of their use."""
        for prefix in self._quotas.keys() - limits.keys():
            del self._quotas[prefix]
        for prefix, size in limits.items():
            if (quota := self._quotas.get(prefix)) is None:
                self._quotas[prefix] = Quota(prefix, size, (used or {}).get(prefix, 0))
                self.outdated = True
            else:
                quota.limit = size

    def used(self) -> dict[str, int]:
        return {quota.prefix: quota.used for quota in self}

    def _over(self, key: str) -> Iterator[Quota]:
        """The quotas that count the file or folder of that key, from the root down."""
        for prefix in _folders(key):
            if (quota := self._quotas.get(prefix)) is not None:
                yield quota

    # ---- what happens to files ----

    def changed(self, key: str, old: int, new: int) -> None:
        """A file of this mount has another size; 0: it is no more, or was not there."""
        if not self._quotas or old == new:
            return
        for quota in self._over(key):
            quota.used = max(0, quota.used + new - old)
        if self._count is not None and key.startswith(self._count.root):
            self._count.changed(key, old, new)

    def foreign(self, key: str, old: int | None, new: int) -> None:
        """Somebody else (never this mount) has stored, or with `new` 0 deleted, an object; `old` is the size that is
        counted of it, None if that is not known: then all is counted again. So it is after what comes during a count,
        which may have seen it or not."""
        if not self._quotas:
            return
        if old is None or self._count is not None:
            self.outdated = True
        if old is not None:
            for quota in self._over(key):
                quota.used = max(0, quota.used + new - old)

    def require(self, key: str, growth: int) -> None:
        """Raises: QuotaExceeded (EDQUOT), `growth` more bytes in the file `key` are too many for a folder of it."""
        if growth > 0:
            self._require((quota, growth) for quota in self._over(key))

    def require_moves(self, moves: Iterable[tuple[str, str | None, int]]) -> None:
        """The same for files that get another name (None: that go), each with its size, all at once."""
        growth: Counter[Quota] = Counter()
        for old, new, size in moves:
            growth.subtract(dict.fromkeys(self._over(old), size))
            if new is not None:
                growth.update(dict.fromkeys(self._over(new), size))
        self._require(growth.items())

    def _require(self, growth: Iterable[tuple[Quota, int]]) -> None:
        for quota, size in growth:
            if size > 0 and quota.used + size > quota.limit:
                quota.refused += 1
                raise QuotaExceeded("write", quota.prefix, f"{quota.used} of {quota.limit} bytes are in use")

    def is_tight(self, key: str) -> bool:
        """Whether there is not much room for that file."""
        return any(quota.tight for quota in self._over(key))

    def room(self, key: str) -> Room | None:
        """What there is for the folder or file of that key; None: no quota counts it."""
        over = list(self._over(key))
        if not over:
            return None
        return Room(over[-1].limit, over[-1].free, min(quota.free for quota in over))

    # ---- counting ----

    def roots(self) -> list[str]:
        """The prefixes to go through so that every quota is counted, each key once."""
        return [prefix for prefix in self._quotas if next(self._over(prefix)).prefix == prefix]

    def begin(self, root: str, known: Mapping[str, int]) -> Count:
        """Count what is below `root`; see `Count`. One at a time."""
        inside = [prefix for prefix in self._quotas if prefix.startswith(root)]
        self._count = Count(root, {key: size for key, size in known.items() if key.startswith(root)}, inside)
        return self._count

    def end(self, count: Count) -> None:
        """`count` has seen all keys."""
        assert count is self._count
        self._count = None
        for prefix, size in count.end().items():
            if (quota := self._quotas.get(prefix)) is not None:
                quota.used, quota.counted = max(0, size), True

    def give_up(self) -> None:
        """The count that was begun cannot be ended: what was known stays."""
        self._count = None


def _folders(key: str) -> Iterator[str]:
    """The prefixes of all folders above `key`, itself included if it is one, from the bucket down."""
    yield ""
    at = key.find("/")
    while at >= 0:
        yield key[: at + 1]
        at = key.find("/", at + 1)

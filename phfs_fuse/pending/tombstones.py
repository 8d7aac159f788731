"""Keys that are deleted here and maybe still in the store. Owns that set; no I/O, no await.

What a listing or a HEAD says of the version that was deleted is not true any more, nor is anything that was asked
for before. What another client stores there later is no part of that. A directory key (`d/`) is here as long as keys
below it wait for deletion; it may need no request of its own. It hides the prefix `d/` if nothing below is another's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

from phfs_fuse.errors import PhfsError
from phfs_fuse.types import ETag, ObjectKey

DONE_MAX = 100_000  # keys that are known to have been deleted; more where answers may still tell of them
DONE_STEP = 1000


@dataclass(slots=True, eq=False)
class Tombstone:
    """`etag` is the version that was seen and deleted, at change number `seq`; `request` whether the store has to be
    asked at all; `hid` whether it kept something from being shown that may be another's: to be asked for again."""

    key: ObjectKey
    etag: ETag | None
    request: bool
    due: float
    seq: int = 0
    hid: bool = False
    error: PhfsError | None = None  # why the last request failed


def ancestors(key: str) -> Iterator[str]:
    """The keys of the folders that `key` lies in, the innermost first."""
    at = key.rstrip("/").rfind("/")
    while at >= 0:
        yield key[: at + 1]
        at = key.rfind("/", 0, at)


class Tombstones:
    def __init__(self, oldest_seq: Callable[[], float]) -> None:
        """`oldest_seq` says of which change on all answers know that are still to come."""
        self._oldest_seq = oldest_seq
        self._gone: dict[ObjectKey, Tombstone] = {}
        self._below: Counter[str] = Counter()
        self._done: dict[str, int] = {}  # key -> change number when the delete ended, in this order
        self._done_max = DONE_MAX

    def __len__(self) -> int:
        return len(self._gone)

    def __contains__(self, key: str) -> bool:
        return key in self._gone

    def get(self, key: str) -> Tombstone | None:
        return self._gone.get(ObjectKey(key))

    def all(self) -> list[Tombstone]:
        return list(self._gone.values())

    def add(self, gone: Tombstone) -> None:
        if gone.key not in self._gone:
            self._below.update(ancestors(gone.key))
        self._gone[gone.key] = gone

    def take(self, key: ObjectKey, seq: int) -> Tombstone | None:
        """Remove an entry: the key was deleted (or is in use again). Older answers than `seq` do not count."""
        if (gone := self.forget(key)) is None:
            return None
        self._done.pop(key, None)
        self._done[key] = seq
        if len(self._done) > self._done_max:
            self._let_go_of_done()
        return gone

    def forget(self, key: ObjectKey) -> Tombstone | None:
        """Remove an entry as if it had never been there."""
        if (gone := self._gone.pop(key, None)) is None:
            return None
        for ancestor in ancestors(key):
            if self._below[ancestor] <= 1:
                del self._below[ancestor]
            else:
                self._below[ancestor] -= 1
        return gone

    def _let_go_of_done(self) -> None:
        oldest = self._oldest_seq()
        for key in list(islice(self._done, len(self._done) - DONE_MAX)):
            if self._done[key] > oldest:
                break
            del self._done[key]
        self._done_max = len(self._done) + DONE_STEP

    def hides(self, key: str, etag: ETag, asked_seq: int) -> bool:
        """Whether an answer that `key` has version `etag`, asked for at change number `asked_seq`, speaks of what is
        deleted."""
        if (gone := self._gone.get(ObjectKey(key))) is None:
            return self._done.get(key, -1) > asked_seq
        return gone.etag in (None, etag) or asked_seq < gone.seq

    def outdates(self, key: str, asked_seq: int) -> bool:
        """Whether `key` is being deleted, or has been since change number `asked_seq`."""
        return key in self._gone or self._done.get(key, -1) > asked_seq

    def was_deleted(self, key: str) -> bool:
        """Whether `key` is, or was not long ago, deleted here."""
        return key in self._gone or key in self._done

    def waits_below(self, directory_key: str) -> bool:
        """Whether keys under that prefix still wait for their deletion."""
        return directory_key in self._below

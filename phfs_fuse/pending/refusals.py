"""Changes that the store has refused for good, as far as they were undone: deletions and renames. Owns them and their
journal rows. No I/O but the journal's, and no await.

A refused upload stays with its dirty file (`dirty.refusal`), which is tried again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

from phfs_fuse import metrics
from phfs_fuse.state.journal import Journal
from phfs_fuse.state.refusal import Refusal
from phfs_fuse.types import ObjectKey

log = logging.getLogger(__name__)

LISTED_MAX: Final = 1000  # of those that are over; of more, the oldest are in the log only


class Refusals:
    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._over: dict[ObjectKey, Refusal] = {}
        self._untold: dict[ObjectKey, Refusal] = {}  # of these, what no sync has failed with yet

    def recover(self) -> list[Refusal]:
        """Take up those that an earlier process left in the journal; returns those that are not over."""
        found = self._journal.refusals()
        self._over = {refusal.key: refusal for refusal in found if refusal.operation.is_over}
        self._untold = dict(self._over)
        return [refusal for refusal in found if not refusal.operation.is_over]

    def note(self, refusal: Refusal) -> None:
        """It has just been refused."""
        metrics.REFUSED.add(1, refusal.operation.value)
        log.error("refused by the store: %s", refusal.line)
        if refusal.operation.is_over:
            self.forget(refusal.key)
            self._keep(refusal.key)
            self._over[refusal.key] = self._untold[refusal.key] = refusal
        self._journal.put_refusal(refusal)
        while len(self._over) > LISTED_MAX:
            self.forget(next(iter(self._over)))

    def forget(self, key: ObjectKey) -> None:
        """The key has been deleted after all, or has other content."""
        if key not in self._over:
            return
        self._keep(key)
        self._untold.pop(key, None)
        self._journal.drop_refusal(self._over.pop(key))

    def _keep(self, key: ObjectKey) -> None:
        for refusals in (self._over, self._untold):
            self._journal.transaction.item(refusals, key)

    def accepted(self, refusal: Refusal) -> None:
        """What had been refused is in the store, or is not wanted any more."""
        self._journal.drop_refusal(refusal)

    def over(self) -> list[Refusal]:
        return list(self._over.values())

    def tell(self, is_meant: Callable[[str], bool]) -> Refusal | None:
        """One of those for whose keys `is_meant` holds and of which nobody was told; nobody is told of them again."""
        told = [refusal for key, refusal in self._untold.items() if is_meant(key)]
        for refusal in told:
            del self._untold[refusal.key]
        return told[0] if told else None

    def end(self) -> None:
        """The mount has ended, and its user was told of all."""
        for key in list(self._over):
            self.forget(key)

"""A change under way: the steps that undo it, and what follows once it is in the journal. No I/O, no await.

The tree, and all that hangs on it, is changed within a transaction of the journal (`Database.batch`). Should anything
fail before that is committed, a row or the code between two of them, both are as they were: whoever changes something
says beforehand how to undo it. What cannot be undone, or must not be seen before, is put off until after the commit.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, MutableMapping
from functools import partial
from typing import Any, Protocol

log = logging.getLogger(__name__)

_ABSENT: Any = object()


class Kept(Protocol):
    """Something that can be brought back to where it is now."""

    def memento(self) -> Callable[[], None]:
        """The call that does it."""


class Transaction:
    """One at a time, on one thread. While none is open each step is taken for done at once."""

    __slots__ = ("_after", "_kept", "_undo", "is_open")

    def __init__(self) -> None:
        self.is_open = False
        self._undo: list[Callable[[], object]] = []
        self._after: list[Callable[[], object]] = []
        self._kept: set[Kept] = set()

    def begin(self) -> None:
        self.is_open = True

    def undo(self, step: Callable[[], object]) -> None:
        """Call `step` if the transaction fails; the last one first."""
        if self.is_open:
            self._undo.append(step)

    def keep(self, thing: Kept) -> None:
        """`thing` is about to change. Costs nothing if it was kept before."""
        if self.is_open and thing not in self._kept:
            self._kept.add(thing)
            self._undo.append(thing.memento())

    def made(self, thing: Kept) -> None:
        """`thing` is new: should the transaction fail, nobody knows it."""
        if self.is_open:
            self._kept.add(thing)

    def item(self, mapping: MutableMapping[Any, Any], key: object) -> None:
        """What `mapping` has for `key`, or that it has nothing, is about to change."""
        if self.is_open:
            self._undo.append(partial(_put_back, mapping, key, mapping.get(key, _ABSENT)))

    def after(self, call: Callable[[], object]) -> None:
        """Call it once the transaction is committed; now, if there is none."""
        if self.is_open:
            self._after.append(call)
        else:
            call()

    def commit(self) -> None:
        """It is in the journal: what was put off is done. A failure of that is not one of the change."""
        self._close()
        calls, self._after = self._after, []
        for call in calls:
            _surely(call)

    def roll_back(self) -> None:
        """It has failed: all is as it was."""
        steps = self._undo
        self._close()
        self._after = []
        for step in reversed(steps):
            _surely(step)

    def _close(self) -> None:
        self.is_open = False
        self._undo = []
        self._kept.clear()


def _put_back(mapping: MutableMapping[Any, Any], key: object, value: object) -> None:
    if value is _ABSENT:
        mapping.pop(key, None)
    else:
        mapping[key] = value


def _surely(call: Callable[[], object]) -> None:
    """The others must not be left out because one fails."""
    try:
        call()
    except Exception:
        log.exception("%r failed at the end of a change", call)

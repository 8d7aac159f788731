"""State machine of a dirty file. Pure: no I/O and no await, each call is one atomic step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from math import inf
from operator import attrgetter
from typing import Final

from phfs_fuse.errors import PhfsError
from phfs_fuse.state.refusal import Refusal
from phfs_fuse.types import ETag, ObjectKey


class State(Enum):
    CLEAN = auto()  # the store has what we have
    DIRTY = auto()  # something exists only here
    UPLOADING = auto()  # a snapshot is on its way
    REDIRTIED = auto()  # and something has changed since it was taken


class Event(Enum):
    CHANGE = auto()  # bytes, attributes or the name changed
    UPLOAD = auto()  # a snapshot was taken
    STORED = auto()  # the store has the snapshot
    FAILED = auto()  # it has not, or not under this name


_S, _E = State, Event
NEXT: Final[Mapping[tuple[State, Event], State]] = {  # a pair that is not here is a bug
    (_S.CLEAN, _E.CHANGE): _S.DIRTY,
    (_S.DIRTY, _E.CHANGE): _S.DIRTY,
    (_S.DIRTY, _E.UPLOAD): _S.UPLOADING,
    (_S.UPLOADING, _E.CHANGE): _S.REDIRTIED,
    (_S.REDIRTIED, _E.CHANGE): _S.REDIRTIED,
    (_S.UPLOADING, _E.STORED): _S.CLEAN,
    (_S.REDIRTIED, _E.STORED): _S.DIRTY,
    (_S.UPLOADING, _E.FAILED): _S.DIRTY,
    (_S.REDIRTIED, _E.FAILED): _S.DIRTY,
}


@dataclass(slots=True)
class DirtyFile:
    """What has to reach the store for one file, and how far that is. No I/O, no await.

    `over` is the version that the store has under the file's key as far as we have seen it: the only one that an
    upload may replace (None: nothing is there). `changes` and `stored` are generations: what was changed by
    generation n is in the store once `stored >= n`.
    """

    over: ETag | None
    since: float  # clock of the scheduler, of the oldest change that is not stored
    state: State = State.CLEAN
    attrs: bool = False  # attributes changed
    asked: bool = False  # attributes were changed by a program, as far as this process knows
    sent_attrs: bool = False  # and are in the snapshot under way
    changes: int = 0
    stored: int = 0
    snapshot: int = 0  # `changes` when the snapshot under way was taken
    due: float = 0.0  # when to upload
    queued: float = inf  # when the queue looks at it next
    attempts: int = 0  # failed in a row
    error: PhfsError | None = None  # the last failure, until it was reported to somebody
    refusal: Refusal | None = None  # the store has refused it for good, for all that is known
    target: ObjectKey | None = None  # the key that the snapshot under way goes to

    def memento(self) -> Callable[[], None]:
        """A call that brings all fields back to what they are now."""
        values = _FIELDS(self)

        def bring_back() -> None:
            for name, value in zip(DirtyFile.__slots__, values, strict=True):
                setattr(self, name, value)

        return bring_back

    def on(self, event: Event) -> None:
        self.state = NEXT[self.state, event]
        if event is Event.CHANGE:
            self.changes += 1
        elif event is Event.UPLOAD:
            self.snapshot = self.changes
        elif event is Event.STORED:
            self.stored = max(self.stored, self.snapshot)
            self.attempts, self.error = 0, None
        elif event is Event.FAILED:
            self.attempts += 1

    @property
    def uploading(self) -> bool:
        return self.state in (State.UPLOADING, State.REDIRTIED)


_FIELDS: Final = attrgetter(*DirtyFile.__slots__)

from __future__ import annotations

import pytest

from phfs_fuse.tree.dirty import NEXT, DirtyFile, Event, State


@pytest.mark.parametrize(
    ("events", "state", "is_stored"),
    [
        ([Event.CHANGE], State.DIRTY, False),
        ([Event.CHANGE, Event.UPLOAD, Event.STORED], State.CLEAN, True),
        ([Event.CHANGE, Event.UPLOAD, Event.CHANGE, Event.STORED], State.DIRTY, False),
        ([Event.CHANGE, Event.UPLOAD, Event.FAILED], State.DIRTY, False),
        ([Event.CHANGE, Event.UPLOAD, Event.FAILED, Event.UPLOAD, Event.STORED], State.CLEAN, True),
    ],
)
def test_ways_through(events: list[Event], state: State, is_stored: bool) -> None:
    dirty = DirtyFile(over=None, since=0.0)
    for event in events:
        dirty.on(event)
    assert dirty.state is state
    assert (dirty.stored == dirty.changes) is is_stored


def test_every_state_can_be_left() -> None:
    assert {state for state, _ in NEXT} == set(State)


def test_an_event_that_makes_no_sense_is_a_bug() -> None:
    with pytest.raises(KeyError):
        DirtyFile(over=None, since=0.0).on(Event.STORED)

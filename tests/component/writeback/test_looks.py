"""`CopyTargets`: where copies go to is seen for many at once, and for the next ones while copies go on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf
from typing import cast

import pytest
import trio
from trio.testing import MockClock

from phfs_fuse.errors import PhfsError, StoreUnavailable
from phfs_fuse.store.base import LOOK_SECONDS, Expect, ObjectStore
from phfs_fuse.types import ETag, ObjectKey
from phfs_fuse.writeback.uploader import LOOKS_MAX, LOOKS_MIN, CopyTargets

ABSENT = Expect(None)
KEYS = [ObjectKey(f"new/{number:04}") for number in range(3 * LOOKS_MAX)]


class SeenStore:
    """Answers `look` after some time."""

    def __init__(self) -> None:
        self.there: dict[ObjectKey, ETag] = {}
        self.looks: list[set[ObjectKey]] = []
        self.error: PhfsError | None = None

    async def look(self, keys: Sequence[ObjectKey]) -> Mapping[ObjectKey, ETag]:
        self.looks.append(set(keys))
        await trio.sleep(LOOK_SECONDS / 100)
        if self.error is not None:
            raise self.error
        return {key: etag for key, etag in self.there.items() if key in keys}


@pytest.fixture
def store() -> SeenStore:
    return SeenStore()


def looks(store: SeenStore, upcoming: Sequence[ObjectKey] = ()) -> CopyTargets:
    return CopyTargets(cast(ObjectStore, store), lambda: iter(upcoming))


async def test_many_that_begin_are_looked_at_together(store: SeenStore, autojump_clock: MockClock) -> None:
    seen, begun = looks(store), KEYS[:20]
    for key in begun:
        seen.announce(key)
    at = trio.current_time()
    answers: list[float] = []

    async def ask(key: ObjectKey) -> None:
        answers.append(await seen.seen_at(key, ABSENT))

    async with trio.open_nursery() as nursery:
        for key in begun:
            nursery.start_soon(ask, key)
    assert answers == [at] * 20
    assert store.looks == [set(begun)]


async def test_a_few_are_not_worth_a_look(store: SeenStore, autojump_clock: MockClock) -> None:
    seen = looks(store, KEYS[: LOOKS_MIN - 1])
    assert await seen.seen_at(KEYS[0], ABSENT) == -inf
    assert await looks(store, KEYS).seen_at(KEYS[0], None) == -inf
    assert not store.looks


async def test_a_look_that_fails_fails_no_copy(store: SeenStore, autojump_clock: MockClock) -> None:
    store.error = StoreUnavailable("head", KEYS[5], "HTTP 503")
    seen = looks(store, KEYS[:20])
    assert await seen.seen_at(KEYS[0], ABSENT) == -inf
    store.error = None
    assert await seen.seen_at(KEYS[0], ABSENT) > -inf


@pytest.mark.parametrize(("there", "expected"), [(None, "v1"), ("v1", None), ("v1", "v2")])
async def test_what_is_not_as_expected_has_not_been_seen(
    store: SeenStore, autojump_clock: MockClock, there: str | None, expected: str | None
) -> None:
    if there is not None:
        store.there[KEYS[0]] = ETag(there)
    expect = Expect(None if expected is None else ETag(expected))
    assert await looks(store, KEYS[:LOOKS_MIN]).seen_at(KEYS[0], expect) == -inf
    assert len(store.looks) == 1


async def test_a_look_is_good_for_one_copy_and_not_for_long(store: SeenStore, autojump_clock: MockClock) -> None:
    seen = looks(store, KEYS[: 2 * LOOKS_MIN])
    assert await seen.seen_at(KEYS[0], ABSENT) == 0
    assert await seen.seen_at(KEYS[0], ABSENT) == -inf
    assert await seen.seen_at(KEYS[1], ABSENT) == 0
    assert len(store.looks) == 1
    await trio.sleep(LOOK_SECONDS)
    at = trio.current_time()
    assert await seen.seen_at(KEYS[2], ABSENT) == at


async def test_the_next_ones_are_looked_at_while_copies_go_on(store: SeenStore, autojump_clock: MockClock) -> None:
    waiting = list(KEYS)
    seen = CopyTargets(cast(ObjectStore, store), lambda: iter(waiting))
    at_once = []

    async def copies() -> None:
        while waiting:
            key = waiting.pop(0)
            seen.announce(key)
            began = trio.current_time()
            assert await seen.seen_at(key, ABSENT) > -inf
            at_once.append(trio.current_time() == began)
            await trio.sleep(LOOK_SECONDS / 400)

    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(copies)
    assert len(at_once) == len(KEYS)
    assert at_once.count(False) <= 4 + len(store.looks)  # all wait for the first, then only who looks ahead
    assert len(store.looks) <= 2 * len(KEYS) // LOOKS_MAX

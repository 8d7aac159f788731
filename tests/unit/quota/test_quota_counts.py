"""Limits and counts of quotas: who counts what, what is refused, and a count while the tree changes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phfs_fuse.errors import QuotaExceeded
from phfs_fuse.quota.limits import TIGHT_BYTES, Quotas, Room


def quotas(**limits: int) -> Quotas:
    """By prefix, with `_` for `/`."""
    made = Quotas()
    made.limit({prefix.replace("_", "/"): limit for prefix, limit in limits.items()})
    return made


def test_without_quotas_nothing_is_counted() -> None:
    none = Quotas()
    none.changed("f", 0, 100)
    none.foreign("f", None, 100)
    none.require("f", 1 << 60)
    assert (bool(none), none.room("f"), none.outdated, none.roots()) == (False, None, False, [])


@pytest.mark.parametrize(
    ("key", "outer", "inner"),
    [
        ("groups/a/f", 10, 10),
        ("groups/a/sub/f", 10, 10),
        ("groups/ab/f", 10, 0),
        ("groups/a", 10, 0),
        ("other/f", 0, 0),
    ],
)
def test_nested_quotas_both_count(key: str, outer: int, inner: int) -> None:
    nested = quotas(groups_=100, groups_a_=50)
    nested.changed(key, 0, 10)
    assert nested.used() == {"groups/": outer, "groups/a/": inner}


def test_the_quota_of_the_bucket_has_no_prefix() -> None:
    whole = Quotas()
    whole.limit({"": 100})
    whole.changed("a/b/c", 0, 60)
    whole.changed("d", 0, 30)
    assert whole.room("d") == whole.room("") == Room(100, 10, 10)


@pytest.mark.parametrize(
    ("used", "growth", "refused"),
    [(0, 100, False), (0, 101, True), (100, 1, True), (100, 0, False), (150, -1, False), (150, 0, False)],
)
def test_what_is_too_much_is_refused(used: int, growth: int, refused: bool) -> None:
    one = quotas(a_=100)
    one.changed("a/f", 0, used)
    if refused:
        with pytest.raises(QuotaExceeded, match=f"a/: {used} of 100 bytes are in use"):
            one.require("a/f", growth)
    else:
        one.require("a/f", growth)
    assert [quota.refused for quota in one] == [refused]


def test_the_outer_quota_refuses_too_and_limits_what_is_available() -> None:
    nested = quotas(g_=100, g_a_=500)
    nested.changed("g/b/f", 0, 90)
    assert nested.room("g/a/f") == Room(500, 500, 10)
    assert nested.room("g/") == Room(100, 10, 10)
    with pytest.raises(QuotaExceeded):
        nested.require("g/a/f", 11)
    nested.require("g/a/f", 10)


@pytest.mark.parametrize(
    ("moves", "refused"),
    [
        ([("a/f", "a/g", 60)], False),  # within one, though it is nearly full
        ([("a/f", "b/f", 60)], True),
        ([("a/f", "b/f", 60), ("b/f", None, 60)], False),  # what is replaced makes room
        ([("x/f", "b/f", 5), ("x/g", "b/g", 5)], False),
        ([("x/f", "b/f", 5), ("x/g", "b/g", 6)], True),  # one by one each would fit
        ([("b/f", "x/f", 90)], False),
    ],
)
def test_moves_count_together(moves: list[tuple[str, str | None, int]], refused: bool) -> None:
    two = quotas(a_=100, b_=100)
    two.changed("a/f", 0, 95)
    two.changed("b/f", 0, 90)
    if refused:
        with pytest.raises(QuotaExceeded):
            two.require_moves(moves)
    else:
        two.require_moves(moves)


def test_a_limit_that_is_lowered_refuses_and_one_that_is_taken_away_does_not() -> None:
    one = quotas(a_=100)
    one.changed("a/f", 0, 80)
    one.limit({"a/": 50})
    assert one.room("a/f") == Room(50, 0, 0)
    with pytest.raises(QuotaExceeded):
        one.require("a/f", 1)
    one.limit({})
    one.require("a/f", 1)


def test_only_a_new_quota_wants_a_count_and_starts_from_what_was_known() -> None:
    one = Quotas()
    one.limit({"a/": 100}, {"a/": 70, "b/": 5})
    assert (one.used(), one.outdated) == ({"a/": 70}, True)
    one.outdated = False
    one.limit({"a/": 200}, {"a/": 1})
    assert (one.used(), one.outdated) == ({"a/": 70}, False)


@pytest.mark.parametrize(
    ("limit", "used", "tight"),
    [
        (TIGHT_BYTES - 1, 0, True),
        (10 * TIGHT_BYTES, 0, False),
        (10 * TIGHT_BYTES, 9 * TIGHT_BYTES + 1, True),
        (100 * TIGHT_BYTES, 94 * TIGHT_BYTES, False),
        (100 * TIGHT_BYTES, 96 * TIGHT_BYTES, True),
    ],
)
def test_tight_is_little_or_a_twentieth(limit: int, used: int, tight: bool) -> None:
    one = quotas(a_=limit)
    one.changed("a/f", 0, used)
    assert one.is_tight("a/f") is tight
    assert one.is_tight("b/f") is False


def test_what_others_do_is_counted_and_what_was_there_before_counts() -> None:
    one = quotas(a_=100)
    one.outdated = False
    one.foreign("a/f", 0, 30)
    one.foreign("a/f", 30, 20)
    assert (one.used(), one.outdated) == ({"a/": 20}, False)
    one.foreign("a/g", None, 5)
    assert one.outdated


def test_what_others_do_during_a_count_is_counted_again() -> None:
    one = quotas(a_=100)
    one.outdated = False
    count = one.begin("a/", {})
    count.listed([("a/f", 10)])
    one.foreign("a/f", 5, 10)  # the listing may have been before it, or not
    one.end(count)
    assert (one.used(), one.outdated) == ({"a/": 10}, True)


def test_each_key_is_gone_through_once() -> None:
    many = quotas(a_=1, a_b_=1, a_b_c_=1, d_=1)
    assert many.roots() == ["a/", "d/"]
    many.limit({"": 1, "a/": 1})
    assert many.roots() == [""]


def test_a_count_replaces_what_was_known_and_one_given_up_does_not() -> None:
    nested = quotas(a_=100, a_b_=100)
    nested.changed("a/x", 0, 99)
    count = nested.begin("a/", {})
    count.listed([("a/b/f", 10), ("a/c", 5)])
    nested.give_up()
    assert nested.used() == {"a/": 99, "a/b/": 0}
    count = nested.begin("a/", {"a/b/dirty": 7, "a/c": 0, "elsewhere": 50})
    count.listed([("a/b/f", 10), ("a/c", 5)])
    nested.end(count)
    assert nested.used() == {"a/": 17, "a/b/": 17}
    assert all(quota.counted for quota in nested)


def test_a_quota_that_comes_during_a_count_waits_for_the_next() -> None:
    one = quotas(a_=100)
    count = one.begin("a/", {})
    one.limit({"a/": 100, "a/b/": 100})
    count.listed([("a/b/f", 10)])
    one.end(count)
    assert [(quota.prefix, quota.used, quota.counted) for quota in one] == [("a/", 10, True), ("a/b/", 0, False)]
    assert one.outdated


KEYS = [f"g/{folder}/{name}" for folder in "ab" for name in "xyz"]
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("set"), st.sampled_from(KEYS), st.integers(0, 50)),
        st.tuples(st.just("upload"), st.sampled_from(KEYS), st.just(0)),
        st.tuples(st.just("page"), st.just(""), st.integers(1, 3)),
    ),
    max_size=40,
)


@given(stored=st.dictionaries(st.sampled_from(KEYS), st.integers(1, 50)), before=STEPS, during=STEPS)
def test_a_count_is_right_however_the_tree_changes_meanwhile(
    stored: dict[str, int], before: Any, during: Any
) -> None:
    """Sizes are set here first and reach the store with `upload`; pages show what the store has at their time."""
    all_quotas = quotas(g_=1 << 40, g_a_=1 << 40)
    shown, store = dict(stored), dict(stored)
    count, upto = None, ""

    def step(kind: str, key: str, number: int) -> None:
        nonlocal upto
        if kind == "set":
            all_quotas.changed(key, shown.get(key, 0), number)
            shown[key] = number
        elif kind == "upload":
            store[key] = shown.get(key, 0)
        elif count is not None:
            page = sorted(k for k, size in store.items() if k > upto and size)[:number]
            count.listed([(k, store[k]) for k in page])
            upto = page[-1] if page else upto

    for one in before:
        step(*one)
    dirty = {key: size for key, size in shown.items() if store.get(key, 0) != size}
    count = all_quotas.begin("g/", dirty)
    for one in during:
        step(*one)
    step("page", "", len(KEYS))
    all_quotas.end(count)
    assert all_quotas.used() == {
        "g/": sum(shown.values()),
        "g/a/": sum(size for key, size in shown.items() if key.startswith("g/a/")),
    }

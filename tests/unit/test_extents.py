from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phfs_fuse.extents import Extents, PartPlan, plan_parts, split
from phfs_fuse.types import (
    COPY_PART_BYTES,
    GIB,
    KIB,
    MIB,
    S3_OBJECT_BYTES_MAX,
    S3_PART_BYTES_MAX,
    S3_PART_BYTES_MIN,
    S3_PARTS_MAX,
)

SPAN = 64
POSITIONS = st.integers(0, SPAN)
CHANGES = st.lists(st.tuples(st.sampled_from(["add", "remove", "clip"]), POSITIONS, POSITIONS), max_size=30)


def changed(steps: list[tuple[str, int, int]]) -> tuple[Extents, bytearray]:
    """The same changes made to an `Extents` and to one byte per position."""
    extents, model = Extents(), bytearray(SPAN)
    for op, start, end in steps:
        if op == "clip":
            extents.clip(start)
            model[start:] = bytes(SPAN - start)
        else:
            getattr(extents, op)(start, end)
            model[start:end] = (b"\1" if op == "add" else b"\0") * max(0, end - start)
            del model[SPAN:]
    return extents, model


def ranges(model: bytearray, value: int, start: int = 0, end: int = SPAN) -> list[tuple[int, int]]:
    """The longest runs of `value` within [start, end)."""
    edges = [
        i for i in range(start, end + 1) if (i < end and model[i] == value) != (i > start and model[i - 1] == value)
    ]
    return list(zip(edges[::2], edges[1::2], strict=True))


@given(CHANGES)
def test_a_set_of_ranges_is_a_set_of_bytes(steps: list[tuple[str, int, int]]) -> None:
    extents, model = changed(steps)
    assert list(extents) == ranges(model, 1)
    assert len(extents) == len(ranges(model, 1))
    assert extents.total_bytes == sum(model)
    assert extents.end == model.rfind(1) + 1


@given(CHANGES, POSITIONS, POSITIONS)
def test_queries_agree_with_the_bytes(steps: list[tuple[str, int, int]], start: int, end: int) -> None:
    extents, model = changed(steps)
    assert extents.covers(start, end) == all(model[start:end])
    assert extents.overlap(start, end) == ranges(model, 1, start, end)
    assert extents.gaps(start, end) == ranges(model, 0, start, end)


@given(CHANGES, POSITIONS, POSITIONS)
def test_a_copy_is_on_its_own(steps: list[tuple[str, int, int]], start: int, end: int) -> None:
    extents, model = changed(steps)
    twin = extents.copy()
    assert twin == extents
    twin.add(start, end)
    twin.remove(end, start)
    assert list(extents) == ranges(model, 1)


def test_made_from_ranges_in_any_order_and_cleared() -> None:
    extents = Extents([(4, 8), (0, 4), (10, 12)])
    assert repr(extents) == "Extents([(0, 8), (10, 12)])"
    assert extents != [(0, 8), (10, 12)]
    extents.clear()
    assert (list(extents), extents.total_bytes, extents.end) == ([], 0, 0)


@pytest.mark.parametrize(
    ("start", "end", "pieces"),
    [
        (0, 0, []),
        (5, 3, []),
        (0, 4, [(0, 4)]),
        (1, 9, [(1, 4), (4, 8), (8, 9)]),
        (4, 8, [(4, 8)]),
    ],
)
def test_split_cuts_at_multiples(start: int, end: int, pieces: list[tuple[int, int]]) -> None:
    assert list(split(start, end, 4)) == pieces


def check(plans: list[PartPlan], size: int, dirty: Extents, base_bytes: int) -> None:
    """What the store asks of a multipart upload, and that only unchanged bytes are copied."""
    assert len(plans) <= S3_PARTS_MAX
    assert [plan.start for plan in plans] == [0, *(plan.end for plan in plans)][: len(plans)]
    assert (plans[-1].end if plans else 0) == size
    assert all(plan.length >= S3_PART_BYTES_MIN for plan in plans[:-1])
    assert all(0 < plan.length <= S3_PART_BYTES_MAX for plan in plans)
    for plan in plans:
        if plan.is_copy:
            assert plan.end <= base_bytes
            assert not dirty.overlap(plan.start, plan.end)


def uploaded(plans: list[PartPlan]) -> int:
    return sum(plan.length for plan in plans if not plan.is_copy)


QUARTERS = st.integers(0, 400).map(lambda n: n * MIB // 4)


@given(
    size=QUARTERS,
    base=QUARTERS,
    dirty=st.lists(st.tuples(QUARTERS, st.integers(1, 3 * MIB)), max_size=8),
    part=st.integers(5, 20).map(lambda n: n * MIB),
    copy_max=st.integers(5, 64).map(lambda n: n * MIB),
)
def test_parts_are_legal_and_cheap(
    size: int, base: int, dirty: list[tuple[int, int]], part: int, copy_max: int
) -> None:
    extents = Extents((start, start + length) for start, length in dirty)
    plans = plan_parts(size, extents, base, part, copy_max)
    check(plans, size, extents, base)
    assert all(plan.length <= (copy_max if plan.is_copy else part) + S3_PART_BYTES_MIN for plan in plans)
    changed_bytes = Extents([*extents, (base, max(base, size))])
    changed_bytes.clip(size)
    if base > S3_PART_BYTES_MIN:  # at most 10 MiB of unchanged bytes go along with each changed range
        assert uploaded(plans) <= changed_bytes.total_bytes + len(changed_bytes) * 2 * S3_PART_BYTES_MIN


@pytest.mark.parametrize("at", [0, 4 * KIB, 3 * MIB, 8 * MIB - 2 * KIB, 300 * MIB, 512 * MIB - 4 * KIB])
def test_a_small_change_in_a_big_object_uploads_one_small_part(at: int) -> None:
    plans = plan_parts(512 * MIB, Extents([(at, at + 4 * KIB)]), 512 * MIB, 8 * MIB)
    check(plans, 512 * MIB, Extents([(at, at + 4 * KIB)]), 512 * MIB)
    assert uploaded(plans) <= 8 * MIB
    assert len(plans) <= 1 + 512 * MIB // COPY_PART_BYTES + 1


@pytest.mark.parametrize(
    ("base", "cuts"),
    [
        (128 * MIB, [0, 64 * MIB, 128 * MIB]),
        (130 * MIB + 1, [0, 64 * MIB, 130 * MIB + 1]),
        (5 * MIB + 1, [0, 5 * MIB + 1]),
    ],
)
def test_an_append_uploads_what_was_appended(base: int, cuts: list[int]) -> None:
    size = base + 4 * KIB
    plans = plan_parts(size, Extents([(base, size)]), base, 8 * MIB)
    copies = [PartPlan(start, end, True) for start, end in pairwise(cuts)]
    assert plans == [*copies, PartPlan(base, size, False)]


def test_a_truncated_object_is_only_copied() -> None:
    plans = plan_parts(100 * MIB + 1, Extents(), 512 * MIB, 8 * MIB)
    assert plans == [PartPlan(0, 64 * MIB, True), PartPlan(64 * MIB, 100 * MIB + 1, True)]


def test_a_base_too_small_for_ranged_copies_is_uploaded() -> None:
    plans = plan_parts(20 * MIB, Extents([(5 * MIB, 20 * MIB)]), 5 * MIB, 8 * MIB)
    assert uploaded(plans) == 20 * MIB


def test_a_new_object_is_uploaded_in_parts() -> None:
    plans = plan_parts(20 * MIB, Extents([(0, 20 * MIB)]), 0, 8 * MIB)
    assert plans == [
        PartPlan(0, 8 * MIB, False),
        PartPlan(8 * MIB, 16 * MIB, False),
        PartPlan(16 * MIB, 20 * MIB, False),
    ]


def test_nothing_has_no_parts() -> None:
    assert plan_parts(0, Extents([(0, 5)]), 100, 8 * MIB) == []


def test_copies_grow_when_they_would_be_too_many() -> None:
    size = (5 << 40) - 1
    plans = plan_parts(size + 1, Extents([(size, size + 1)]), size, 8 * MIB)
    check(plans, size + 1, Extents([(size, size + 1)]), size)
    assert uploaded(plans) == 1
    assert max(plan.length for plan in plans) <= 2 * size // S3_PARTS_MAX + S3_PART_BYTES_MIN


@pytest.mark.parametrize("part", [5 * MIB, 8 * MIB, 5 * GIB])
def test_parts_grow_when_they_would_be_too_many(part: int) -> None:
    size = 5 << 40
    plans = plan_parts(size, Extents([(0, size)]), 0, part)
    check(plans, size, Extents([(0, size)]), 0)


@pytest.mark.parametrize("dirty", [Extents([(0, S3_OBJECT_BYTES_MAX)]), Extents([(7 * GIB, 7 * GIB + 1)])])
def test_the_largest_object_has_parts_of_one_length(dirty: Extents) -> None:
    size = S3_OBJECT_BYTES_MAX
    plans = plan_parts(size, dirty, size, 8 * MIB)
    check(plans, size, dirty, size)
    assert {plan.length for plan in plans} == {5 * GIB}


def test_changes_all_over_a_huge_object_stay_within_the_part_count() -> None:
    size, step = 200 * GIB, 10 * MIB
    dirty = Extents((at, at + 1) for at in range(0, size, step))
    plans = plan_parts(size, dirty, size, 8 * MIB)
    check(plans, size, dirty, size)


def test_neighbouring_ranges_coalesce_when_a_hole_is_filled() -> None:
    extents = Extents((at, at + 1) for at in range(0, 100, 2))
    assert len(extents) == 50
    extents.add(0, 100)
    assert list(extents) == [(0, 100)]
    assert all(a_end < b_start for (_, a_end), (b_start, _) in pairwise(extents))

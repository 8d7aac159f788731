from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phfs_fuse.cache.read_ahead import STREAMS_MAX, ReadAhead
from phfs_fuse.extents import Extent, Extents
from phfs_fuse.types import GIB, KIB, MIB

BLOCK = 128 * KIB


def make(size: int = GIB, window_max: int = 16 * MIB, requests_max: int = 8) -> ReadAhead:
    return ReadAhead(size, BLOCK, window_max, requests_max)


def follow(ahead: ReadAhead, reads: list[Extent]) -> list[Extent]:
    """The requests that a cache would make: what was asked for before is there."""
    asked, requests = Extents(), []
    for start, end in reads:
        for wanted in ahead.note(start, end):
            for gap in asked.gaps(*wanted):
                requests.append(gap)
                asked.add(*gap)
    return requests


def sequential(start: int, end: int, length: int) -> list[Extent]:
    return [(at, min(at + length, end)) for at in range(start, end, length)]


def test_the_first_read_asks_for_its_blocks_alone() -> None:
    assert make().note(5 * MIB + 10, 5 * MIB + BLOCK + 10) == [(5 * MIB, 5 * MIB + 2 * BLOCK)]


@pytest.mark.parametrize(("size", "asked"), [(4 * BLOCK, 4 * BLOCK), (4 * BLOCK + 1, BLOCK), (100, 100)])
def test_a_small_file_is_asked_for_at_once(size: int, asked: int) -> None:
    assert make(size).note(0, 4 * KIB) == [(0, asked)]


def test_the_window_doubles_up_to_the_limit() -> None:
    ahead = make()
    reads = sequential(0, 64 * MIB, BLOCK)
    beyond = []
    for start, end in reads:
        ahead.note(start, end)
        beyond.append(ahead.windows[0][1] - end)
    assert beyond[0] == 0
    assert max(beyond) == 16 * MIB
    assert min(beyond[len(reads) // 2 :]) >= 8 * MIB
    first_full = next(at for at, length in enumerate(beyond) if length >= 12 * MIB)
    assert first_full * BLOCK <= 8 * MIB


@pytest.mark.parametrize("length", [32 * KIB, BLOCK, MIB])
def test_a_sequential_read_is_few_big_requests(length: int) -> None:
    requests = follow(make(128 * MIB), sequential(0, 128 * MIB, length))
    assert sum(end - start for start, end in requests) == 128 * MIB
    assert len(requests) <= 45
    assert max(end - start for start, end in requests) == 4 * MIB


@pytest.mark.parametrize(("requests_max", "request_mib"), [(2, 8), (4, 4), (64, 4)])
def test_requests_share_the_window(requests_max: int, request_mib: int) -> None:
    requests = follow(make(requests_max=requests_max), sequential(0, 128 * MIB, MIB))
    assert max(end - start for start, end in requests) == request_mib * MIB


def test_a_small_window_stays_small() -> None:
    requests = follow(make(window_max=BLOCK), sequential(0, 8 * MIB, BLOCK))
    assert max(end - start for start, end in requests) <= 2 * BLOCK


def test_reordered_reads_are_sequential() -> None:
    reads = sequential(0, 128 * MIB, BLOCK)
    mixed = [read for at in range(0, len(reads), 4) for read in random.Random(at).sample(reads[at : at + 4], 4)]
    assert len(follow(make(), mixed)) <= len(follow(make(), reads)) * 2


def test_random_reads_ask_for_their_blocks_alone() -> None:
    source = random.Random(1)
    reads = [(at, at + 4 * KIB) for at in (source.randrange(GIB // 4096 - 1) * 4096 for _ in range(500))]
    requests = follow(make(), reads)
    assert all(end - start <= 2 * BLOCK for start, end in requests)
    assert len(requests) <= 500


def test_streams_side_by_side_keep_their_windows() -> None:
    bases = [at * 200 * MIB for at in range(STREAMS_MAX)]
    reads = [(base + at, base + at + BLOCK) for at in range(0, 32 * MIB, BLOCK) for base in bases]
    requests = follow(make(), reads)
    assert len(requests) <= STREAMS_MAX * 30


def test_one_stream_too_many_makes_room_for_itself() -> None:
    ahead = make()
    for at in range(STREAMS_MAX + 1):
        ahead.note(at * 100 * MIB, at * 100 * MIB + BLOCK)
    assert len(ahead.windows) == STREAMS_MAX


@given(
    size=st.integers(1, 40 * MIB),
    reads=st.lists(st.tuples(st.integers(0, 40 * MIB), st.integers(1, 2 * MIB)), max_size=60),
)
def test_answers_are_whole_blocks_that_cover_the_read(size: int, reads: list[tuple[int, int]]) -> None:
    ahead = make(size)
    for at, length in reads:
        start, end = at % size, min(at % size + length, size)
        wanted = ahead.note(start, end)
        assert wanted[0][0] <= start
        assert wanted[0][1] >= end
        for piece_start, piece_end in wanted:
            assert 0 <= piece_start < piece_end <= size
            assert piece_start % BLOCK == 0
            assert piece_end % BLOCK == 0 or piece_end == size
        assert all(a[1] <= b[0] for a, b in pairwise(wanted))

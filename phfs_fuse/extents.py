"""Half-open byte ranges [start, end): sets of them, their split by block and by part. Pure; owns no state.

All positions are bytes from the start of a file, never negative.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from phfs_fuse.types import COPY_PART_BYTES, S3_PART_BYTES_MAX, S3_PART_BYTES_MIN, S3_PARTS_MAX

Extent = tuple[int, int]


class Extents:
    """A set of bytes as sorted, disjoint ranges that do not touch each other.

    Adding at or after the end is O(1), everything else a bisection (plus the move of what lies behind).
    """

    __slots__ = ("_ends", "_starts", "_total_bytes")

    def __init__(self, ranges: Iterable[Extent] = ()) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._total_bytes = 0
        for start, end in ranges:
            self.add(start, end)

    def __len__(self) -> int:
        """The number of ranges."""
        return len(self._starts)

    def __iter__(self) -> Iterator[Extent]:
        return zip(self._starts, self._ends, strict=True)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Extents):
            return NotImplemented
        return self._starts == other._starts and self._ends == other._ends

    __hash__ = None  # type: ignore[assignment]  # mutable

    def __repr__(self) -> str:
        return f"Extents({list(self)})"

    @property
    def total_bytes(self) -> int:
        """How many bytes are in the set."""
        return self._total_bytes

    @property
    def end(self) -> int:
        """One past the last byte of the set; 0 if it is empty."""
        return self._ends[-1] if self._ends else 0

    def copy(self) -> Extents:
        twin = Extents()
        twin._starts, twin._ends, twin._total_bytes = self._starts[:], self._ends[:], self._total_bytes
        return twin

    def clear(self) -> None:
        self._starts.clear()
        self._ends.clear()
        self._total_bytes = 0

    def add(self, start: int, end: int) -> None:
        """Put [start, end) into the set."""
        if start >= end:
            return
        starts, ends = self._starts, self._ends
        if not ends or start > ends[-1]:
            starts.append(start)
            ends.append(end)
            self._total_bytes += end - start
        elif start >= starts[-1]:
            if end > ends[-1]:
                self._total_bytes += end - ends[-1]
                ends[-1] = end
        else:
            first, last = bisect_left(ends, start), bisect_right(starts, end)
            if first < last:  # ranges [first, last) overlap or touch: they become one
                start, end = min(start, starts[first]), max(end, ends[last - 1])
            self._replace(first, last, [(start, end)])

    def remove(self, start: int, end: int) -> None:
        """Take [start, end) out of the set."""
        if start >= end:
            return
        first, last = self._overlapping(start, end)
        if first >= last:
            return
        rest = [(self._starts[first], start), (end, self._ends[last - 1])]
        self._replace(first, last, [piece for piece in rest if piece[0] < piece[1]])

    def clip(self, size: int) -> None:
        """Take out everything at or above `size`."""
        self.remove(size, self.end)

    def covers(self, start: int, end: int) -> bool:
        """Whether every byte of [start, end) is in the set; an empty range is covered."""
        if start >= end:
            return True
        at = bisect_right(self._starts, start) - 1
        return at >= 0 and end <= self._ends[at]

    def overlap(self, start: int, end: int) -> list[Extent]:
        """The pieces of [start, end) that are in the set, in order."""
        first, last = self._overlapping(start, end)
        return [(max(start, self._starts[i]), min(end, self._ends[i])) for i in range(first, last)]

    def gaps(self, start: int, end: int) -> list[Extent]:
        """The pieces of [start, end) that are not in the set, in order."""
        holes = []
        for piece_start, piece_end in self.overlap(start, end):
            if start < piece_start:
                holes.append((start, piece_start))
            start = piece_end
        if start < end:
            holes.append((start, end))
        return holes

    def _overlapping(self, start: int, end: int) -> tuple[int, int]:
        """Index range of the ranges that share a byte with [start, end)."""
        if start >= end:
            return 0, 0
        return bisect_right(self._ends, start), bisect_left(self._starts, end)

    def _replace(self, first: int, last: int, pieces: list[Extent]) -> None:
        self._total_bytes -= sum(self._ends[first:last]) - sum(self._starts[first:last])
        self._total_bytes += sum(end - start for start, end in pieces)
        self._starts[first:last] = [start for start, _ in pieces]
        self._ends[first:last] = [end for _, end in pieces]


def split(start: int, end: int, unit: int) -> Iterator[Extent]:
    """[start, end) cut at every multiple of `unit`, in order."""
    while start < end:
        stop = min(end, (start // unit + 1) * unit)
        yield start, stop
        start = stop


@dataclass(frozen=True, slots=True)
class PartPlan:
    """One part of a multipart upload: bytes [start, end) of the new object."""

    start: int
    end: int
    is_copy: bool  # the same bytes of the base version, by UploadPartCopy

    @property
    def length(self) -> int:
        return self.end - self.start


def plan_parts(
    size: int, dirty: Extents, base_bytes: int, part_bytes: int, copy_part_bytes: int = COPY_PART_BYTES
) -> list[PartPlan]:
    """The parts of a new version of `size` bytes, in order: what did not change is copied, the rest uploaded.

    Unchanged is what lies in [0, base_bytes) and not in `dirty`. The parts tile [0, size), each but the last
    has at least 5 MiB, they are at most 10 000 (they grow if need be). Uploads have `part_bytes`, copies
    `copy_part_bytes` (>= 5 MiB), the last of a run up to 5 MiB more. A lone small change costs an upload of 5 MiB, an
    append what was appended. Near the largest size, where other plans have too many parts, all are of one length.
    """
    changed = _changed(size, dirty, base_bytes)
    least = S3_PART_BYTES_MIN
    copy_bytes = copy_part_bytes
    part_bytes = min(max(part_bytes, -(-size // S3_PARTS_MAX)), S3_PART_BYTES_MAX - S3_PART_BYTES_MIN)
    while least <= S3_PART_BYTES_MAX:
        plans = [
            PartPlan(start, end, is_copy)
            for run_start, run_end, is_copy in _runs(size, changed, least)
            for start, end in _cut(run_start, run_end, copy_bytes if is_copy else part_bytes, size)
        ]
        if len(plans) <= S3_PARTS_MAX:
            return plans
        least *= 2
        part_bytes = min(part_bytes * 2, S3_PART_BYTES_MAX - S3_PART_BYTES_MIN)
        copy_bytes = min(copy_bytes * 2, S3_PART_BYTES_MAX - S3_PART_BYTES_MIN)
    length = -(-size // S3_PARTS_MAX)
    return [PartPlan(start, end, not changed.overlap(start, end)) for start, end in split(0, size, length)]


def _changed(size: int, dirty: Extents, base_bytes: int) -> Extents:
    changed = dirty.copy()
    if base_bytes <= S3_PART_BYTES_MIN:  # Source: S3 API, UploadPartCopy: no ranges of sources up to 5 MB
        base_bytes = 0
    changed.add(min(base_bytes, size), size)
    changed.clip(size)
    return changed


def _runs(size: int, changed: Extents, least: int) -> Iterator[tuple[int, int, bool]]:
    """[0, size) as uploads and copies (start, end, is_copy) in turn, each but the last >= `least` bytes."""
    start = end = 0  # the upload that grows
    for piece_start, piece_end in changed:
        if piece_start - end >= least:
            if start < end:
                yield start, end, False
            yield end, piece_start, True
            start = end = piece_start
        end = max(end, piece_end, min(size, start + least))
    if start < end:
        yield start, end, False
    if end < size:
        yield end, size, True


def _cut(start: int, end: int, length: int, size: int) -> Iterator[Extent]:
    """[start, end) in pieces of `length`; a rest that is no legal part goes to the piece before it."""
    rest = 1 if end == size else S3_PART_BYTES_MIN
    while end - start >= length + rest:
        yield start, start + length
        start += length
    yield start, end

"""Limits of stores: the sizes that a store documents, and the names that it takes, learned by trying.

Owns the answers about names. Few names are asked about: those with a segment that is longer than every store takes,
by an object of nobody whose name is as long; and those that some stores take for `.` or `..`.
Source: Amazon S3 user guide, "Multipart upload limits", "Object metadata"; MinIO, "Thresholds and limits".
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import Final, NamedTuple, Protocol

import trio

from phfs_fuse.errors import IllegalName, NameTooLong, NotFound, PhfsError
from phfs_fuse.keys import MINIO_FOLDER
from phfs_fuse.store.base import NAME_REFUSED, Limits
from phfs_fuse.types import NAME_BYTES_MAX, S3_OBJECT_BYTES_MAX, SEGMENT_BYTES_SURE, ObjectKey

AWS: Final = Limits(object_bytes_max=S3_OBJECT_BYTES_MAX)
USUAL: Final = Limits(object_bytes_max=5 << 40)  # of all others: the largest that each of them documents

TRIAL_SECONDS: Final = 5.0  # a program waits to make a name; without an answer the limits of most stores count
MARKER_BYTES_MAX: Final = NAME_BYTES_MAX - len(MINIO_FOLDER)  # MinIO keeps the object `x/` in the folder `x__XLDIR__`
_DOTS: Final = re.compile(r"(?:^|[/\\])\s*\.\.?\s*(?:[/\\]|$)")  # MinIO strips blanks, and takes `\` for `/`


class Segment(NamedTuple):
    """The part of a key between two slashes, as far as stores have limits for it."""

    length: int  # in bytes
    is_marker: bool  # the last one of a directory marker

    @property
    def is_usual(self) -> bool:
        """Whether most stores take it."""
        return self.length <= (MARKER_BYTES_MAX if self.is_marker else NAME_BYTES_MAX)


def longest_segments(key: ObjectKey) -> list[Segment]:
    """The longest segment of `key`; of a directory marker also the last one."""
    lengths = [len(segment) for segment in key.encode().split(b"/")]
    found = [Segment(max(lengths), False)]
    if key.endswith("/"):
        found.append(Segment(lengths[-2], True))
    return found


class NameTrial(Protocol):
    """Requests about names. Each raises IllegalName or NameTooLong where the store does not take the name."""

    def key(self, segment: Segment) -> ObjectKey:
        """The key of an object of nobody, with such a segment."""

    async def look(self, key: ObjectKey) -> object:
        """Ask for the object; most stores look at its name first. Raises: NotFound."""

    async def store(self, key: ObjectKey) -> object:
        """Store the object, and remove it."""


class NameLimits:
    """Names that one store takes, or not."""

    def __init__(self, trial: NameTrial) -> None:
        self._trial = trial
        self._taken: dict[Segment, bool] = {}  # a key has at most 1024 lengths

    async def require(self, key: ObjectKey) -> None:
        """Return if the store takes `key`. Raises: IllegalName, NameTooLong."""
        for segment in longest_segments(key):
            if segment.length > SEGMENT_BYTES_SURE and not await self._takes(segment):
                raise NameTooLong("name", key, f"{segment.length} bytes are too long for the store")
        if "." in key and _DOTS.search(key) and not await _outcome(self._trial.look, key):
            raise IllegalName("name", key, "the store takes no name that reads as '.' or '..'")

    async def _takes(self, segment: Segment) -> bool:
        taken = self._taken.get(segment)
        if taken is None:
            key = self._trial.key(segment)
            taken = await _outcome(self._trial.look, key)
            if taken and not segment.is_usual:
                taken = await _outcome(self._trial.store, key)
            if taken is None:
                return segment.is_usual
            self._taken[segment] = taken
        return taken


async def _outcome(request: Callable[[ObjectKey], Awaitable[object]], key: ObjectKey) -> bool | None:
    """Whether the store takes `key`; None: it cannot be asked now."""
    with trio.move_on_after(TRIAL_SECONDS):
        try:
            await request(key)
        except NAME_REFUSED:
            return False
        except NotFound:
            return True
        except PhfsError:
            return None
        return True
    return None

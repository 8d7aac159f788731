"""Names for the numbers and strings that travel between the layers, their ranges, and units. Owns no state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NewType

Ino = NewType("Ino", int)  # identity of one file (one version line of it) within one mount
Fh = NewType("Fh", int)  # one open file or directory stream
BlockNo = NewType("BlockNo", int)  # unit of the cache, from 0
ObjectKey = NewType("ObjectKey", str)  # whole key in the bucket, without the bucket's name
ETag = NewType("ETag", str)  # opaque version of an object, as the store quotes it, without the quotes

ROOT_INO: Final = Ino(1)

KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30

NAME_BYTES_MAX: Final = 255  # Source: NAME_MAX of Linux
SEGMENT_BYTES_SURE: Final = 128  # between two slashes of a key: no store is known that takes less
KEY_BYTES_MAX: Final = 1024  # Source: S3 user guide, object keys
S3_PART_BYTES_MIN: Final = 5 * MIB  # Source: S3 user guide, multipart limits; the last part may be smaller
S3_PART_BYTES_MAX: Final = 5 * GIB
S3_PARTS_MAX: Final = 10_000
S3_OBJECT_BYTES_MAX: Final = S3_PARTS_MAX * S3_PART_BYTES_MAX  # 48.8 TiB; many stores take less
COPY_BYTES_MAX: Final = 256 * MIB  # in one request: more may take longer than the time without a byte
COPY_ONTO_ITSELF_BYTES_MAX: Final = 5 * GIB  # Source: S3 API reference, CopyObject
COPY_PART_BYTES: Final = 64 * MIB  # in the store, several at once; more may take longer than the time without a byte

# The ranges of numbers that come from outside: what does not fit is clamped or refused where it is parsed, so that
# the tree, the journal and the kernel take each number as it is.
SIZE_BYTES_MAX: Final = 1 << 60  # of any object; leaves room for the cache's checksums behind the bytes
TIME_NS_MIN: Final = -(1 << 63)  # the year 1677
TIME_NS_MAX: Final = (1 << 63) - 1  # the year 2262
ID_MAX: Final = (1 << 32) - 2  # of users, groups and devices; one more means "none"
Buffer = bytes | bytearray | memoryview  # what a read gives


Name = tuple[int, bytes]
"""Inode number of the directory, name in it."""


@dataclass(frozen=True, slots=True)
class Act:
    """A change of names that the thread `pid` asks for; numbers and names as the kernel gave them."""

    pid: int
    op: str
    parent: int
    name: bytes
    to_parent: int = 0
    to_name: bytes = b""


def time_ns(ns: int) -> int:
    """A time in nanoseconds since the epoch, or the nearest one that 64 bits hold."""
    return min(max(ns, TIME_NS_MIN), TIME_NS_MAX)


def decimal(text: str, most: int) -> int | None:
    """The whole number that `text` writes in decimal digits alone, from 0 to `most`; None: it is none."""
    if not (text.isascii() and text.isdigit()) or len(text) > 20:
        return None
    number = int(text)
    return number if number <= most else None

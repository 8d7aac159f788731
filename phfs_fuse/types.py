"""Names for the numbers and strings that travel between the layers, and units. Owns no state."""

from __future__ import annotations

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
KEY_BYTES_MAX: Final = 1024  # Source: S3 user guide, object keys
S3_PART_BYTES_MIN: Final = 5 * MIB  # Source: S3 user guide, multipart limits; the last part may be smaller
S3_PART_BYTES_MAX: Final = 5 * GIB
S3_PARTS_MAX: Final = 10_000
COPY_PART_BYTES: Final = 64 * MIB  # in the store, several at once; more may take longer than the time without a byte
S3_OBJECT_BYTES_MAX: Final = 5 << 40

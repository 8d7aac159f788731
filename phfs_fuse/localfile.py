"""Bytes into local files. Standard library only. Owns no state."""

from __future__ import annotations

import os
from typing import Final

from phfs_fuse.types import KIB

# At a time. The kernel takes pages in one piece for each write, and pieces of 1 MiB are what a virtual machine gives
# back to its host when they are free: measured, 1 GiB to a file was 1.3 s in writes of 1 MiB, 0.25 s in these.
WRITE_BYTES: Final = 512 * KIB


def write_all(fd: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    """pwrite(2) until all is written. Raises: OSError, ENOSPC and EDQUOT if the disk is full."""
    view = memoryview(data)
    while view:
        count = os.pwrite(fd, view[:WRITE_BYTES], offset)
        view, offset = view[count:], offset + count

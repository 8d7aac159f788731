"""Space held back on the disk of the local state, for what must not fail there. Owns the file `reserve`.

What a program asks for is refused (ENOSPC) before anything has changed, while there is still room to note what was
answered before: the end of an upload, a deletion, a reference of the kernel, the start of the next worker. Without
that a full disk would part the tree in memory from the journal, and leave a dead worker without a successor.
"""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path
from typing import Final

from phfs_fuse.types import MIB

BYTES_MAX: Final = 16 * MIB
DISK_PART: Final = 16  # of a small disk no more than this part
MARGIN_PART: Final = 8  # of the reserve: with less free than this the disk counts as full


class Reserve:
    """Held while the disk has room, given up when it has not, taken again when there is room for it."""

    def __init__(self, directory: Path) -> None:
        """Makes the directory if need be. Raises: OSError."""
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._directory = directory
        self._path = directory / "reserve"
        found = os.statvfs(directory)
        self._bytes = min(BYTES_MAX, found.f_blocks * found.f_frsize // DISK_PART)
        self._margin = self._bytes // MARGIN_PART
        self.is_held = self._path.exists()
        self.review()

    def review(self, size: int = 0) -> int:
        """Give the space up, or take it again, as the disk has less or more free than `size` and the margin; the
        bytes that are free then."""
        free = self._free()
        if self.is_held and free < self._margin + size:
            self.give_up()
            return self._free()
        if not self.is_held and free >= self._bytes + 2 * self._margin + size:
            self._take()
        return free

    def require(self, size: int = 0) -> None:
        """The state is about to grow by `size` bytes and some rows. Raises: OSError (ENOSPC)."""
        self.review(size)
        if not self.is_held:
            raise OSError(errno.ENOSPC, "the disk of the local state is full")

    def require_some(self) -> None:
        """It is about to grow by a few rows, so that space can be got back. Raises: OSError (ENOSPC)."""
        if self.review() < self._margin // 4:
            raise OSError(errno.ENOSPC, "the disk of the local state is full")

    def give_up(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()
        self.is_held = False

    def _free(self) -> int:
        found = os.statvfs(self._directory)
        return found.f_bavail * found.f_frsize

    def _take(self) -> None:
        try:
            fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(fd, 0, self._bytes)
            finally:
                os.close(fd)
        except OSError:  # somebody else was quicker
            self.give_up()
        else:
            self.is_held = True

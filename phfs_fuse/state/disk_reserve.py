"""Space held back on the disk of the local state, for what must not fail there. Owns the file `reserve`.

What a program asks for is refused (ENOSPC) before anything has changed, while there is still room to note what was
answered before: the end of an upload, a deletion, a reference of the kernel, the start of the next worker. Without
that a full disk would part the tree in memory from the journal, and leave a dead worker without a successor.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import trio

from phfs_fuse.config.dirs import make_private
from phfs_fuse.types import KIB, MIB

log = logging.getLogger(__name__)

NAME: Final = "reserve"
BYTES_MAX: Final = 16 * MIB
DISK_PART: Final = 16  # of a small disk no more than this part
RESUME_BYTES: Final = 512 * KIB  # for the journal's index, the room ahead of its log and the first transactions
LOOK_SECONDS: Final = 0.5
PLENTY_BYTES: Final = 1 << 30  # so much is not written in
PLENTY_SECONDS: Final = 0.05  # so little time: the disk is not looked at again for each change
MARGIN_PART: Final = 8  # of the reserve: with less free than this the disk counts as full


async def room_to_resume(directory: Path) -> None:
    """Returns when the disk has room for a worker to start on it, if need be that of the reserve: without any, who
    works on the mount waits, since a worker that cannot read its journal is none."""
    waits = False
    while _free(directory) < RESUME_BYTES:
        (directory / NAME).unlink(missing_ok=True)
        if _free(directory) < RESUME_BYTES:
            if not waits:
                log.error("%s: the disk is full; the mount waits until it has room", directory)
            waits = True
            await trio.sleep(LOOK_SECONDS)


def _free(directory: Path) -> int:
    found = os.statvfs(directory)
    return found.f_bavail * found.f_frsize


class Reserve:
    """Held while the disk has room, given up when it has not, taken again when there is room for it."""

    def __init__(self, directory: Path) -> None:
        """Makes the directory if need be. Raises: OSError."""
        make_private(directory)
        self._directory = directory
        self._path = directory / NAME
        found = os.statvfs(directory)
        self._bytes = min(BYTES_MAX, found.f_blocks * found.f_frsize // DISK_PART)
        self._plenty_until = 0.0
        self._margin = self._bytes // MARGIN_PART
        self.is_held = self._path.exists()
        self._is_awaited = False
        self.review()

    def review(self, size: int = 0) -> int:
        """Give the space up, or take it again, as the disk has less or more free than `size` and the margin; the
        bytes that are free then."""
        now = time.monotonic()
        if self.is_held and now < self._plenty_until and size < PLENTY_BYTES // 4:
            return PLENTY_BYTES
        free = _free(self._directory)
        self._plenty_until = now + PLENTY_SECONDS if free >= PLENTY_BYTES else 0.0
        if self.is_held and free < self._margin + size:
            self.give_up()
            return _free(self._directory)
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

    async def wait(self, require: Callable[[], None]) -> None:
        """Returns when `require` finds room: what was done in the store has to be noted, sooner or later."""
        while True:
            try:
                require()
            except OSError as exc:
                if not self._is_awaited:
                    log.error("%s: %s; uploads wait until there is room", self._directory, exc.strerror)
                self._is_awaited = True
                await trio.sleep(LOOK_SECONDS)
            else:
                self._is_awaited = False
                return

    def give_up(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()
        self.is_held = False

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

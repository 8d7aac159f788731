"""Disk blocks that the journal's log has before it needs them. Owns descriptors of `journal.db-wal` and `-shm`.

The tree is changed first and the change committed then: a disk that is full at COMMIT is met too late, by a change
that can neither be noted nor be refused. So a transaction begins only when the log, which is all that a commit writes
to, has the blocks for it; nobody else can take those. They lie beyond the end of the file, where SQLite does not see
them. The same for the index of the log, which SQLite makes longer, page by page, when the log has become so.

Both files are the same ones for as long as the journal is open, and never cut: SQLite removes them with the last
connection, and of its checkpoints only passive ones are asked for. When these have emptied the log it is written from
its start again, over blocks that it has, and its size stays. A file system that copies what is written over (btrfs)
may want new ones all the same; one that gives none ahead is as it was without this.
"""

from __future__ import annotations

import os
import weakref
from contextlib import suppress
from errno import EDQUOT, ENOSPC, ENOSYS, EOPNOTSUPP
from pathlib import Path
from typing import Final

from phfs_fuse.localfile import FALLOC_KEEP_SIZE, fallocate
from phfs_fuse.types import KIB, MIB

# A transaction has a few rows, each with the pages of its table and indexes on the way to it: 5 to 20 pages of 4 KiB.
NOTE_BYTES: Final = 128 * KIB  # for one that must not fail: the end of an upload, a close
CHANGE_BYTES: Final = 512 * KIB  # for one that a program asks for: it leaves room for some of those
SURPLUS_BYTES: Final = 4 * MIB  # more is given back
STEP_BYTES: Final = MIB  # taken beyond that where there is room, so that most transactions find it taken
# Source: sqlite.org/walformat.html: a page of the index has 4096 frames of the log, the first some fewer.
INDEX_PAGE_BYTES: Final = 32 * KIB
INDEX_PAGE_LOGS: Final = 4096 * (4096 + 24)  # of the log
NO_LIMIT: Final = 1 << 62


class LogSpace:
    def __init__(self, journal: Path) -> None:
        """The log of a `journal` that is open, and is so until `close`: to close a descriptor of the index takes the
        locks of all others from them (Source: fcntl(2))."""
        self._fds = [_open(f"{journal}-wal"), _open(f"{journal}-shm")]
        self._close = weakref.finalize(self, _close, list(self._fds))
        self._owned = 0 if min(self._fds) >= 0 else NO_LIMIT  # bytes of the log that have blocks
        self._index_owned = 0

    def close(self) -> None:
        self._close()
        self._fds = [-1, -1]

    def require(self, size: int) -> None:
        """The log may grow by `size` bytes, whatever others do to the disk. Raises: OSError (ENOSPC, EDQUOT)."""
        if self._owned == NO_LIMIT:
            return
        used = os.fstat(self._fds[0]).st_size
        if used + size <= self._owned:
            return
        try:
            try:
                self._own(used, used + size + STEP_BYTES)
            except OSError as exc:
                if exc.errno not in (ENOSPC, EDQUOT):
                    raise
                self._own(used, used + size)
        except OSError as exc:
            if exc.errno not in (EOPNOTSUPP, ENOSYS):
                raise
            self._owned = NO_LIMIT  # the file system gives no blocks ahead

    def give_back(self) -> None:
        """What a big transaction did not need, if that is much. Between transactions."""
        used = os.fstat(self._fds[0]).st_size if self._owned != NO_LIMIT else NO_LIMIT
        if self._owned - used > SURPLUS_BYTES:
            os.ftruncate(self._fds[0], used)  # frees the blocks beyond the end, which stays
            self._owned = used
            with suppress(OSError):  # others were quicker
                self.require(CHANGE_BYTES)

    def _own(self, used: int, end: int) -> None:
        log, index = self._fds
        index_end = INDEX_PAGE_BYTES * (2 + end // INDEX_PAGE_LOGS)
        if index_end > self._index_owned:
            size = os.fstat(index).st_size
            fallocate(index, FALLOC_KEEP_SIZE, size, max(1, index_end - size))
            self._index_owned = index_end
        fallocate(log, FALLOC_KEEP_SIZE, used, end - used)
        self._owned = end


def _close(fds: list[int]) -> None:
    for fd in fds:
        if fd >= 0:
            os.close(fd)


def _open(path: str) -> int:
    """-1: SQLite keeps none, since the file system does not let it."""
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return -1

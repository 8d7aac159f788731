"""Whether something may be changed now: the mount is not read-only, and its local state has room. Owns no state."""

from __future__ import annotations

from phfs_fuse.errors import ReadOnly
from phfs_fuse.state.journal import Journal

ROWS_BYTES = 4096  # of the journal, for one change


class Admission:
    def __init__(self, journal: Journal, *, read_only: bool) -> None:
        self._journal = journal
        self._read_only = read_only

    def require(self) -> None:
        """Before a change that will give space back. Raises: ReadOnly, OSError (ENOSPC, when not even that could be
        noted)."""
        self._require_not_read_only()
        self._journal.require_some()

    def require_room(self, size: int = ROWS_BYTES) -> None:
        """Before one that makes the local state grow by `size`. Raises: ReadOnly, OSError (ENOSPC)."""
        self._require_not_read_only()
        self._journal.require(size)

    def require_space(self, size: int) -> None:
        """As `require_room`, for bytes of a file that is open for writing. Raises: OSError (ENOSPC)."""
        self._journal.require(size)

    def _require_not_read_only(self) -> None:
        if self._read_only:
            raise ReadOnly("write", "mount", "is read-only")

"""Whether something may be changed now: the mount is not read-only, and its local state has room. Owns no state."""

from __future__ import annotations

from phfs_fuse.changes import Changes
from phfs_fuse.errors import ReadOnly

ROWS_BYTES = 4096  # of the journal, for one change


class Writable:
    def __init__(self, changes: Changes, *, read_only: bool) -> None:
        self._changes = changes
        self._read_only = read_only

    def require(self) -> None:
        """Raises: ReadOnly, OSError (ENOSPC, when not even what gives space back could be noted)."""
        self._require_not_read_only()
        self._changes.require_some_space()

    def require_room(self, size: int = ROWS_BYTES) -> None:
        """As `require`, for what makes the local state grow. Raises: ReadOnly, OSError (ENOSPC)."""
        self._require_not_read_only()
        self._changes.require_space(size)

    def _require_not_read_only(self) -> None:
        if self._read_only:
            raise ReadOnly("write", "mount", "is read-only")

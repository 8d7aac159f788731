"""The time by the store's own clock. Owns its distance from this machine's."""

from __future__ import annotations

import time
from collections.abc import Mapping

from phfs_fuse.store.headers import date_ns


class StoreClock:
    """The store's time, by the `Date` of its answers. Owns its distance from the time since this machine started."""

    def __init__(self) -> None:
        self._date = ""
        self._ahead_ns: int | None = None

    def heard(self, headers: Mapping[str, str]) -> None:
        """Headers of an answer that has just come; names in lower case."""
        date = headers.get("date", "")
        if date != self._date:
            self._date = date
            if (at_ns := date_ns(date)) is not None:
                self._ahead_ns = at_ns - time.clock_gettime_ns(time.CLOCK_BOOTTIME)

    def now_ns(self) -> int | None:
        """Late by the second that a `Date` leaves out, and by the way of its answer. None: nothing was heard."""
        return None if self._ahead_ns is None else self._ahead_ns + time.clock_gettime_ns(time.CLOCK_BOOTTIME)

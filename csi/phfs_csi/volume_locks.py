"""One call at a time for a volume; the second one is told to come again.

State: the names that are held.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from phfs_csi.errors import Aborted


class VolumeLocks:
    def __init__(self) -> None:
        self._held: set[str] = set()
        self._lock = threading.Lock()

    @contextmanager
    def hold(self, name: str) -> Iterator[None]:
        """Raises: Aborted while another call holds `name`. Source: CSI spec, concurrency."""
        with self._lock:
            if name in self._held:
                raise Aborted("another call for this volume is at work")
            self._held.add(name)
        try:
            yield
        finally:
            with self._lock:
                self._held.discard(name)

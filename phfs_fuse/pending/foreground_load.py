"""How much programs ask of the mount just now. Owns the times of the last requests of the kernel."""

from __future__ import annotations

import math
from collections import deque
from typing import Final

import trio

MANY: Final = 16  # requests ...
MANY_SECONDS: Final = 0.1  # ... within this time: somebody waits for one after the other


class ForegroundLoad:
    def __init__(self) -> None:
        self._times: deque[float] = deque(maxlen=MANY)

    def note(self) -> None:
        """The kernel asks for something."""
        self._times.append(trio.current_time())

    @property
    def high_until(self) -> float:
        """Until when programs count as busy, if they ask for nothing more."""
        return self._times[0] + MANY_SECONDS if len(self._times) == MANY else -math.inf

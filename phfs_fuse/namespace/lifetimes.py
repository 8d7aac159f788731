"""How long an answer of the store is believed. Owns since when changes are heard of; no I/O, no await.

While the store's stream of changes is open, what was asked for after it opened is believed for long: a change would
be heard of. What was asked for before counts for the short time.
"""

from __future__ import annotations

from math import inf

from phfs_fuse.config.model import TreeConfig


class Lifetimes:
    def __init__(self, config: TreeConfig) -> None:
        self.short_seconds = config.attr_ttl_seconds
        # 0: each open asks
        self._long_seconds = max(config.events_ttl_seconds, self.short_seconds) if self.short_seconds else 0.0
        self._live_since = inf
        self.kernel_takes_back = False  # what the kernel was told can be taken back

    def live(self, since: float) -> None:
        """Every change after `since` is heard of, until `lost`."""
        self._live_since = since

    def lost(self) -> None:
        self._live_since = inf

    def is_live(self, now: float) -> bool:
        return now >= self._live_since

    def until(self, asked_at: float) -> float:
        """Until when an answer is believed that was asked for at `asked_at`."""
        return asked_at + (self._long_seconds if asked_at >= self._live_since else self.short_seconds)

    def holds(self, asked_at: float, now: float) -> bool:
        return now < self.until(asked_at)

    def kernel_seconds(self, asked_at: float, now: float) -> float:
        """For how long from now the kernel may believe it."""
        seconds = self.until(asked_at) - now
        return max(0.0, seconds if self.kernel_takes_back else min(seconds, self.short_seconds))

"""The node's limits of cache and dirty bytes, divided by the volumes that are mounted. Owns no state.

What volumes that are not mounted any more have left in the cache counts as one volume more.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from phfs_csi.config import NodeConfig
from phfs_csi.node.caches import keep_within, left_behind
from phfs_csi.node.records import Records, VolumeRecord
from phfs_fuse.types import MIB

SHARE_BYTES_MIN: Final = 16 * MIB  # what a mount needs at least: with more volumes than that the node's limit gives


@dataclass(frozen=True, slots=True)
class Share:
    cache_bytes: int
    dirty_bytes: int


class Shares:
    def __init__(self, config: NodeConfig, records: Records) -> None:
        self._config = config
        self._records = records

    def of(self, record: VolumeRecord) -> Share:
        """The volume's part of the node's limits, and of the cache not more than its own limit."""
        count = max(1, len(self._mounted()))
        cache_bytes = self._config.cache_bytes_max // (count + bool(self._left_behind()))
        if record.cache_bytes_max is not None:
            cache_bytes = min(cache_bytes, record.cache_bytes_max)
        return Share(
            cache_bytes=max(SHARE_BYTES_MIN, cache_bytes),
            dirty_bytes=max(SHARE_BYTES_MIN, self._config.dirty_bytes_max // count),
        )

    def tidy_up(self) -> None:
        """Keep what is left behind within its share."""
        if left := self._left_behind():
            keep_within(left, self._config.cache_bytes_max // (len(self._mounted()) + 1))

    def _mounted(self) -> set[str]:
        return {record.key for record in self._records.volumes() if not record.is_ended}

    def _left_behind(self) -> list[Path]:
        return left_behind(self._config.cache_dir, self._mounted())

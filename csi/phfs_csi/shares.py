"""The node's limits of cache and dirty bytes, divided by the volumes that are mounted. Owns no state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from phfs_csi.config import NodeConfig
from phfs_csi.records import Records, VolumeRecord
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
        count = max(1, sum(not other.is_ended for other in self._records.volumes()))
        cache_bytes = self._config.cache_bytes_max // count
        if record.cache_bytes_max is not None:
            cache_bytes = min(cache_bytes, record.cache_bytes_max)
        return Share(
            cache_bytes=max(SHARE_BYTES_MIN, cache_bytes),
            dirty_bytes=max(SHARE_BYTES_MIN, self._config.dirty_bytes_max // count),
        )

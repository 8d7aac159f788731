"""A `Mounter` that only remembers, with faults where the test wants them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from phfs_csi.node.mounter import State, Usage
from phfs_csi.node.records import VolumeRecord


class FakeMounter:
    def __init__(self) -> None:
        self.mounted: dict[Path, VolumeRecord] = {}
        self.bound: dict[Path, tuple[Path, bool]] = {}  # target -> mount point, read-only
        self.ended: list[str] = []
        self.before_mount: Callable[[VolumeRecord], None] = lambda record: None
        self.answer: Mapping[str, Any] | None = {
            "store": {"state": "ok"},
            "pending": {"files": 2, "deletes": 1, "bytes": 5},
            "errors": [],
            "starts": 1,
        }

    def state(self, record: VolumeRecord) -> State:
        return State.SERVED if record.path in self.mounted else State.ABSENT

    def mount(self, record: VolumeRecord, seconds: float) -> None:
        self.before_mount(record)
        self.mounted[record.path] = record

    def is_bound(self, record: VolumeRecord, target: Path) -> bool:
        return self.bound.get(target, (None, False))[0] == record.path

    def bind(self, record: VolumeRecord, target: Path, *, read_only: bool) -> None:
        self.bound[target] = (record.path, read_only)

    def clear(self, path: Path) -> None:
        self.mounted.pop(path, None)

    def unbind(self, target: Path) -> None:
        self.bound.pop(target, None)

    def end(self, record: VolumeRecord, seconds: float) -> None:
        self.ended.append(record.volume_id)
        self.mounted.pop(record.path, None)

    def release(self, record: VolumeRecord) -> bool:
        return True

    def usage(self, path: Path) -> Usage:
        return Usage(total=100, used=30, available=70, inodes=10, inodes_used=3, inodes_free=7)

    def status(self, record: VolumeRecord) -> Mapping[str, Any] | None:
        return self.answer

    def abandon(self, record: VolumeRecord) -> None: ...

    def tidy_up(self) -> None: ...

    def limit(self, record: VolumeRecord) -> None:
        pass

    def set_quota(self, record: VolumeRecord) -> None:
        self.mounted[record.path] = record


class NothingLeft:
    """The `DrainConfigs` of volumes that have uploaded everything."""

    def has_leftovers(self, record: VolumeRecord) -> bool:
        return False

    def drain_config(self, record: VolumeRecord) -> Any:
        raise AssertionError("nothing is left here")

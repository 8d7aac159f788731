"""What volumes that are not mounted any more have left in the cache: kept within one share, the oldest goes first.

Owns the directories of such volumes; may be called by one thread at a time.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Collection
from pathlib import Path

log = logging.getLogger(__name__)


def left_behind(directory: Path, mounted: Collection[str]) -> list[Path]:
    """The caches of volumes that are not among `mounted`, the last used first."""
    found = [path for path in _entries(directory) if path.name not in mounted]
    return sorted(found, key=_used_at, reverse=True)


def keep_within(paths: list[Path], bytes_max: int) -> None:
    """Remove those of `paths`, the last used first, that together with those before them are over the limit."""
    total = 0
    for path in paths:
        total += _bytes_of(path)
        if total > bytes_max:
            shutil.rmtree(path, ignore_errors=True)
            log.info("cache of a volume that is not mounted any more removed path=%s", path)


def _entries(directory: Path) -> list[Path]:
    try:
        return [Path(entry) for entry in os.scandir(directory) if entry.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return []


def _used_at(path: Path) -> float:
    try:
        return max(entry.stat().st_mtime for entry in [path, *_entries(path)])
    except OSError:
        return 0.0


def _bytes_of(path: Path) -> int:
    """On disk."""
    total = 0
    for folder, _folders, files in os.walk(path):
        for name in files:
            try:
                total += os.lstat(os.path.join(folder, name)).st_blocks * 512
            except OSError:
                continue  # removed meanwhile
    return total

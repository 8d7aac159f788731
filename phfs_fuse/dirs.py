"""Where things lie on this machine unless the user says otherwise. Owns no state; standard library only."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


def cache_home(environ: Mapping[str, str] = os.environ) -> Path:
    """Holds clean blocks, a directory per volume. May be deleted at any time."""
    return _home(environ, "XDG_CACHE_HOME", ".cache", Path("/var/cache/phfs"))


def state_home(environ: Mapping[str, str] = os.environ) -> Path:
    """Holds bytes that exist only here, a directory per volume."""
    return _home(environ, "XDG_STATE_HOME", ".local/state", Path("/var/lib/phfs"))


def runtime_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """Holds the records of running mounts; the same for all commands of one user."""
    if given := environ.get("PHFS_RUNTIME_DIR"):
        return Path(given)
    if os.geteuid() == 0:
        return Path("/run/phfs")
    if session := environ.get("XDG_RUNTIME_DIR"):
        return Path(session) / "phfs"
    return state_home(environ) / "run"


def _home(environ: Mapping[str, str], variable: str, below_home: str, of_root: Path) -> Path:
    """Source: XDG base directory specification; a relative value is to be ignored."""
    if os.path.isabs(given := environ.get(variable, "")):
        return Path(given) / "phfs"
    if os.geteuid() == 0:
        return of_root
    return Path(environ.get("HOME") or os.path.expanduser("~")) / below_home / "phfs"

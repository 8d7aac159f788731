"""Default places on this machine, and directories for nobody but their owner.

Owns no state; standard library only."""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Mapping
from pathlib import Path

log = logging.getLogger(__name__)


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


def make_private(directory: Path) -> None:
    """Make the directory, and those above it that are missing, with mode 0700 whatever the umask is. One of ours that
    is there, but open to others, is narrowed. Raises: OSError; PermissionError where another user could put another
    directory in its place: it is a link, has another owner, or all may write its parent."""
    try:
        found = directory.lstat()
    except FileNotFoundError:
        if directory.parent != directory and not directory.parent.exists():
            make_private(directory.parent)
        try:
            directory.mkdir(0o700)
        except FileExistsError:  # another process was faster
            return make_private(directory)
        directory.chmod(0o700)
        found = directory.lstat()
    if reason := _reason_to_refuse(found, directory.parent.stat()):
        raise PermissionError(errno.EPERM, reason, str(directory))
    if found.st_mode & 0o077:
        directory.chmod(0o700)
        log.info("%s: was open to other users (mode %04o), is 0700 now", directory, stat.S_IMODE(found.st_mode))


def _reason_to_refuse(found: os.stat_result, parent: os.stat_result) -> str:
    if not stat.S_ISDIR(found.st_mode):
        return "is a link, or no directory"
    if found.st_uid != os.geteuid():
        return f"belongs to user {found.st_uid}, not to {os.geteuid()}"
    if parent.st_mode & stat.S_IWOTH and not parent.st_mode & stat.S_ISVTX:
        return "all users may write the directory that it is in"
    return ""

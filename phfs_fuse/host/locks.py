"""The state directory of one volume: one mount at a time may use it. Owns the locks, and names what is put aside.

Standard library only: the keeper imports this.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import time
from pathlib import Path

from phfs_fuse.config.dirs import make_private
from phfs_fuse.errors import LocalStateError


class StateLock:
    """Held as long as the object is open; the kernel lets go of it when the process ends, however it ends."""

    def __init__(self, directory: Path, note: str, name: str = "lock") -> None:
        """Makes the directory if need be. Raises: LocalStateError (in use, not writable)."""
        path = directory / name
        try:
            make_private(directory)
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as exc:
            raise LocalStateError(
                f"state directory {directory} cannot be used ({exc.strerror}); choose another with --state-dir"
            ) from exc
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            holder = os.pread(self._fd, 1000, 0).decode("utf-8", "replace").strip() or "another mount"
            os.close(self._fd)
            raise LocalStateError(
                f"state directory {directory} is in use by {holder}; unmount that, or choose another with --state-dir"
            ) from exc
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, note.encode(), 0)

    def close(self) -> None:
        os.close(self._fd)


def keeper_of(config_path: Path) -> int | None:
    """The process that keeps the mount of this config, None: nobody does. Process ids of another container are not
    told from those of this one, but whether there is a keeper is always right."""
    try:
        fd = os.open(keeper_lock(config_path), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return int(os.pread(fd, 20, 0) or b"0")
    finally:
        os.close(fd)
    return None


def keeper_lock(config_path: Path) -> Path:
    return config_path.with_suffix(".lock")


def unused_stamp(directory: Path) -> str:
    """The time (UTC) for the name of what is put aside in `directory`, with a number if a name there has it already:
    what was put aside in the same second, or before the clock was set back, is not replaced."""
    taken = os.listdir(directory)
    now = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    stamps = itertools.chain([now], (f"{now}-{number}" for number in itertools.count(1)))
    return next(stamp for stamp in stamps if not any(stamp in name for name in taken))

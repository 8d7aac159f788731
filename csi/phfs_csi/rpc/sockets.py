"""A unix socket that replaces another one without a gap, and is removed only by who owns it.

State: which file at the path is ours. gRPC binds a name of its own beside it, which is then renamed: who looks finds
the old one or the new one, and a process that ends later than its successor started leaves that one's alone.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
from pathlib import Path
from typing import Final

import grpc

from phfs_fuse.errors import LocalStateError

log = logging.getLogger(__name__)

PATH_BYTES_MAX: Final = 107  # Source: unix(7), sun_path with its NUL
Identity = tuple[int, int, int]
MODE: Final = 0o600  # the kubelet and the sidecars run as our user


class SocketFile:
    def __init__(self, path: Path) -> None:
        self.path = path
        self._ours: Identity | None = None

    def bind(self, server: grpc.Server) -> None:
        """Let `server` listen at the path, once it is started. Raises: LocalStateError."""
        # the kubelet passes over names that begin with a dot
        beside = self.path.with_name(f".{secrets.token_hex(4)}.sock")
        if max(len(os.fsencode(beside)), len(os.fsencode(self.path))) > PATH_BYTES_MAX:
            raise LocalStateError(f"{self.path}: too long for a socket, choose a shorter path")
        try:
            server.add_insecure_port(f"unix:{beside}")
            ours = _identity(beside)
            beside.chmod(MODE)
            beside.replace(self.path)
        except (OSError, RuntimeError) as exc:  # gRPC raises the latter
            with contextlib.suppress(OSError):
                beside.unlink()
            reason = exc.strerror if isinstance(exc, OSError) else "cannot listen there"
            raise LocalStateError(f"{self.path}: {reason}; is its directory there and writable?") from exc
        self._ours = ours

    def is_missing(self) -> bool:
        """Whether nobody's file is at the path."""
        return _identity(self.path) is None

    def is_ours(self) -> bool:
        return self._ours is not None and _identity(self.path) == self._ours

    def remove(self) -> None:
        """Only ours; a successor's stays."""
        if self.is_ours():
            self.path.unlink(missing_ok=True)
        self._ours = None


def _identity(path: Path) -> Identity | None:
    """Of the file that is there now: numbers of inodes are given to the next file, with its time they are ours."""
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns

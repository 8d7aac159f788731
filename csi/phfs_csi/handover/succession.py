"""Who is next: sockets that a successor puts its own in place of, and marks of pods that were succeeded.

What is started again in a pod that was succeeded idles, else it would take everything back. State: files beside the
socket. Standard library only: the holder imports this.
"""

from __future__ import annotations

import os
import socket
import struct
import threading
from contextlib import suppress
from pathlib import Path
from typing import Final

from phfs_fuse.errors import LocalStateError

CONNECT_SECONDS: Final = 5.0
ALONE_SECONDS: Final = 30.0  # without a successor that answers: it is gone, and not just restarted
LOOK_SECONDS: Final = 3.0
_PEER: Final = struct.Struct("3i")  # struct ucred: pid, uid, gid. Source: unix(7)


class Marks:
    """Which pods were succeeded, as files beside the socket."""

    def __init__(self, socket_path: Path, role: str) -> None:
        self._directory = socket_path.parent / "succeeded"
        self._role = role

    def set(self, pod_uid: str, *, but: str) -> None:
        """Of the pod before, unless it is `but`, our own; marks of earlier ones are of no use any more."""
        if pod_uid in ("", but):
            return
        with suppress(OSError):
            self._directory.mkdir(mode=0o700, exist_ok=True)
            for path in self._directory.glob(f"{self._role}-*"):
                path.unlink(missing_ok=True)
            self._file(pod_uid).touch(mode=0o600)

    def is_set(self, pod_uid: str) -> bool:
        return bool(pod_uid) and self._file(pod_uid).exists()

    def clear(self, pod_uid: str) -> None:
        if pod_uid:
            self._file(pod_uid).unlink(missing_ok=True)

    def _file(self, pod_uid: str) -> Path:
        return self._directory / f"{self._role}-{pod_uid.replace('/', '_')}"


def wait_until_alone(path: Path, stopping: threading.Event) -> None:
    """Return when nobody has listened at `path` for a while, or when `stopping`."""
    silent = 0.0
    while silent < ALONE_SECONDS and not stopping.wait(LOOK_SECONDS):
        silent = 0.0 if _answers(path) else silent + LOOK_SECONDS


def _answers(path: Path) -> bool:
    if (channel := connect(path)) is None:
        return False
    channel.close()
    return True


def connect(path: Path) -> socket.socket | None:
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    channel.settimeout(CONNECT_SECONDS)
    try:
        channel.connect(str(path))
    except OSError:
        channel.close()
        return None
    return channel


def is_of_us(channel: socket.socket) -> bool:
    _pid, uid, _gid = _PEER.unpack(channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    return uid in (0, os.geteuid())


def listen(path: Path) -> socket.socket:
    """Listen at `path`, at once in place of whoever did. Raises: LocalStateError."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        draft.unlink(missing_ok=True)
        listener.bind(str(draft))
        draft.chmod(0o600)  # nobody can connect before listen()
        listener.listen(64)
        draft.rename(path)
    except OSError as exc:
        listener.close()
        raise LocalStateError(f"{path}: cannot listen: {exc.strerror}; is its directory writable?") from exc
    return listener

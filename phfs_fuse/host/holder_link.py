"""Have another process hold the connections of mounts too, so that the death of a keeper ends none of them.

`HolderLink` is the side of who gives and takes descriptors, `phfs_csi.handover.holder` the other one. One JSON object
per packet of a SOCK_SEQPACKET socket, each request with one answer; a descriptor travels as SCM_RIGHTS:

    {"op": "keep", "name": ..., "device": ...} + descriptor     {}
    {"op": "take", "name": ...}                                 {"name": ..., "device": ...} + descriptor, or {}
    {"op": "next", "after": ...}                                the same, of the next name in order
    {"op": "drop", "name": ...}                                 {}
    {"op": "succeed"}                                           {"pod_uid": ...}; the holder lets go of all

What cannot be done is answered by {"error": "one line"}. Owns no state. Standard library only: the keeper imports
this.
"""

from __future__ import annotations

import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from phfs_fuse.config import json_text
from phfs_fuse.errors import LocalStateError

PACKET_BYTES_MAX: Final = 16384
ANSWER_SECONDS: Final = 5.0


@dataclass(frozen=True, slots=True)
class Held:
    """A duplicate of the descriptor `fd`, which is the caller's to close."""

    name: str
    device: str  # as the mount table shows it when the mount was made: "major:minor"
    fd: int


class HolderLink:
    """A connection to the holder. Each call blocks, but not longer than ANSWER_SECONDS.

    Raises: LocalStateError from every call when the holder is not there or says no.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(ANSWER_SECONDS)
        try:
            self._socket.connect(str(path))
        except OSError as exc:
            self._socket.close()
            raise LocalStateError(f"{path}: no holder answers: {exc.strerror or exc}") from exc

    def fileno(self) -> int:
        """To be watched: readable means that the holder is gone."""
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def keep(self, name: str, device: str, fd: int) -> None:
        """Have the holder hold a duplicate of `fd`, in place of what it had of this name."""
        self._ask({"op": "keep", "name": name, "device": device}, fd)

    def take(self, name: str) -> Held | None:
        """What is held of this name, where its connection lives. The holder goes on holding it."""
        return self._held({"op": "take", "name": name})

    def after(self, name: str) -> Held | None:
        """As `take`, of the first name that comes after `name`."""
        return self._held({"op": "next", "after": name})

    def drop(self, name: str) -> None:
        self._ask({"op": "drop", "name": name})

    def succeed(self) -> str:
        """Tell the holder that all it has is held by another one; returns the id of its pod, "" if it has none."""
        answer, _fds = self._ask({"op": "succeed"})
        return str(answer.get("pod_uid", ""))

    def _held(self, request: dict[str, str]) -> Held | None:
        answer, fds = self._ask(request)
        if len(fds) == 1 and {"name", "device"} <= answer.keys():
            return Held(str(answer["name"]), str(answer["device"]), fds[0])
        for fd in fds:
            os.close(fd)
        return None

    def _ask(self, request: dict[str, str], *fds: int) -> tuple[dict[str, Any], list[int]]:
        try:
            socket.send_fds(self._socket, [json.dumps(request).encode()], fds)
            packet, received, _flags, _address = socket.recv_fds(
                self._socket, PACKET_BYTES_MAX, 1, socket.MSG_CMSG_CLOEXEC
            )
            answer = json_text.parse(packet)
            if not isinstance(answer, dict):
                raise ValueError("no JSON object")
        except (OSError, ValueError) as exc:
            raise LocalStateError(f"{self._path}: the holder does not answer: {exc}") from exc
        if "error" in answer:
            raise LocalStateError(f"{self._path}: the holder refused: {answer['error']}")
        return answer, received

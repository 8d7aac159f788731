"""From one plugin to the next, as an upgrade of the pod does it: who comes asks, who goes lets go.

    successor                                   predecessor
    {"op": "handover", "pod_uid": ...}     ->   takes no more calls, leaves all mounts to the holder
                                           <-   {"pod_uid": ..., "released": [...]}
    takes the mounts up
    {"op": "took"}, keeps the connection   ->   idles until it is ended, or until its successor is gone
    or the end of the connection           ->   takes its mounts up again and goes on

One JSON object per packet of a SOCK_SEQPACKET socket. State: the socket.
"""

from __future__ import annotations

import json
import logging
import socket
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from phfs_csi.handover.succession import connect, is_of_us, listen, wait_until_alone
from phfs_fuse.config import json_text

log = logging.getLogger(__name__)

PACKET_BYTES_MAX: Final = 1 << 17
ANSWER_SECONDS: Final = 90.0  # calls in work end first
TAKE_SECONDS: Final = 300.0  # for the successor to take up all mounts
REQUEST_SECONDS: Final = 5.0


class Going(Protocol):
    """What the predecessor does."""

    def let_go(self) -> list[str]:
        """Take no more calls, leave the mounts; returns the ids of volumes that wait to be taken up."""

    def go_on(self) -> None:
        """Take all up again."""


@dataclass(frozen=True, slots=True)
class Inheritance:
    """The connection to a predecessor that has let go. Closed without `took`, the predecessor goes on."""

    channel: socket.socket
    released: list[str]
    pod_uid: str

    def took(self) -> None:
        """All is taken up. The connection stays open: its end would say that this process has ended."""
        with suppress(OSError):
            self.channel.send(json.dumps({"op": "took"}).encode())

    def give_back(self) -> None:
        self.channel.close()


def ask(path: Path, pod_uid: str) -> Inheritance | None:
    """Have the plugin that listens at `path` let go. None: there is none, or it does not answer: then what it serves
    is found to be served."""
    if (channel := connect(path)) is None:
        return None
    try:
        channel.settimeout(ANSWER_SECONDS)
        channel.send(json.dumps({"op": "handover", "pod_uid": pod_uid}).encode())
        answer = json_text.parse(channel.recv(PACKET_BYTES_MAX) or b"null")
        found = Inheritance(channel, [str(name) for name in answer["released"]], str(answer["pod_uid"]))
    except (OSError, ValueError, TypeError, KeyError) as exc:
        log.warning("%s: the plugin before does not let go: %s", path, exc)
        channel.close()
        return None
    log.info("taking over from pod=%s mounts=%d", found.pod_uid or "?", len(found.released))
    return found


class HandoverServer:
    """Waits for a successor, in a thread."""

    def __init__(self, path: Path, pod_uid: str, going: Going) -> None:
        self._path = path
        self._pod_uid = pod_uid
        self._going = going
        self._listener: socket.socket | None = None
        self._stopping = threading.Event()
        self.is_succeeded = False

    def start(self) -> None:
        """Raises: LocalStateError."""
        self.is_succeeded = False
        self._listener = listen(self._path)
        threading.Thread(target=self._run, args=(self._listener,), name="handover", daemon=True).start()

    def stop(self) -> None:
        self._stopping.set()
        if self._listener is not None:
            with suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept(2)

    def _run(self, listener: socket.socket) -> None:
        with listener:
            while not self._stopping.is_set():
                try:
                    channel, _address = listener.accept()
                except OSError:
                    return
                with channel:
                    if is_of_us(channel) and self._hand_over(channel):
                        break
        if self.is_succeeded:
            wait_until_alone(self._path, self._stopping)
            if not self._stopping.is_set():
                log.warning("the successor is gone: this plugin goes on")
                self.start()
                self._going.go_on()

    def _hand_over(self, channel: socket.socket) -> bool:
        """Whether the successor has taken over. Returns when it has ended, too: its connection tells."""
        try:
            channel.settimeout(REQUEST_SECONDS)
            request = json_text.parse(channel.recv(PACKET_BYTES_MAX) or b"null")
            if request is None or request["op"] != "handover":
                return False
            log.info("handing over to pod=%s", request.get("pod_uid") or "?")
        except (OSError, ValueError, TypeError, KeyError) as exc:
            log.warning("not understood on the hand-over socket: %s", exc)
            return False
        self.is_succeeded = True  # from here on: an end of this process leaves all as it is
        released = self._going.let_go()
        if not self._took(channel, {"pod_uid": self._pod_uid, "released": released}):
            self.is_succeeded = False
            if not self._stopping.is_set():
                log.error("the successor did not take over: this plugin goes on")
                self._going.go_on()
            return False
        log.info("handed over")
        return True

    def _took(self, channel: socket.socket, answer: dict[str, Any]) -> bool:
        try:
            channel.send(json.dumps(answer).encode())
            channel.settimeout(TAKE_SECONDS)
            return bool(json_text.parse(channel.recv(PACKET_BYTES_MAX) or b"null"))
        except (OSError, ValueError):
            return False

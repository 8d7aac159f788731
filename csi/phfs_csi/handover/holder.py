"""`phfs-csi hold`: a process that does nothing but hold the connections of mounts (see `phfs_fuse.host.holder_link`).

It runs in a container of its own: whatever happens to the plugin's, the kernel keeps the mounts as long as one
descriptor of each is open, and the next keepers take them up again. A holder that starts where another one listens
takes over what that one has, so that an upgrade of the pod hands them on.

State: the descriptors by name, the listening socket and its connections. Standard library only, one thread.
"""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from phfs_csi.handover.succession import Marks, is_of_us, listen, wait_until_alone
from phfs_fuse.config import json_text
from phfs_fuse.errors import LocalStateError
from phfs_fuse.host.fusemount import is_connected
from phfs_fuse.host.holder_link import PACKET_BYTES_MAX, Held, HolderLink

log = logging.getLogger(__name__)

ROLE: Final = "holder"
CONNECTIONS_MAX: Final = 1024
NAME_CHARS_MAX: Final = 4096
FAILED_SECONDS: Final = 0.1  # until the next connection is served


class Holder:
    def __init__(self, path: Path, pod_uid: str = "") -> None:
        """Take over from a holder that listens at `path`, then listen there. Raises: LocalStateError."""
        self._path = path
        self._pod_uid = pod_uid
        self._held: dict[str, Held] = {}
        self._channels: set[socket.socket] = set()
        self._poll = select.poll()
        self._handlers: dict[int, Callable[[], None]] = {}
        self._ending = False
        self._succeeded = False
        before = _predecessor(path)
        if before is not None:
            self._take_over(before)
        self._listener = listen(path)
        self._watch(self._listener.fileno(), select.POLLIN, self._accept)
        if before is not None:  # only now: who asks in between finds one of us
            with suppress(LocalStateError):
                Marks(path, ROLE).set(before.succeed(), but=pod_uid)
            before.close()

    def run(self) -> bool:
        """Hold until another holder takes over (True), or until SIGTERM when nothing is held.

        On SIGTERM with mounts that nobody else holds it goes on: they end with this process.
        """
        heard, wakeup = socket.socketpair()
        with heard, wakeup:
            wakeup.setblocking(False)
            signal.set_wakeup_fd(wakeup.fileno())
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda _number, _frame: None)
            self._watch(heard.fileno(), select.POLLIN, lambda: self._on_signal(heard))
            log.info("holding path=%s mounts=%d", self._path, len(self._held))
            while not self._succeeded and not (self._ending and not self._held):
                for fd, _events in self._poll.poll()[:1]:  # what one does may close the next
                    self._handle(fd)
            signal.set_wakeup_fd(-1)
        for name in list(self._held):
            self._drop(name)
        self._listener.close()
        for channel in list(self._channels):  # who had one asks the next holder
            channel.close()
        log.info("ended path=%s succeeded=%s", self._path, self._succeeded)
        return self._succeeded and not self._ending  # asked to end: it was only waiting for that

    def _handle(self, fd: int) -> None:
        """Nothing that one connection brings about may end the others."""
        try:
            self._handlers[fd]()
        except Exception:
            log.exception("a connection failed for a reason that nobody foresaw")
            time.sleep(FAILED_SECONDS)  # what it should have read may be there still

    def _take_over(self, before: HolderLink) -> None:
        name = ""
        while (held := before.after(name)) is not None:
            name = held.name
            self._keep(held)
        log.info("took over mounts=%d", len(self._held))

    def _watch(self, fd: int, events: int, handler: Callable[[], None]) -> None:
        self._poll.register(fd, events)
        self._handlers[fd] = handler

    def _forget(self, fd: int) -> None:
        self._poll.unregister(fd)
        del self._handlers[fd]

    def _on_signal(self, heard: socket.socket) -> None:
        heard.recv(64)
        self._ending = True
        if self._held:
            log.warning("asked to end, but mounts=%d would end too: waiting for another holder", len(self._held))

    # --- connections

    def _accept(self) -> None:
        channel, _address = self._listener.accept()
        if not is_of_us(channel) or len(self._handlers) > CONNECTIONS_MAX + len(self._held):
            channel.close()
            return
        channel.setblocking(False)
        self._channels.add(channel)
        self._watch(channel.fileno(), select.POLLIN, lambda: self._serve(channel))

    def _serve(self, channel: socket.socket) -> None:
        """One request, or the end of the connection."""
        fds: list[int] = []
        try:
            packet, fds, _flags, _address = socket.recv_fds(channel, PACKET_BYTES_MAX, 1, socket.MSG_CMSG_CLOEXEC)
            if not packet:
                raise ConnectionError
            answer, given = self._answer(packet, fds)
            socket.send_fds(channel, [json.dumps(answer).encode()], given)
        except OSError:  # gone, or takes no answer: it will ask again
            self._forget(channel.fileno())
            self._channels.discard(channel)
            channel.close()
        finally:
            for fd in fds:
                if fd not in self._handlers:
                    os.close(fd)

    def _answer(self, packet: bytes, fds: Sequence[int]) -> tuple[dict[str, str], list[int]]:
        try:
            request = json_text.parse(packet)
            match request["op"]:
                case "keep":
                    self._keep(Held(_text(request, "name"), _text(request, "device"), _connection(fds)))
                case "take":
                    return self._show(self._held.get(_text(request, "name")))
                case "next":
                    after = [name for name in self._held if name > _text(request, "after")]
                    return self._show(self._held[min(after)] if after else None)
                case "drop":
                    self._drop(_text(request, "name"))
                case "succeed":
                    self._succeeded = True
                    return {"pod_uid": self._pod_uid}, []
                case other:
                    raise ValueError(f"no such op: {other!r}")
        except Exception as exc:  # of whatever kind: the holder is all that the mounts have
            return {"error": f"not understood: {exc}"}, []
        return {}, []

    # --- descriptors

    def _show(self, held: Held | None) -> tuple[dict[str, str], list[int]]:
        return ({}, []) if held is None else ({"name": held.name, "device": held.device}, [held.fd])

    def _keep(self, held: Held) -> None:
        self._drop(held.name)
        self._held[held.name] = held
        # No events asked for: an error is told in any case, and means that the mount has ended.
        self._watch(held.fd, 0, lambda: self._drop(held.name))
        log.info("holds name=%s device=%s", held.name, held.device)

    def _drop(self, name: str) -> None:
        if (held := self._held.pop(name, None)) is not None:
            self._forget(held.fd)
            os.close(held.fd)
            log.info("let go name=%s", name)


def hold(path: Path, pod_uid: str = "") -> None:
    """The command. In a pod that was succeeded it idles, as its container would be restarted: until SIGTERM, or until
    it is needed again. Raises: LocalStateError."""
    marks = Marks(path, ROLE)
    is_succeeded = marks.is_set(pod_uid)
    while True:
        if is_succeeded:
            log.info("another pod has taken over: idle")
            if not _wait_for_our_turn(path):
                return
            marks.clear(pod_uid)
        is_succeeded = Holder(path, pod_uid).run()
        if not is_succeeded or not pod_uid:
            return


def _wait_for_our_turn(path: Path) -> bool:
    """False: asked to end."""
    ending = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: ending.set())
    wait_until_alone(path, ending)
    return not ending.is_set()


def _text(request: dict[str, Any], name: str) -> str:
    text = request[name]
    if not isinstance(text, str) or len(text) > NAME_CHARS_MAX:
        raise ValueError(f"{name}: not a string, or too long")
    return text


def _connection(fds: Sequence[int]) -> int:
    if len(fds) != 1 or not is_connected(fds[0]):
        raise ValueError("one descriptor of a living mount is needed")
    return fds[0]


def _predecessor(path: Path) -> HolderLink | None:
    try:
        return HolderLink(path)
    except LocalStateError:
        return None

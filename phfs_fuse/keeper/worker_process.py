"""The processes that serve a mount, one after the other, as the keeper sees them. Standard library only.

State, of each: its process and the packet line to it (`messages`); of all: when they were started again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Protocol

from phfs_fuse.host import fusemount
from phfs_fuse.keeper import messages
from phfs_fuse.keeper.event_loop import EventLoop
from phfs_fuse.keeper.messages import Kind, Message

log = logging.getLogger(__name__)

RESTART_DELAYS: Final = (0.0, 0.2, 1.0, 3.0, 8.0)  # seconds before the n-th restart within RESTARTS_SECONDS
RESTARTS_SECONDS: Final = 60.0  # with one more death in this time than there are delays the keeper gives up
END_SECONDS: Final = 5.0  # for a child that has nothing left to do

Handlers = Mapping[Kind, Callable[[Message], None]]


class Process(Protocol):
    """What is used of a child: `subprocess.Popen`, or a fork."""

    @property
    def pid(self) -> int: ...

    def kill(self) -> None: ...

    def wait(self, timeout: float | None = None) -> int: ...


Launch = Callable[[Sequence[str], Sequence[int]], Process]  # arguments and descriptors of a worker -> its process


class Worker:
    def __init__(self, loop: EventLoop, launch: Launch, arguments: Sequence[str]) -> None:
        """Start it. Raises: OSError."""
        self._loop = loop
        self.link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.link.setblocking(False)
        with theirs:
            try:
                self._process = launch([*arguments, "--fd", str(theirs.fileno())], [theirs.fileno()])
            except OSError:
                self.link.close()
                raise
        self._pidfd = os.pidfd_open(self._process.pid)
        self._handlers: Handlers = {}

    def hear(self, handlers: Handlers, on_end: Callable[[int], None]) -> None:
        """From now on each message goes to its handler. `on_end` is called once, with the exit code, after the
        last words."""
        self._handlers = handlers
        self._loop.watch(self.link, self._on_packet)
        self._loop.watch(self._pidfd, lambda: self._on_end(on_end))

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        with contextlib.suppress(OSError):  # its end is seen apart
            socket.send_fds(self.link, [messages.encode(message)], fds)

    def kill(self) -> None:
        self._process.kill()

    def end(self) -> None:
        """Let it see that nobody is there any more."""
        self.link.close()
        try:
            self._process.wait(END_SECONDS)
        except (subprocess.TimeoutExpired, TimeoutError):
            self._process.kill()

    def reap(self) -> int:
        """Close all that belongs to it; returns its exit code when it has one."""
        for source in (self._pidfd, self.link):
            self._loop.forget(source)
        os.close(self._pidfd)
        self.link.close()
        return self._process.wait()

    def _on_packet(self) -> None:
        """Handle one message, or stop listening at the end of file: the end of the process is seen apart."""
        try:
            packet = self.link.recv(messages.PACKET_BYTES_MAX)
        except (ConnectionError, BlockingIOError):
            packet = b""
        if not packet:
            self._loop.forget(self.link)
            return
        try:
            message = messages.decode(packet)
            handler = self._handlers[message.kind]
        except (ValueError, TypeError, KeyError):  # from a newer worker: not a reason to lose the mount
            log.error("not understood, ignored: %r", packet)
        else:
            handler(message)

    def _on_end(self, on_end: Callable[[int], None]) -> None:
        while self._loop.watches(self.link):
            self._on_packet()
        on_end(self.reap())


class Restarts:
    """How long to wait before a worker that has died is started again."""

    def __init__(self) -> None:
        self._times: deque[float] = deque()

    def next_delay(self) -> float | None:
        """None: too many have died."""
        now = time.monotonic()
        while self._times and self._times[0] < now - RESTARTS_SECONDS:
            self._times.popleft()
        if len(self._times) == len(RESTART_DELAYS):
            return None
        self._times.append(now)
        return RESTART_DELAYS[len(self._times) - 1]


def execute(command: Sequence[str], arguments: Sequence[str], fds: Sequence[int]) -> subprocess.Popen[bytes]:
    """A worker of what is installed now. Raises: OSError."""
    return subprocess.Popen(
        [*command, *arguments],
        env=fusemount.environment(),
        stdin=subprocess.DEVNULL,
        pass_fds=fds,
        start_new_session=True,  # Ctrl-C at a terminal is for the keeper alone
    )


def ending(code: int) -> str:
    """For people."""
    return signal.Signals(-code).name if code < 0 else f"status {code}"

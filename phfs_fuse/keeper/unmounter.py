"""How the keeper unmounts: by a child, since umount(2) may wait for the worker. Standard library only.

State: the child, and whether the mount has left the tree.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

from phfs_fuse.errors import MountpointError
from phfs_fuse.host import fusemount
from phfs_fuse.host.fusemount import UNMOUNT_SECONDS
from phfs_fuse.keeper.event_loop import EventLoop
from phfs_fuse.keeper.messages import Kind, Message


class Unmounter:
    """`answer` gets UNMOUNTED or BUSY for what was started."""

    def __init__(self, loop: EventLoop, mountpoint: Path, answer: Callable[[Message], None]) -> None:
        self._loop = loop
        self._mountpoint = mountpoint
        self._answer = answer
        self._child: subprocess.Popen[bytes] | None = None
        self.is_done = False  # detached, though perhaps still in use

    @property
    def is_under_way(self) -> bool:
        return self._child is not None

    def start(self, message: Message) -> None:
        """Do what UNMOUNT asks for."""
        if self._child is not None:
            return  # asked by a worker that died; its answer serves this one
        try:
            child = fusemount.start_unmount(self._mountpoint, lazy=message.lazy)
        except MountpointError as exc:
            self._answer(Message(kind=Kind.BUSY, reason=str(exc)))
            return
        self._child = child
        pidfd = os.pidfd_open(child.pid)
        self._loop.watch(pidfd, lambda: self._on_end(child, pidfd))
        self._loop.call_later(UNMOUNT_SECONDS, child.kill)

    def wait(self, seconds: float) -> None:
        """For what is under way."""
        if self._child is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(seconds)

    def _on_end(self, child: subprocess.Popen[bytes], pidfd: int) -> None:
        self._loop.forget(pidfd)
        os.close(pidfd)
        self._loop.cancel(child.kill)
        self._child = None
        try:
            fusemount.check_unmounted(child, self._mountpoint)
        except MountpointError as exc:
            self._answer(Message(kind=Kind.BUSY, reason=str(exc)))
        else:
            self.is_done = True
            self._answer(Message(kind=Kind.UNMOUNTED))

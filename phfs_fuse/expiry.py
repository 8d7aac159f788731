"""Tells the kernel that names have to be looked up again. Owns a thread and what it has to tell.

The kernel takes the lock of the directory for that, without a time limit, and a program that waits for the worker may
hold it. A process that waits so cannot be killed: were it the worker, one that dies in this state would never be
gone, and no other could answer the program. So it is a thread of the keeper that waits.
Standard library only: the keeper imports this.

Source: include/uapi/linux/fuse.h (FUSE_NOTIFY_INVAL_ENTRY); FUSE_EXPIRE_ONLY since Linux 6.2, before that the name is
dropped, which must not happen to a directory in use.
"""

from __future__ import annotations

import contextlib
import os
import queue
import re
import socket
import struct
import threading
from collections.abc import Sequence
from typing import Final

FUSE_NOTIFY_INVAL_ENTRY: Final = 3
FUSE_EXPIRE_ONLY: Final = 1
_NOTIFICATION: Final = struct.Struct("<IiQQII")  # length, code, 0; parent, length of the name, flags

Name = tuple[int, bytes]
"""Inode number of the directory, name in it."""


def can_expire() -> bool:
    """Whether this kernel can be told without dropping the name."""
    found = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return found is not None and (int(found[1]), int(found[2])) >= (6, 2)


class Expiry:
    """Of the connection `device`."""

    def __init__(self, device: int) -> None:
        self._device = device
        self._work: queue.SimpleQueue[tuple[Sequence[Name], socket.socket, bytes]] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="expiry", daemon=True).start()

    def expire(self, names: Sequence[Name], link: socket.socket, answer: bytes) -> None:
        """Does not wait: `answer` is sent to `link` when the kernel was told."""
        self._work.put((names, link, answer))

    def _run(self) -> None:
        flags = FUSE_EXPIRE_ONLY if can_expire() else 0
        while True:
            names, link, answer = self._work.get()
            for ino, name in names:
                length = _NOTIFICATION.size + len(name) + 1
                head = _NOTIFICATION.pack(length, FUSE_NOTIFY_INVAL_ENTRY, 0, ino, len(name), flags)
                with contextlib.suppress(OSError):  # not known to the kernel, or the mount has ended
                    os.write(self._device, head + name + b"\0")
            with contextlib.suppress(OSError):
                link.send(answer)

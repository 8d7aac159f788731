"""Tells the kernel that names have to be looked up again, or dropped. Owns a thread and what it has to tell.

The kernel takes the lock of the directory for that, without a time limit, and a program that waits for the worker may
hold it; an inode that goes with its name may have pages that wait for the worker too. A process that waits so cannot
be killed: were it the worker, one that dies in this state would never be gone, and no other could answer the program.
So it is a thread of the keeper that waits.
Standard library only: the keeper imports this.

Source: include/uapi/linux/fuse.h (FUSE_NOTIFY_INVAL_ENTRY); FUSE_EXPIRE_ONLY since Linux 6.2, before that the name is
dropped, which must not happen to a directory in use.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import re
import socket
import struct
import threading
from collections.abc import Sequence
from typing import Final

from phfs_fuse.types import Name

FUSE_NOTIFY_INVAL_ENTRY: Final = 3
FUSE_EXPIRE_ONLY: Final = 1
CLONE_FILES: Final = 0x400  # Source: clone(2)
FDS_MAX: Final = 1 << 20
_NOTIFICATION: Final = struct.Struct("<IiQQII")  # length, code, 0; parent, length of the name, flags


def can_expire() -> bool:
    """Whether this kernel can be told without dropping the name."""
    found = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return found is not None and (int(found[1]), int(found[2])) >= (6, 2)


class KernelNotifier:
    """Of the connection `device`. `fileno` is readable when `answer` is to be called.

    The thread has a descriptor table of its own, with the connection and a pipe alone: a process that is to be gone
    but cannot, because this thread waits, then holds no lock and no socket that the next one needs.
    """

    def __init__(self, device: int) -> None:
        self._device = device
        self._told, self._tell = os.pipe()
        self._work: queue.SimpleQueue[tuple[Sequence[Name], bool, socket.socket, bytes]] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[tuple[socket.socket, bytes]] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="expiry", daemon=True).start()

    def fileno(self) -> int:
        return self._told

    def expire(self, names: Sequence[Name], link: socket.socket, answer: bytes, *, drop: bool = False) -> None:
        """Does not wait: `answer` is for `link` when the kernel was told. With `drop` it forgets the names, and what
        it believes of their files unless these are open."""
        self._work.put((names, drop, link, answer))

    def answer(self) -> None:
        """Send the answers of what is done."""
        os.read(self._told, 4096)
        with contextlib.suppress(queue.Empty):
            while True:
                link, answer = self._done.get_nowait()
                with contextlib.suppress(OSError):
                    link.send(answer)

    def _run(self) -> None:
        _have_only(self._device, self._tell)
        expire_only = FUSE_EXPIRE_ONLY if can_expire() else 0
        while True:
            names, drop, link, answer = self._work.get()
            flags = 0 if drop else expire_only
            for ino, name in names:
                length = _NOTIFICATION.size + len(name) + 1
                head = _NOTIFICATION.pack(length, FUSE_NOTIFY_INVAL_ENTRY, 0, ino, len(name), flags)
                with contextlib.suppress(OSError):  # not known to the kernel, or the mount has ended
                    os.write(self._device, head + name + b"\0")
            self._done.put((link, answer))
            os.write(self._tell, b"x")


def _have_only(*fds: int) -> None:
    """Let this thread have a descriptor table of its own, with these alone. Source: unshare(2)."""
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_FILES):
        return  # it shares all, as threads do
    last = -1
    for fd in sorted(fds):
        os.closerange(last + 1, fd)
        last = fd
    os.closerange(last + 1, FDS_MAX)

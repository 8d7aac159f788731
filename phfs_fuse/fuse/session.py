"""libfuse's session on the connection that the keeper has made.

State: in pyfuse3, one session per process.
"""

from __future__ import annotations

import logging
import os
import socket
import struct
from collections.abc import Callable
from enum import Flag
from pathlib import Path
from typing import Final

import pyfuse3
import trio

from phfs_fuse.fuse.eager_requests import eager_requests
from phfs_fuse.fuse.statfs_inode import telling

log = logging.getLogger(__name__)

# One task serves one request until it is answered: so many may wait for the store before answers that need no
# store wait too. An idle task holds 1 MiB of address space, of which it touches a page or two.
TASKS_MIN: Final = 10
TASKS_MAX: Final = 1000

# Source: include/uapi/linux/fuse.h
MINOR: Final = 31  # of protocol 7: Linux 5.4, and all that libfuse needs to know
FUSE_INIT: Final = 26
FUSE_NOTIFY_RESEND: Final = 7
WRITE_BYTES_MAX: Final = 1 << 20  # of one request, and what libfuse's buffer holds
# Read-ahead and write-back requests under way. At the kernel's 12, a few that wait for the store hold up all others.
BACKGROUND_MAX: Final = 128


class InitFlag(Flag):
    """What this session asks of the kernel, where the kernel has it."""

    ASYNC_READ = 1 << 0
    ATOMIC_O_TRUNC = 1 << 3
    EXPORT_SUPPORT = 1 << 4
    BIG_WRITES = 1 << 5
    AUTO_INVAL_DATA = 1 << 12
    DO_READDIRPLUS = 1 << 13
    ASYNC_DIO = 1 << 15
    WRITEBACK_CACHE = 1 << 16
    PARALLEL_DIROPS = 1 << 18
    MAX_PAGES = 1 << 22


_REQUEST: Final = struct.Struct("<IIQQIIIHH")  # length, opcode, unique, nodeid, uid, gid, pid, extensions, -
_INIT_IN: Final = struct.Struct("<IIIII11I")  # major, minor, max_readahead, flags, flags2, -
_REPLY: Final = struct.Struct("<IiQ")  # length, error, unique; of a notification: length, code, 0
# major, minor, max_readahead, flags, max_background, congestion_threshold, max_write, time_gran, max_pages, -
_INIT_OUT: Final = struct.Struct("<IIIIHHIIH34x")
_PRETENDED_UNIQUE: Final = 0x7FFF_FFFF_FFFF_FFF0  # the kernel counts up from 2: no request of it has this number
_PRETENDED_FLAGS: Final = 0x3FFF_FFFF  # everything: what libfuse then chooses stays within this process


class Session:
    """libfuse's session on the connection behind `fd`, which it takes over. One per process.

    The kernel shakes hands once per connection, so that a worker that resumes has to pretend towards libfuse that
    it did: libfuse reads a request of our own from a socket, in whose place the connection then is put. The first
    worker does the same, after it has answered the kernel itself: libfuse's answer would leave things out
    (PARALLEL_DIROPS, in libfuse 3.14) or has no setting for them (max_background).
    """

    def __init__(
        self,
        ops: pyfuse3.Operations,
        fd: int,
        *,
        resume: bool,
        on_statfs: Callable[[int], None],
        on_fallocate: Callable[[int], int],
    ) -> None:
        """`on_statfs` hears the inode right before a statfs handler is called; `on_fallocate` says how to answer one
        that ends at a byte."""
        self.established = trio.Event()  # requests are answered from now on
        self._fd, self._resume = fd, resume
        if not resume:
            _shake_hands(fd, _wanted(ops))
        self._then = ops.init
        ops.init = self._on_init  # type: ignore[method-assign]
        self._session_fd = _pretended_kernel()
        with telling(Path(pyfuse3.__file__), on_statfs, on_fallocate):
            pyfuse3.init(ops, f"/dev/fd/{self._session_fd}", set(pyfuse3.default_options))

    async def serve(self) -> None:
        """Service: answer requests until the mount has ended, by umount or by an abort of the connection."""
        with eager_requests(self._session_fd):
            await pyfuse3.main(min_tasks=TASKS_MIN, max_tasks=TASKS_MAX)

    def stop(self) -> None:
        """Have `serve` return although the mount has not ended: programs that hold on to it get ENOTCONN."""
        pyfuse3.terminate()

    def close(self) -> None:
        """Free the session. Does not unmount: a mount without a server stays broken."""
        pyfuse3.close(unmount=False)

    def _on_init(self) -> None:
        """Called by libfuse when it has read FUSE_INIT, before it answers and before the loop waits again."""
        self._then()
        # Here and not later: afterwards the loop waits on the descriptor already. libfuse's answer goes to the
        # living connection, which knows no such request: ENOENT, which libfuse ignores.
        os.dup2(self._fd, self._session_fd, inheritable=False)
        os.close(self._fd)
        if self._resume:
            _ask_again(self._session_fd)
        self.established.set()


def _wanted(ops: pyfuse3.Operations) -> InitFlag:
    wanted = ~InitFlag(0)
    if not ops.enable_writeback_cache:
        wanted &= ~InitFlag.WRITEBACK_CACHE
    return wanted if ops.supports_dot_lookup else wanted & ~InitFlag.EXPORT_SUPPORT


def _shake_hands(fd: int, wanted: InitFlag) -> None:
    """Answer the FUSE_INIT that the kernel queued at mount."""
    request = os.read(fd, WRITE_BYTES_MAX)
    _length, opcode, unique, *_ = _REQUEST.unpack_from(request)
    _major, _minor, read_ahead_bytes, offered = struct.unpack_from("<4I", request, _REQUEST.size)
    assert opcode == FUSE_INIT, opcode
    flags = wanted.value & offered
    background = (BACKGROUND_MAX, BACKGROUND_MAX * 3 // 4)
    pages_max = WRITE_BYTES_MAX // os.sysconf("SC_PAGE_SIZE")
    body = _INIT_OUT.pack(7, MINOR, read_ahead_bytes, flags, *background, WRITE_BYTES_MAX, 1, pages_max)
    os.write(fd, _REPLY.pack(_REPLY.size + len(body), 0, unique) + body)
    log.debug("the kernel offered %#x and got %s", offered, InitFlag(flags))


def _ask_again(fd: int) -> None:
    """Have the kernel send again what the worker before had taken and not answered. Needs Linux 6.9."""
    try:
        os.write(fd, _REPLY.pack(_REPLY.size, FUSE_NOTIFY_RESEND, 0))
    except OSError as exc:
        log.warning("requests that were in work at the restart stay stuck until killed: %s", exc.strerror)


def _pretended_kernel() -> int:
    """A descriptor from which libfuse reads a FUSE_INIT request."""
    ours, kernel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    body = _INIT_IN.pack(7, MINOR, 128 << 10, _PRETENDED_FLAGS, 0, *([0] * 11))
    length = _REQUEST.size + len(body)
    with kernel:
        kernel.send(_REQUEST.pack(length, FUSE_INIT, _PRETENDED_UNIQUE, 0, 0, 0, 0, 0, 0) + body)
    return ours.detach()

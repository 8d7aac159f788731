"""Takes the kernel's next request at once where one waits already. Owns no state but when the loop has its turn.

pyfuse3 takes each request by a lock and a wait for the descriptor, two turns of trio's loop: 30 µs of CPU on a
machine where its handlers need 5. A program that works on a mount asks again as soon as it has its answer, so mostly
the next request is there when the answer has been written: a poll(2) of 1 µs finds out. Everybody else in the loop
(answers of the store, timers) has a turn at least every TURN_SECONDS.
"""

from __future__ import annotations

import ctypes
import logging
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import pyfuse3

from phfs_fuse import metrics

log = logging.getLogger(__name__)

TURN_SECONDS: Final = 0.001
_POLLIN: Final = 1  # Source: poll(2)
_POLLFD: Final = struct.Struct("ihh")


@contextmanager
def eager_requests(fd: int) -> Iterator[None]:
    """For a `pyfuse3.main` that serves the connection behind `fd` meanwhile, in one thread."""
    stock = getattr(pyfuse3, "_wait_fuse_readable", None)
    if stock is None:
        log.warning("this pyfuse3 waits for requests in another way: they are taken one a turn")
        yield
        return
    asked = ctypes.create_string_buffer(_POLLFD.pack(fd, _POLLIN, 0), _POLLFD.size)
    at = ctypes.addressof(asked)
    poll = ctypes.PyDLL(None).poll  # it never waits: another thread that got the interpreter might keep it for 5 ms
    poll.argtypes = [ctypes.c_void_p, ctypes.c_ulong, ctypes.c_int]
    clock = time.perf_counter
    turn_ends = 0.0

    async def wait() -> bool:
        """In place of pyfuse3's: True if the next request can be read, False if the loop has to end."""
        nonlocal turn_ends
        if clock() < turn_ends and poll(at, 1, 0):
            return True
        while await stock():
            metrics.FUSE_WAITS.add()
            turn_ends = clock() + TURN_SECONDS
            if poll(at, 1, 0):  # else somebody was quicker
                return True
        return False

    pyfuse3._wait_fuse_readable = wait  # type: ignore[attr-defined]
    try:
        yield
    finally:
        pyfuse3._wait_fuse_readable = stock  # type: ignore[attr-defined]
        del asked

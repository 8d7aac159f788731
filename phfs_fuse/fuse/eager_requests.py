"""Takes the kernel's next request at once where one waits or is about to come.

Owns when the loop has its turn, and for how long it may still be polled in vain.

pyfuse3 takes each request by a lock and a wait for the descriptor, two turns of trio's loop: 30 µs of CPU on a
machine where its handlers need 5. A program that works on a mount asks again as soon as it has its answer: the next
request is there when the answer has been written, or some µs later, when the program has been woken. A poll(2) of
1 µs finds out, and where that has been worth it, is repeated for so long. Everybody else in the loop (answers of the
store, timers) has a turn at least every TURN_SECONDS.
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
SPIN_SECONDS: Final = 20e-6  # measured: a program that has waited for nothing else asks again after 7 to 15 µs
CREDIT_SECONDS: Final = 100e-6  # that may be spent in vain ...
CREDIT_PER_TURN: Final = 2e-6  # ... and what of it comes back, without success, with each turn of the loop
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
    credit = CREDIT_SECONDS

    async def wait() -> bool:
        """In place of pyfuse3's: True if the next request can be read, False if the loop has to end."""
        nonlocal turn_ends, credit
        if (now := clock()) < turn_ends:
            if poll(at, 1, 0):
                return True
            if credit > 0:
                spin_ends = now + SPIN_SECONDS
                while clock() < spin_ends:
                    if poll(at, 1, 0):
                        credit = CREDIT_SECONDS
                        return True
                credit -= SPIN_SECONDS
        while await stock():
            metrics.FUSE_WAITS.add()
            turn_ends = clock() + TURN_SECONDS
            credit = min(CREDIT_SECONDS, credit + CREDIT_PER_TURN)
            if poll(at, 1, 0):  # else somebody was quicker
                return True
        return False

    pyfuse3._wait_fuse_readable = wait  # type: ignore[attr-defined]
    try:
        yield
    finally:
        pyfuse3._wait_fuse_readable = stock  # type: ignore[attr-defined]
        del asked

"""Gives memory back to the system after the kernel has forgotten many inodes. Owns how many there were.

What is freed stays with the C library, between what is in use, until it is asked for it. That takes milliseconds, so
it is done once for many, and not while more are being forgotten.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from typing import Final

import trio

from phfs_fuse.tree.inodes import Inodes

LOOK_SECONDS: Final = 5.0
FORGOTTEN_MIN: Final = 10_000  # some 5 MB


def trim() -> bool:
    """Returns whether the C library can do it. Source: malloc_trim(3), of glibc."""
    libc = ctypes.CDLL(None)  # lets other threads run meanwhile
    return hasattr(libc, "malloc_trim") and bool(libc.malloc_trim(0) >= 0)


class Memory:
    def __init__(self, inodes: Inodes, give_back: Callable[[], object] = trim) -> None:
        self._inodes = inodes
        self._give_back = give_back
        self._most = 0  # inodes, since memory was given back
        self._last = 0

    async def run(self) -> None:
        """Service."""
        while True:
            await trio.sleep(LOOK_SECONDS)
            await self.look()

    async def look(self) -> None:
        count, before = len(self._inodes), self._last
        self._last = count
        self._most = max(self._most, count)
        if count >= before and self._most - count >= FORGOTTEN_MIN:
            self._most = count
            self._inodes.shrink()
            gc.collect()  # also empties the interpreter's lists of spare objects, each of which keeps 1 MiB in use
            await trio.to_thread.run_sync(self._give_back)

"""Waiting for descriptors and for other processes. Owns no state; standard library only."""

from __future__ import annotations

import os
import select


def readable(fd: int, timeout: float | None) -> bool:
    """Whether it can be read, or has ended, in time. poll(2) in place of select(2): a plugin may have many
    descriptors."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(None if timeout is None else timeout * 1000))


def ended(pid: int, timeout: float | None) -> bool:
    """Whether the process, which need not be a child, ended in time. One that nobody has reaped has ended."""
    try:
        watch = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return readable(watch, timeout)
    finally:
        os.close(watch)

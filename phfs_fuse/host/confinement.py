"""The confinement of a process that serves a mount: no new privileges, no core file, and no look into its memory,
which holds credentials and files of users. Owns no state; standard library only."""

from __future__ import annotations

import ctypes
import os
import resource
from collections.abc import Mapping
from typing import Final

SWITCH: Final = "PHFS_OPEN_TO_PROFILERS"
# Source: linux/prctl.h
_PR_SET_DUMPABLE: Final = 4
_PR_SET_NO_NEW_PRIVS: Final = 38


def confine(environ: Mapping[str, str] = os.environ) -> None:
    """For good, also for programs that this process starts. With SWITCH set to 1 a profiler or debugger of the same
    user may attach, and there may be a core file."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if environ.get(SWITCH) != "1":
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)

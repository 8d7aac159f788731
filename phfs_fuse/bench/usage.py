"""Memory and CPU time of the processes of a mount, from /proc. Owns the thread that looks now and then."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

LOOK_SECONDS: Final = 0.1
_TICK_SECONDS: Final = 1 / os.sysconf("SC_CLK_TCK")
_PROC: Final = Path("/proc")


@dataclass(slots=True)
class Usage:
    """The highest sums over all processes, and the CPU seconds that they took since they serve."""

    pss_bytes: int = 0
    rss_bytes: int = 0
    cpu_seconds: float = 0.0


class Watch:
    """Looks at a process and all that descend from it until `end`."""

    def __init__(self, pid: int) -> None:
        self._pid, self._usage = pid, Usage()
        self._cpu: dict[int, float] = {}
        self._before = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def serving(self) -> None:
        """The start is over: its CPU time does not count."""
        self._before = sum(filter(None, map(cpu_seconds, descendants(self._pid))))

    def end(self) -> Usage:
        self._over.set()
        self._thread.join()
        self._usage.cpu_seconds = max(0.0, sum(self._cpu.values()) - self._before)
        return self._usage

    def _run(self) -> None:
        while True:
            self._look()
            if self._over.wait(LOOK_SECONDS):
                self._look()
                return

    def _look(self) -> None:
        pids = descendants(self._pid)
        pss, rss = (sum(amounts) for amounts in zip(*map(memory, pids), strict=True))
        self._usage.pss_bytes = max(self._usage.pss_bytes, pss)
        self._usage.rss_bytes = max(self._usage.rss_bytes, rss)
        self._cpu |= {pid: seconds for pid in pids if (seconds := cpu_seconds(pid)) is not None}


def descendants(pid: int) -> list[int]:
    """`pid` and the processes below it."""
    found = [pid]
    for one in found:
        with suppress(OSError):
            for task in (_PROC / str(one) / "task").iterdir():
                found += map(int, (task / "children").read_text().split())
    return found


def memory(pid: int) -> tuple[int, int]:
    """(PSS, RSS) in bytes; 0 for a process that is gone or of somebody else."""
    with suppress(OSError):
        lines = (_PROC / str(pid) / "smaps_rollup").read_text().splitlines()
        return _kib(lines, "Pss:"), _kib(lines, "Rss:")
    return 0, 0


def _kib(lines: Iterable[str], name: str) -> int:
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), 0)


def cpu_seconds(pid: int) -> float | None:
    """User and system time of the process; None when it is gone."""
    with suppress(OSError, IndexError):
        fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) * _TICK_SECONDS
    return None

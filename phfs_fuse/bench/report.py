"""The figures for people (tables on a terminal or in a file) and for programs (JSON). Owns no state."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from phfs_fuse.bench.figures import Figures, Summary
from phfs_fuse.bench.sizes import Sizes
from phfs_fuse.bench.systems import REFERENCE
from phfs_fuse.bench.workloads import Workload, title

FORMAT: Final = 1  # of the JSON
WIDTH: Final = 160  # where the output is no terminal
MIB: Final = 1 << 20
TIMES: Final = "Seconds: median (lowest-highest), ratio to the first"
COSTS: Final = "CPU s | peak MiB (PSS) | requests | MiB up / down, of the mounts"


def show(figures: Figures, workloads: Sequence[Workload], names: Sequence[str], sizes: Sizes) -> None:
    """Times, costs, failures on standard output."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDTH)
    console.print(TIMES)
    console.print(times(figures, workloads, names, sizes))
    if figures.costs:
        console.print(f"\n{COSTS}")
        console.print(costs(figures, workloads, names))
    for one in figures.failures:
        console.print(f"FAILED: {one.workload}, {one.system}: {one.reason}", markup=False)


def times(figures: Figures, workloads: Sequence[Workload], names: Sequence[str], sizes: Sizes) -> Table:
    """A row per measure: median with lowest and highest, and how many times as long as the first system."""
    first, *others = [*names, *([REFERENCE] if any(s.system == REFERENCE for s in figures.samples) else [])]
    table = Table("MEASURE", box=None)
    for name in (first, *others):
        table.add_column(name, justify="right")
        if name != first:
            table.add_column("ratio", justify="right")
    for workload in workloads:
        for measure in workload.measures:
            cells = [_time(figures, workload, measure, first)]
            for name in others:
                cells += [_time(figures, workload, measure, name), _ratio(figures.ratio(measure, name, first))]
            table.add_row(escape(title(measure, sizes)), *cells)
    return table


def _time(figures: Figures, workload: Workload, measure: str, name: str) -> str:
    if figures.failure(workload.name, name) is not None:
        return "FAILED"
    found = figures.seconds(measure, name)
    return "-" if found is None else spread(found)


def spread(found: Summary) -> str:
    """`1.200 (1.100-1.310)`, of one sample `1.200`."""
    if found.lowest == found.highest:
        return _seconds(found.median)
    return f"{_seconds(found.median)} ({_seconds(found.lowest)}-{_seconds(found.highest)})"


def _seconds(value: float) -> str:
    return f"{value:.4f}" if value < 0.1 else f"{value:.3f}" if value < 10 else f"{value:.1f}"


def _ratio(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f}x" if value < 10 else f"{value:.0f}x"


def costs(figures: Figures, workloads: Sequence[Workload], names: Sequence[str]) -> Table:
    """A row per workload: what the mount took from the machine and asked of the store."""
    table = Table("WORKLOAD", box=None)
    for name in names:
        table.add_column(name, justify="right")
    for workload in workloads:
        table.add_row(workload.name, *(_cost(figures, workload.name, name) for name in names))
    return table


def _cost(figures: Figures, workload: str, name: str) -> str:
    cost, traffic = figures.cost(workload, name), figures.traffic_of(workload, name)
    used = f"{cost[0]:.1f} | {cost[1] / MIB:.0f}" if cost else "- | -"
    if traffic is None:
        return f"{used} | - | -"
    sent, got = traffic.up_bytes / MIB, traffic.down_bytes / MIB
    return f"{used} | {sum(traffic.requests.values())} | {sent:.1f} / {got:.1f}"


# --- JSON


def write_json(path: Path, figures: Figures, about: Mapping[str, Any]) -> None:
    path.write_text(json.dumps({"format": FORMAT, **about, **figures.as_json()}, indent=1) + "\n")


def machine(work: Path) -> dict[str, Any]:
    """Where the run took place; `work` is where the mounts keep their caches."""
    kind = subprocess.run(["stat", "-f", "-c", "%T", str(work)], capture_output=True, text=True).stdout.strip()
    return {
        "cpu": _line_of("/proc/cpuinfo", "model name") or platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": f"{platform.system()} {platform.release()}",
        "cache_file_system": kind,
        "root": os.geteuid() == 0,
    }


def _line_of(path: str, name: str) -> str:
    lines = Path(path).read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")

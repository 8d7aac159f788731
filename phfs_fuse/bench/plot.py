"""The bar chart: for each measure how many times as long as the first system the others took. Owns no state."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from phfs_fuse.bench.figures import Figures
from phfs_fuse.bench.sizes import Sizes
from phfs_fuse.bench.workloads import Workload, title
from phfs_fuse.errors import UsageError

COLOURS: Final = ("#d95f02", "#7570b3", "#1b9e77", "#e7298a", "#66a61e", "#666666")
ROW_INCHES: Final = 0.19


def require() -> Any:
    """matplotlib. Raises: UsageError with the remedy."""
    try:
        import matplotlib
    except ImportError as exc:
        raise UsageError("--plot needs matplotlib: pip install 'phfs-fuse[bench]'") from exc
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def write(path: Path, figures: Figures, workloads: Sequence[Workload], names: Sequence[str], sizes: Sizes) -> None:
    """Nothing is written when there is no measure of two systems."""
    pyplot = require()
    first, *others = names
    measures = [measure for workload in workloads for measure in workload.measures]
    measures = [m for m in measures if any(figures.ratio(m, name, first) for name in others)]
    if not measures:
        return
    height = 1.0 + len(measures) * (ROW_INCHES * max(len(others), 1) + 0.1)
    figure, axes = pyplot.subplots(figsize=(9, height), layout="constrained")
    thick = 0.82 / max(len(others), 1)
    for number, name in enumerate(others):
        ratios = [figures.ratio(measure, name, first) for measure in measures]
        places = [row + (number - (len(others) - 1) / 2) * thick for row in range(len(measures))]
        bars = axes.barh(
            places,
            [(ratio or 1.0) - 1.0 for ratio in ratios],
            thick * 0.92,
            left=1.0,
            label=name,
            color=COLOURS[number % len(COLOURS)],
        )
        texts = ["" if ratio is None else f" {ratio:.1f}x " for ratio in ratios]
        axes.bar_label(bars, texts, fontsize=7)
    _dress(axes, [title(measure, sizes) for measure in measures], first)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _dress(axes: Any, labels: Sequence[str], first: str) -> None:
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 0.5) * 0.8, max(high, 2) * 1.6)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.axvline(1, color="black", linewidth=1)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.grid(axis="x", which="major", color="#dddddd")
    axes.set_axisbelow(True)
    axes.set_xlabel(f"time, as a multiple of {first}'s (right of 1x: {first} is faster)", fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=6, frameon=False)

"""What the samples say: medians, spread, ratios. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Sample:
    """One measure of one repetition."""

    measure: str
    system: str
    repetition: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a system did not get through a workload."""

    workload: str
    system: str
    repetition: int  # -1: the one that counts requests
    reason: str


@dataclass(frozen=True, slots=True)
class Cost:
    """What one repetition of a workload took from the machine, from the moment that the mount serves to its end."""

    workload: str
    system: str
    repetition: int
    pss_bytes: int
    rss_bytes: int
    cpu_seconds: float


@dataclass(frozen=True, slots=True)
class Traffic:
    """What a repetition of its own, which is not timed, asked of the store."""

    workload: str
    system: str
    requests: dict[str, int]  # by method
    up_bytes: int
    down_bytes: int


@dataclass(slots=True)
class Figures:
    """All that a run found, raw."""

    samples: list[Sample] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    costs: list[Cost] = field(default_factory=list)
    traffic: list[Traffic] = field(default_factory=list)

    def seconds(self, measure: str, system: str) -> Summary | None:
        return summary([s.seconds for s in self.samples if (s.measure, s.system) == (measure, system)])

    def failure(self, workload: str, system: str) -> str | None:
        found = (one.reason for one in self.failures if (one.workload, one.system) == (workload, system))
        return next(found, None)

    def cost(self, workload: str, system: str) -> tuple[float, int, int] | None:
        """Median CPU seconds, highest PSS, highest RSS."""
        found = [one for one in self.costs if (one.workload, one.system) == (workload, system)]
        if not found:
            return None
        cpu = statistics.median(one.cpu_seconds for one in found)
        return cpu, max(one.pss_bytes for one in found), max(one.rss_bytes for one in found)

    def traffic_of(self, workload: str, system: str) -> Traffic | None:
        return next((one for one in self.traffic if (one.workload, one.system) == (workload, system)), None)

    def ratio(self, measure: str, system: str, first: str) -> float | None:
        """How many times as long as `first` it took, by the medians."""
        ours, theirs = self.seconds(measure, first), self.seconds(measure, system)
        return theirs.median / ours.median if ours and theirs and ours.median > 0 else None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Summary:
    median: float
    lowest: float
    highest: float


def summary(values: Sequence[float]) -> Summary | None:
    """None of nothing."""
    return Summary(statistics.median(values), min(values), max(values)) if values else None

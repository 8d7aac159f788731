"""A run: each workload, each repetition, each system in turn. Owns the prefix in the store and the work folder."""

from __future__ import annotations

import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from boto3.exceptions import Boto3Error
from botocore.exceptions import BotoCoreError, ClientError

from phfs_fuse.bench.figures import Cost, Failure, Figures, Sample, Traffic
from phfs_fuse.bench.loads import MIB
from phfs_fuse.bench.processes import Actor, Failed, Relay, actor, mounted
from phfs_fuse.bench.sizes import Sizes
from phfs_fuse.bench.store import Store
from phfs_fuse.bench.systems import REFERENCE, System, Target
from phfs_fuse.bench.trial import Sources, Trial, drop_page_cache
from phfs_fuse.bench.usage import Usage
from phfs_fuse.bench.workloads import Workload
from phfs_fuse.host.mount_table import mount_table

COUNTING: Final = -1  # the repetition that counts requests and is not timed
KEPT_BYTES_MAX: Final = 64 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is to be run. `relay`: in front of the store, for a delay or for the counts."""

    workloads: Sequence[Workload]
    sizes: Sizes
    repetitions: int
    timeout_seconds: float
    work: Path
    store: Store | None = None
    prefix: str = ""
    systems: Sequence[System] = ()
    folders: Mapping[str, Path] = field(default_factory=dict)  # instead of systems: mounted already
    credentials: Mapping[str, str] = field(default_factory=dict)
    relay: Relay | None = None
    through_relay: bool = False  # in all repetitions, not only in the one that counts
    counts: bool = False  # one repetition more, through the relay, which counts requests

    @property
    def names(self) -> list[str]:
        return list(self.folders) or [system.name for system in self.systems]


@dataclass(frozen=True, slots=True)
class Step:
    workload: Workload
    name: str  # of the system
    repetition: int

    @property
    def is_timed(self) -> bool:
        return self.repetition != COUNTING

    def __str__(self) -> str:
        which = f"repetition {self.repetition + 1}" if self.is_timed else "counting requests"
        return f"{self.workload.name}: {self.name}, {which}"


def steps(plan: Plan) -> list[Step]:
    """Interleaved: the systems take turns, and a different one begins each repetition."""
    found = []
    for workload in plan.workloads:
        names = plan.names + ([REFERENCE] if workload.reference and plan.store is not None else [])
        for repetition in range(plan.repetitions):
            turn = repetition % len(names)
            found += [Step(workload, name, repetition) for name in names[turn:] + names[:turn]]
        if plan.counts and not plan.folders:
            found += [Step(workload, name, COUNTING) for name in plan.names]
    return found


class Runner:
    """Runs steps; what they found is in `figures`, also after an interruption."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._seeded: dict[str, str] = {}  # workload -> prefix
        self._folders = 0
        self.figures = Figures()
        (sources := plan.work / "sources").mkdir()
        self._sources = Sources(sources)

    def run(self, progress: Callable[[Step, str], None]) -> None:
        """`progress` gets each step before it runs, and after it with its result."""
        for step in steps(self._plan):
            progress(step, "")
            progress(step, self._step(step))

    def _step(self, step: Step) -> str:
        try:
            measured = self._measure(step)
        except (Failed, OSError, Boto3Error, BotoCoreError, ClientError) as exc:
            reason = " ".join(str(exc).split())
            self.figures.failures.append(Failure(step.workload.name, step.name, step.repetition, reason))
            return f"FAILED: {reason}"
        if not step.is_timed:
            return "counted"
        self.figures.samples += [
            Sample(measure, step.name, step.repetition, seconds) for measure, seconds in measured.items()
        ]
        return ", ".join(f"{name} {seconds:.3f} s" for name, seconds in measured.items())

    def _measure(self, step: Step) -> Mapping[str, float]:
        if self._plan.folders:
            return self._in_folder(step)
        with self._place(step) as (prefix, work):
            if step.name == REFERENCE:
                return self._reference(step, prefix, work)
            return self._in_mount(step, prefix, work)

    @contextmanager
    def _place(self, step: Step) -> Iterator[tuple[str, Path]]:
        """A prefix with the seed in it, nothing of it in a cache, and a folder; both are for this step alone."""
        store, prefix = self._plan.store, self._seed(step.workload)
        assert store is not None
        work = self._fresh_folder()
        own = f"{self._plan.prefix}{step.workload.name}-{step.name}-{step.repetition}/"
        try:
            if step.workload.changes:
                store.copy(prefix, own, step.workload.seed(self._plan.sizes))
                prefix = own
            drop_page_cache(work)
            store.warm(prefix, step.workload.seed(self._plan.sizes))
            yield prefix, work
        finally:
            self._clear(own, work)

    def _clear(self, prefix: str, work: Path) -> None:
        """Remove what is big. Many small files stay until the run ends: for each new file ext4 passes over all inodes
        that were freed within a minute, for which the next system would pay. Source: fs/ext4/ialloc.c,
        recently_deleted."""
        store = self._plan.store
        assert store is not None
        if sum(store.list(prefix).values()) > KEPT_BYTES_MAX:
            store.clean(prefix)
        if _bytes_in(work) > KEPT_BYTES_MAX:
            remove_folder(work)

    def _fresh_folder(self) -> Path:
        """With a short name: the path of a unix socket has at most 107 bytes. Source: unix(7)."""
        self._folders += 1
        (folder := self._plan.work / str(self._folders)).mkdir()
        return folder

    def _seed(self, workload: Workload) -> str:
        prefix = f"{self._plan.prefix}seed/{workload.name}/"
        if workload.name not in self._seeded:
            assert self._plan.store is not None
            self._plan.store.put(prefix, workload.seed(self._plan.sizes))
            self._seeded[workload.name] = prefix
        return prefix

    def _in_mount(self, step: Step, prefix: str, work: Path) -> Mapping[str, float]:
        plan, store = self._plan, self._plan.store
        assert store is not None
        system = next(system for system in plan.systems if system.name == step.name)
        if system.needs_marker:
            store.client.put_object(Bucket=store.bucket, Key=prefix)
        endpoint_url = self._endpoint(step)
        (mountpoint := work / "mnt").mkdir()
        (own := work / "own").mkdir()
        target = Target(
            endpoint_url=endpoint_url,
            bucket=store.bucket,
            prefix=prefix,
            mountpoint=mountpoint,
            work=own,
            credentials=plan.credentials,
            server=store.server,
        )
        before = self._plan.relay.counts() if self._plan.relay else {}
        with actor(plan.credentials) as worker, mounted(system, target) as watch:
            worker.do("look", plan.timeout_seconds, path=str(mountpoint))
            watch.serving()
            trial = self._trial(mountpoint, work, worker, prefix, endpoint_url)
            step.workload.run(trial)
        self._keep_cost(step, watch.end())
        if not step.is_timed and self._plan.relay:
            self._keep_traffic(step, before, self._plan.relay.counts())
        return trial.measured

    def _reference(self, step: Step, prefix: str, work: Path) -> Mapping[str, float]:
        assert step.workload.reference is not None
        with actor(self._plan.credentials) as worker:
            trial = self._trial(work, work, worker, prefix, self._endpoint(step))
            step.workload.reference(trial)
        return trial.measured

    def _in_folder(self, step: Step) -> Mapping[str, float]:
        """In a fresh folder of a directory that is mounted already, which also gets the seed."""
        place = self._plan.folders[step.name] / f"phfs-bench-{uuid.uuid4().hex[:8]}"
        work, seconds = self._fresh_folder(), self._plan.timeout_seconds
        seed = step.workload.seed(self._plan.sizes)
        dumped = {name: load.dump() for name, load in seed.items()}
        try:
            with actor({}) as worker:
                worker.do("run", seconds, command=["mkdir", str(place)], cwd="/")
                worker.do("write_files", seconds, root=str(place), loads=dumped)
                drop_page_cache(work)
                trial = self._trial(place, work, worker, "", None)
                step.workload.run(trial)
        finally:
            with actor({}) as cleaner:  # the other one may hang
                cleaner.do("run", seconds, command=["rm", "-rf", str(place)], cwd="/")
            remove_folder(work)
        return trial.measured

    def _trial(self, root: Path, work: Path, worker: Actor, prefix: str, endpoint_url: str | None) -> Trial:
        return Trial(
            root=root,
            work=work,
            sizes=self._plan.sizes,
            actor=worker,
            sources=self._sources,
            store=self._plan.store,
            prefix=prefix,
            endpoint_url=endpoint_url,
            timeout_seconds=self._plan.timeout_seconds,
        )

    def _endpoint(self, step: Step) -> str | None:
        plan = self._plan
        assert plan.store is not None
        if plan.relay is not None and (plan.through_relay or not step.is_timed):
            return plan.relay.endpoint_url
        return plan.store.endpoint_url

    def _keep_cost(self, step: Step, usage: Usage) -> None:
        if step.is_timed:
            cost = Cost(
                step.workload.name,
                step.name,
                step.repetition,
                usage.pss_bytes,
                usage.rss_bytes,
                round(usage.cpu_seconds, 3),
            )
            self.figures.costs.append(cost)

    def _keep_traffic(self, step: Step, before: Mapping[str, int], after: Mapping[str, int]) -> None:
        spent = {name: after[name] - before.get(name, 0) for name in after}
        up, down = spent.pop("up_bytes", 0), spent.pop("down_bytes", 0)
        requests = {name: count for name, count in sorted(spent.items()) if count}
        self.figures.traffic.append(Traffic(step.workload.name, step.name, requests, up, down))


def _is_free(folder: Path) -> bool:
    """Whether nothing is mounted below."""
    return not any(place.startswith(f"{folder}/") for place in mount_table())


def _bytes_in(folder: Path) -> int:
    """On the disk; 0 if something is still mounted there."""
    if not _is_free(folder):
        return 0
    total = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # a log or a socket of a program that is just ending
            total += path.lstat().st_blocks * 512  # Source: stat(2), the unit
    return total


def remove_folder(folder: Path) -> None:
    """Unless something is still mounted below: what is in that mount is not ours to remove."""
    if _is_free(folder):
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def work_folder(parent: Path | None) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="phfs-bench-", dir=parent)).resolve()
    with ExitStack() as stack:
        stack.callback(remove_folder, folder)
        yield folder

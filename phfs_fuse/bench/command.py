"""`phfs bench`: options -> a plan, its run with progress, its tables and files. Owns the store that it started."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import boto3
import botocore.exceptions as bexc
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from phfs_fuse.bench import plot, processes, report
from phfs_fuse.bench.figures import Figures
from phfs_fuse.bench.run import Plan, Runner, Step, steps, work_folder
from phfs_fuse.bench.sizes import SIZES
from phfs_fuse.bench.store import Store
from phfs_fuse.bench.systems import REFERENCE, System, choose
from phfs_fuse.bench.workloads import WORKLOADS, Workload, missing_program, title
from phfs_fuse.errors import StoreStartupError, UsageError
from phfs_fuse.host import logs

BUCKET: Final = "phfs-bench"  # of a store that is started here


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """As on the command line; lists are separated by commas."""

    against: str = "rclone"
    endpoint_url: str | None = None
    bucket: str | None = None
    embedded: bool = False
    minio: Path | None = None
    dirs: str | None = None
    only: str | None = None
    repetitions: int = 3
    size: str = "full"
    latency_ms: float = 0.0
    counts: bool = True
    timeout_seconds: float = 600.0
    work_dir: Path | None = None
    json_file: Path | None = None
    plot_file: Path | None = None


def show_workloads() -> None:
    for workload in WORKLOADS.values():
        for measure in workload.measures:
            print(f"{workload.name:<12} {measure:<16} {title(measure, SIZES['full'])}")


def run(options: Options) -> int:
    """0 when every system got through every workload, else 1. Raises: StartupError for what is asked wrong."""
    _check(options)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt_once)
    with ExitStack() as stack:
        work = stack.enter_context(work_folder(options.work_dir))
        plan = _folders_plan(options, work) if options.dirs else _mounts_plan(options, work, stack)
        figures = _run(plan, options)
    return 1 if figures.failures else 0


def _interrupt_once(*_: object) -> None:
    """The first one ends the run; the next ones must not end the cleaning up."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    _say("interrupted: unmounting and cleaning up")
    raise KeyboardInterrupt


def _check(options: Options) -> None:
    """Raises: UsageError. Everything that can be known before anything is started."""
    if options.size not in SIZES:
        raise UsageError(f"--size: {options.size!r} is no size; known: {', '.join(SIZES)}")
    if options.repetitions < 1 or options.latency_ms < 0 or options.timeout_seconds <= 0:
        raise UsageError("--reps has to be at least 1, --latency-ms at least 0, --timeout above 0")
    stores = [bool(options.endpoint_url or options.bucket), options.embedded, options.minio is not None]
    if sum([*stores, options.dirs is not None]) != 1:
        raise UsageError(
            "say where: --endpoint-url URL --bucket NAME, or --minio BINARY, or --embedded, or --dirs NAME=PATH,..."
        )
    if stores[0] and not options.bucket:
        raise UsageError("--endpoint-url needs --bucket: an existing bucket; only a prefix of it is used")
    if options.dirs and options.latency_ms:
        raise UsageError("--latency-ms has no effect on --dirs: they are mounted already")
    for path in (options.json_file, options.plot_file):
        if path is not None and not path.absolute().parent.is_dir():
            raise UsageError(f"{path}: {path.absolute().parent} is not a directory")
    if options.plot_file is not None:
        plot.require()
    if not options.dirs and shutil.which("fusermount3") is None:
        raise UsageError("fusermount3 is not on the path: apt-get install fuse3")


def chosen(only: str | None) -> list[Workload]:
    """By their names or those of their measures. Raises: UsageError."""
    names = _split(only) or list(WORKLOADS)
    by_measure = {measure: w.name for w in WORKLOADS.values() for measure in w.measures}
    for name in names:
        if name not in WORKLOADS and name not in by_measure:
            raise UsageError(f"--only: {name!r} is no workload; phfs bench --list shows them")
    wanted = {name if name in WORKLOADS else by_measure[name] for name in names}
    found = []
    for workload in WORKLOADS.values():
        if workload.name in wanted:
            if program := missing_program(workload):
                _say(f"left out: {workload.name}: {program} is not installed")
            else:
                found.append(workload)
    return found


def _split(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]


# --- what to run on


def _folders_plan(options: Options, work: Path) -> Plan:
    folders = {}
    for part in _split(options.dirs):
        name, equals, path = part.partition("=")
        if not equals or not name or not Path(path).is_dir():
            raise UsageError(f"--dirs: {part!r} is not NAME=PATH of an existing directory")
        folders[name] = Path(path).absolute()
    _say("mounted already: 'cold' means files that were just written there; the store is not asked")
    return Plan(
        workloads=chosen(options.only),
        sizes=SIZES[options.size],
        repetitions=options.repetitions,
        timeout_seconds=options.timeout_seconds,
        work=work,
        folders=folders,
    )


def _mounts_plan(options: Options, work: Path, stack: ExitStack) -> Plan:
    systems = _installed(choose(_split(options.against)))
    workloads = chosen(options.only)
    store = _store(options, stack)
    prefix = f"phfs-bench/{uuid.uuid4().hex[:8]}/"
    stack.enter_context(_cleaned(store, prefix))
    relay = None
    if options.latency_ms or options.counts:
        relay = _relay(store, options, stack)
    return Plan(
        workloads=workloads,
        sizes=SIZES[options.size],
        repetitions=options.repetitions,
        timeout_seconds=options.timeout_seconds,
        work=work,
        store=store,
        prefix=prefix,
        systems=systems,
        credentials=_credentials(),
        relay=relay,
        through_relay=options.latency_ms > 0,
        counts=options.counts,
    )


def _installed(systems: Sequence[System]) -> list[System]:
    for system in systems:
        if system.program() is None:
            _say(f"left out: {system.name}: {system.remedy}")
    return [system for system in systems if system.program() is not None]


def _store(options: Options, stack: ExitStack) -> Store:
    if options.bucket:
        store = Store(options.endpoint_url or os.environ.get("AWS_ENDPOINT_URL"), options.bucket)
        store.check()
        return store
    starting = processes.minio(options.minio) if options.minio else processes.embedded()
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        del os.environ[name]  # the store is ours, and so are its credentials
    os.environ.update(processes.own_credentials())
    store = Store(stack.enter_context(starting), BUCKET)
    store.client.create_bucket(Bucket=BUCKET)
    store.check()
    return store


def _relay(store: Store, options: Options, stack: ExitStack) -> processes.Relay | None:
    url = store.client.meta.endpoint_url
    if not url.startswith("http://") and not options.latency_ms:
        _say(f"requests are not counted: {logs.redacted(url)} is not plain http")
        return None
    return stack.enter_context(processes.relay(url, options.latency_ms / 1000))


def _credentials() -> Mapping[str, str]:
    """For the environment of all that is started. Raises: StoreStartupError without any."""
    session = boto3.Session()
    try:
        found = session.get_credentials()
    except bexc.BotoCoreError as exc:
        raise StoreStartupError(f"no usable credentials ({type(exc).__name__})") from exc
    if found is None:
        raise StoreStartupError("no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or name a profile")
    frozen = found.get_frozen_credentials()
    environ = {
        "AWS_ACCESS_KEY_ID": frozen.access_key or "",
        "AWS_SECRET_ACCESS_KEY": frozen.secret_key or "",
        "AWS_DEFAULT_REGION": session.region_name or "us-east-1",
    }
    return {**environ, **({"AWS_SESSION_TOKEN": frozen.token} if frozen.token else {})}


@contextmanager
def _cleaned(store: Store, prefix: str) -> Iterator[None]:
    """Nothing of the run stays in the store, also after Ctrl-C."""
    try:
        yield
    finally:
        try:
            store.clean(prefix)
        except (bexc.BotoCoreError, bexc.ClientError) as exc:
            _say(f"s3://{store.bucket}/{prefix} could not be emptied ({type(exc).__name__}): delete it by hand")


# --- the run and what is made of it


def _run(plan: Plan, options: Options) -> Figures:
    if not report.machine(plan.work)["root"]:
        _say("not root: the page cache cannot be dropped, and what needs that is left out")
    runner, began = Runner(plan), time.time()
    try:
        with _progress(len(steps(plan))) as progress:
            runner.run(progress)
    except KeyboardInterrupt:
        _say("what was measured before the interruption:")
        _publish(plan, options, runner.figures, began)
        raise
    _publish(plan, options, runner.figures, began)
    return runner.figures


def _publish(plan: Plan, options: Options, figures: Figures, began: float) -> None:
    report.show(figures, plan.workloads, plan.names, plan.sizes)
    if options.json_file is not None:
        report.write_json(options.json_file, figures, _about(plan, options, began))
    if options.plot_file is not None:
        plot.write(options.plot_file, figures, plan.workloads, plan.names, plan.sizes)
        if not options.plot_file.exists():
            _say(f"{options.plot_file}: nothing to draw: no workload that two systems got through")


def _about(plan: Plan, options: Options, began: float) -> dict[str, Any]:
    versions = {system.name: system.version() for system in plan.systems}
    if plan.store is not None:
        versions[REFERENCE] = f"boto3 {boto3.__version__}"
        versions["store"] = plan.store.server or "unknown"
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(began)),
        "seconds": round(time.time() - began, 1),
        "command": logs.redacted(shlex.join(["phfs", *sys.argv[1:]])),
        "machine": report.machine(plan.work),
        "versions": versions,
        "size": options.size,
        "repetitions": options.repetitions,
        "latency_ms": options.latency_ms,
        "systems": plan.names,
        "titles": {m: title(m, plan.sizes) for w in plan.workloads for m in w.measures},
    }


@contextmanager
def _progress(total: int) -> Iterator[Callable[[Step, str], None]]:
    """A bar on a terminal, a line per step elsewhere, on standard error."""
    if not sys.stderr.isatty():
        done = [0]

        def line(step: Step, result: str) -> None:
            if result:
                done[0] += 1
                _say(f"[{done[0]}/{total}] {step}: {result}")

        yield line
        return
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)

        def advance(step: Step, result: str) -> None:
            bar.update(task, description=str(step), advance=1 if result else 0)
            if result.startswith("FAILED"):
                bar.console.print(f"{step}: {result}", markup=False)

        yield advance


def _say(line: str) -> None:
    with suppress(BrokenPipeError):
        print(f"phfs bench: {logs.redacted(line)}", file=sys.stderr, flush=True)

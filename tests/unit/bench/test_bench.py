"""`phfs bench`: statistics, tables, command lines, loads, the counter of requests. Nothing is started here."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
from rich.console import Console

from phfs_fuse.bench import command, report, run
from phfs_fuse.bench.figures import Cost, Failure, Figures, Sample, Summary, Traffic, summary
from phfs_fuse.bench.loads import MIB, Load, Piece, random_places, small_files
from phfs_fuse.bench.relay import RequestCounter
from phfs_fuse.bench.sizes import SIZES
from phfs_fuse.bench.store import Arrival, Found, Store
from phfs_fuse.bench.systems import REFERENCE, SYSTEMS, System, Target, choose
from phfs_fuse.bench.workloads import WORKLOADS, title
from phfs_fuse.errors import UsageError

SECRET = "very-secret-key"


def figures() -> Figures:
    return Figures(
        samples=[
            Sample("write", "phfs", 0, 1.0),
            Sample("write", "phfs", 1, 4.0),
            Sample("write", "phfs", 2, 2.0),
            Sample("write", "rclone", 0, 5.0),
            Sample("write", "rclone", 1, 3.0),
        ],
        failures=[Failure("write-4k", "rclone", 0, "file has other bytes in the store")],
        costs=[Cost("write", "phfs", 0, 3 * MIB, 5 * MIB, 1.5), Cost("write", "phfs", 1, 9 * MIB, 9 * MIB, 0.5)],
        traffic=[Traffic("write", "phfs", {"GET": 2, "PUT": 3}, 2 * MIB, MIB)],
    )


# --- statistics


def test_summary_is_median_and_range() -> None:
    assert summary([3.0, 1.0, 2.0]) == Summary(2.0, 1.0, 3.0)
    assert summary([]) is None


def test_ratio_is_that_of_the_medians() -> None:
    assert figures().ratio("write", "rclone", "phfs") == 4.0 / 2.0
    assert figures().ratio("write", "s3fs", "phfs") is None


def test_cost_is_median_cpu_and_highest_memory() -> None:
    assert figures().cost("write", "phfs") == (1.0, 9 * MIB, 9 * MIB)


# --- tables


def shown(*names: str) -> str:
    console = Console(width=200, record=True, file=io.StringIO(), highlight=False)
    workloads = [WORKLOADS["write"], WORKLOADS["write-4k"]]
    console.print(report.times(figures(), workloads, names, SIZES["full"]))
    console.print(report.costs(figures(), workloads, names))
    return console.export_text()


def test_table_has_a_row_per_measure_with_ratio_and_failures() -> None:
    lines = shown("phfs", "rclone").splitlines()
    write = next(line for line in lines if "1 MiB writes" in line)
    assert "write 512 MiB" in write
    assert "2.000 (1.000-4.000)" in write
    assert write.split()[-1] == "2.00x"
    failed = next(line for line in lines if "4 KiB writes" in line)
    assert "FAILED" in failed


def test_table_of_costs() -> None:
    assert "1.0 | 9 | 5 | 2.0 / 1.0" in shown("phfs", "rclone")


# --- command lines


def target(tmp_path: Path, endpoint_url: str | None = "http://127.0.0.1:9000", server: str = "MinIO") -> Target:
    credentials = {"AWS_ACCESS_KEY_ID": "known", "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "eu-west-1"}
    return Target(
        endpoint_url=endpoint_url,
        bucket="pail",
        prefix="p/q/",
        mountpoint=tmp_path / "mnt",
        work=tmp_path,
        credentials=credentials,
        server=server,
    )


@pytest.mark.parametrize("system", SYSTEMS.values(), ids=lambda system: system.name)
def test_no_secret_is_on_a_command_line(system: System, tmp_path: Path) -> None:
    line = system.command(target(tmp_path))
    assert not any(SECRET in word or "known" in word for word in line)
    assert system.environ(target(tmp_path))["AWS_SECRET_ACCESS_KEY"] == SECRET
    assert str(tmp_path / "mnt") in line
    assert "pail" in " ".join(line)
    assert "p/q" in " ".join(line)


@pytest.mark.parametrize("system", SYSTEMS.values(), ids=lambda system: system.name)
def test_caches_lie_in_the_work_folder_of_the_mount(system: System, tmp_path: Path) -> None:
    line = " ".join(system.command(target(tmp_path)))
    assert str(tmp_path) in line.replace(str(tmp_path / "mnt"), "") or system.name in ("goofys", "geesefs")


def test_rclone_has_the_settings_of_csi_rclone(tmp_path: Path) -> None:
    line = " ".join(SYSTEMS["rclone"].command(target(tmp_path)))
    assert "mount --vfs-cache-mode writes --dir-cache-time 5s" in line
    assert "--config /dev/null" in line  # nothing of the user's


@pytest.mark.parametrize(
    ("endpoint_url", "server", "provider"),
    [
        ("http://127.0.0.1:9000", "MinIO", "Minio"),
        ("http://127.0.0.1:9000", "Werkzeug", "Other"),
        (None, "AmazonS3", "AWS"),
    ],
)
def test_rclone_knows_what_store_it_is(tmp_path: Path, endpoint_url: str | None, server: str, provider: str) -> None:
    environ = SYSTEMS["rclone"].environ(target(tmp_path, endpoint_url, server))
    assert environ["RCLONE_CONFIG_BENCH_PROVIDER"] == provider
    assert environ["RCLONE_CONFIG_BENCH_ENDPOINT"] == (endpoint_url or "")


def test_phfs_comes_first_and_once() -> None:
    assert [system.name for system in choose(["rclone", "phfs", "rclone"])] == ["phfs", "rclone"]


# --- what is asked wrong


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (command.Options(), "say where"),
        (command.Options(embedded=True, bucket="pail"), "say where"),
        (command.Options(endpoint_url="http://127.0.0.1:1"), "--bucket"),
        (command.Options(embedded=True, size="huge"), "'huge' is no size; known: full, small"),
        (command.Options(embedded=True, only="write,nap"), "'nap' is no workload"),
        (command.Options(embedded=True, against="floppy"), "'floppy' is no system; known: phfs, rclone"),
        (command.Options(embedded=True, repetitions=0), "--reps"),
        (command.Options(dirs="here"), "NAME=PATH"),
        (command.Options(dirs="a=/", latency_ms=1), "--latency-ms"),
        (command.Options(embedded=True, json_file=Path("/nowhere/at/all.json")), "not a directory"),
        (command.Options(minio=Path("/nowhere/minio")), "is no program"),
    ],
)
def test_bad_options_are_one_line(options: command.Options, line: str) -> None:
    with pytest.raises(UsageError, match=line) as found:
        command.run(options)
    assert "\n" not in str(found.value)


# --- workloads and their order


def test_only_takes_workloads_and_measures() -> None:
    assert [workload.name for workload in command.chosen("read-again,write")] == ["write", "read"]


@pytest.mark.parametrize("size", SIZES)
def test_every_measure_has_a_title(size: str) -> None:
    measures = [measure for workload in WORKLOADS.values() for measure in workload.measures]
    assert len(measures) == len(set(measures))
    assert all("{" not in title(measure, SIZES[size]) for measure in measures)


def test_systems_take_turns(tmp_path: Path) -> None:
    plan = run.Plan(
        workloads=[WORKLOADS["create"]],
        sizes=SIZES["small"],
        repetitions=2,
        timeout_seconds=1,
        work=tmp_path,
        systems=choose(["rclone"]),
    )
    order = [(step.name, step.repetition) for step in run.steps(plan)]
    assert order == [("phfs", 0), ("rclone", 0), ("rclone", 1), ("phfs", 1)]
    assert all(step.name != REFERENCE for step in run.steps(plan))
    counting = [step.name for step in run.steps(replace(plan, counts=True)) if not step.is_timed]
    assert counting == ["phfs", "rclone"]


# --- loads


def whole(load: Load) -> bytes:
    return b"".join(bytes(chunk) for chunk in load.chunks())


def test_loads_are_the_same_each_time_and_differ_in_each_block() -> None:
    load = Load(7, 40 * MIB + 5)
    first = whole(load)
    assert len(first) == load.full_size
    assert hashlib.sha256(first).hexdigest() == load.sha256()
    blocks = {first[start : start + MIB] for start in range(0, len(first), MIB)}
    assert len(blocks) == 41
    assert load.range(17 * MIB - 3, 10) == first[17 * MIB - 3 : 17 * MIB + 7]


def test_an_edit_and_a_tail_change_what_is_expected() -> None:
    base = whole(Load(7, 2 * MIB))
    edit, tail = Piece(MIB + 100, 1, 50), Piece(2 * MIB, 2, 10)
    assert whole(Load(7, 2 * MIB, edit)) == base[: MIB + 100] + edit.content() + base[MIB + 150 :]
    assert whole(Load(7, 2 * MIB, tail=(tail,))) == base + tail.content()
    assert whole(Load(7, 2 * MIB)) == base  # the pool was not changed


def test_small_files_are_spread_over_folders() -> None:
    loads = small_files(10, 100, folders=5)
    assert len(loads) == 10
    assert len({name.rpartition("/")[0] for name in loads}) == 5
    assert len({load.sha256() for load in loads.values()}) == 10


def test_random_places_are_the_same_each_time() -> None:
    assert random_places(MIB, 5, 100) == random_places(MIB, 5, 100)


# --- requests


@pytest.mark.parametrize("step", [1, 7, 1000])
def test_requests_are_counted_in_whatever_pieces_they_come(step: int) -> None:
    counts: Counter[str] = Counter()
    counter = RequestCounter(counts)
    body = b"GET /not/a/request HTTP/1.1\r\n\r\n"
    stream = b"PUT /a HTTP/1.1\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    stream += b"GET /b HTTP/1.1\r\nHost: x\r\n\r\nHEAD /c HTTP/1.1\r\ncontent-length:0\r\n\r\n"
    for start in range(0, len(stream), step):
        counter.feed(stream[start : start + step])
    assert counts == {"PUT": 1, "GET": 1, "HEAD": 1}


def test_a_body_that_cannot_be_followed_is_said() -> None:
    counts: Counter[str] = Counter()
    RequestCounter(counts).feed(b"PUT /a HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nGET\r\n0\r\n\r\n")
    assert counts == {"PUT": 1, "unknown": 1}


class Bucket:
    """Counts what it is asked."""

    def __init__(self) -> None:
        self.sizes: dict[str, int] = {}
        self.asked: Counter[str] = Counter()

    def head(self, key: str) -> Found | None:
        self.asked["head"] += 1
        return Found(self.sizes[key], "etag") if key in self.sizes else None

    def list(self, prefix: str) -> dict[str, int]:
        self.asked["list"] += 1
        return {key.removeprefix(prefix): size for key, size in self.sizes.items()}


@pytest.mark.parametrize("wanted", [{}, {"a": 1}, {"a": 1, "b": 2, "c": 3}])
@pytest.mark.parametrize("found", [{}, {"a": 1}, {"a": 9}, {"a": 1, "b": 2, "c": 3}, {"a": 1, "c": 3, "d": 4}])
def test_what_has_arrived_is_what_was_to_come(wanted: dict[str, int], found: dict[str, int]) -> None:
    bucket = Bucket()
    arrival = Arrival(cast(Store, bucket), "p/", wanted)
    bucket.sizes = {"p/" + name: size for name, size in found.items()}
    right = found.get("a") == 1 if len(wanted) == 1 else found == wanted  # of one file, it alone is asked for
    assert [arrival.is_there() for _ in range(3)] == [right] * 3
    bucket.sizes = {"p/" + name: size for name, size in wanted.items()}
    assert any(arrival.is_there() for _ in range(3))


def test_a_thousand_keys_are_listed_a_few_times_only() -> None:
    bucket, wanted = Bucket(), {f"f{number:04}": 1 for number in range(1000)}
    arrival = Arrival(cast(Store, bucket), "", wanted)
    for name in wanted:
        assert not arrival.is_there()
        bucket.sizes[name] = 1
    assert arrival.is_there()
    assert (bucket.asked["head"], bucket.asked["list"]) == (1001, 1)
    del bucket.sizes["f0500"]
    assert not arrival.is_there()
    bucket.sizes["f0500"] = 1
    assert arrival.is_there()

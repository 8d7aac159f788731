"""Rounds of programs that work on a mount while its worker is killed or replaced and its store fails.

    python -m tests.torture --seconds 300 --seed 1

After each round all is drained (in some rounds the keeper is killed first, with uploads waiting, and the volume is
mounted again) and compared: what programs see, what the objects say, and what was promised (the model of each
writer). Ends with 0 if nothing was lost, torn or mixed up, no call failed and the log has no line that the faults do
not explain.
The same seed gives the same operations and faults, at other moments.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from phfs_fuse.errors import StartupError
from tests.support.mounts import TestMount, ended, mounted
from tests.support.proxy import Answer, Forward, Proxy, Request, proxy
from tests.support.servers import minio

ROUND_SECONDS = 30.0
KILL_SECONDS = 13.0  # between two deaths of a worker: the keeper gives up at the sixth in a minute
WRITERS = 4
HASHES = """
import hashlib, json, os, sys
found = {}
for at, _, names in os.walk(sys.argv[1]):
    for name in names:
        path = os.path.join(at, name)
        found[os.path.relpath(path, sys.argv[1])] = hashlib.sha256(open(path, "rb").read()).hexdigest()
json.dump(found, sys.stdout)
"""
EXPLAINED = re.compile(
    r"the worker ended with SIGKILL|upload of key=|delete of key=|: the store |store does not answer"
    r"|failed: (head|list|get) |requests that were in work|the keeper is gone"
)
LOUD = re.compile(r"^\S+ (WARNING|ERROR|CRITICAL) |^Traceback ")


@dataclass
class Faults:
    """What the store does to requests. `chance` of each is that of a fault; `away`: it refuses all."""

    random: random.Random
    chance: float = 0.0
    away: bool = False

    def script(self, request: Request) -> Answer | Forward:
        if self.away:
            return Answer(503)
        fault = self.random.random() / self.chance if self.chance else 1.0
        if fault >= 1.0:
            return Forward()
        if fault < 0.5:
            return Answer(503 if fault < 0.3 else 500)
        if fault < 0.8 and request.method != "GET":
            return Forward(lost=True)
        return Forward(cut=self.random.randrange(2000))


class Torture:
    def __init__(self, mount: TestMount, faults: Faults, seed: int) -> None:
        self.mount = mount
        self.faults = faults
        self.random = random.Random(seed)
        self.seed = seed
        self.done: Counter[str] = Counter()
        self.findings: list[str] = []
        self.rounds: dict[str, Mapping[str, str]] = {}  # folder -> what its files have to be
        self._killed = -KILL_SECONDS

    # ---- one round

    def round(self, number: int, seconds: float) -> None:
        stop = self.mount.root / f"stop-{number}"
        writers = {
            f"r{number}w{at}": self._writer(f"r{number}w{at}", self.seed * 1000 + number * 10 + at, stop)
            for at in range(WRITERS)
        }
        self.faults.chance = self.random.choice([0.0, 0.02, 0.1])
        end = time.monotonic() + seconds
        while time.monotonic() < end and all(writer.poll() is None for writer in writers.values()):
            self._disturb()
        self.faults.away = False
        stop.touch()
        for folder, writer in writers.items():
            self._collect(folder, writer)
        if self.random.random() < 0.4:
            self._kill_keeper()
        self.faults.chance = 0.0
        self.mount.sync()
        self._compare(f"round {number}")

    def _writer(self, folder: str, seed: int, stop: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "tests.torture.writer", f"{self.mount.path}/{folder}", str(seed), str(stop)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def _collect(self, folder: str, writer: subprocess.Popen[str]) -> None:
        try:
            out, errors = writer.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            writer.kill()
            self._find(f"{folder}: a call hangs")
            return
        if writer.returncode:
            self._find(f"{folder}: {errors.strip()}")
            return
        model = json.loads(out)
        self.done["operations"] += model["operations"]
        self.rounds[folder] = model["files"]

    # ---- what is done to it

    def _disturb(self) -> None:
        time.sleep(self.random.uniform(0.2, 2.0))
        may_kill = time.monotonic() - self._killed > KILL_SECONDS
        what = self.random.choice([*(["kill"] * 3 if may_kill else []), "upgrade", "forget", "away", "nothing"])
        self.done[what] += 1
        if what == "kill":
            self._killed = time.monotonic()
            self.mount.kill_worker()
        elif what == "upgrade":
            self.mount.upgrade()
        elif what == "forget" and os.geteuid() == 0:
            Path("/proc/sys/vm/drop_caches").write_text("2")
        elif what == "away":
            self.faults.away = True
            time.sleep(self.random.uniform(0.1, 6.0))
            self.faults.away = False

    def _kill_keeper(self) -> None:
        """The mount breaks; the next one takes up the state."""
        self.done["keeper killed"] += 1
        keeper, worker = self.mount.record().keeper_pid, self.mount.worker_pid
        os.kill(keeper, signal.SIGKILL)
        assert worker is None or ended(worker, 20)
        self.mount.must("umount", self.mount.path)
        self.mount.mount()

    # ---- the verdict

    def _compare(self, when: str) -> None:
        wanted = {f"{folder}/{name}": found for folder, files in self.rounds.items() for name, found in files.items()}
        seen = json.loads(self._run(HASHES, str(self.mount.path)))
        self._differences(f"{when}, programs see", seen, wanted)
        self._differences(f"{when}, objects say", self._objects(), wanted)

    def _differences(self, where: str, found: Mapping[str, str], wanted: Mapping[str, str]) -> None:
        folders = tuple(f"{folder}/" for folder in self.rounds)
        found = {name: value for name, value in found.items() if name.startswith(folders)}
        for name in sorted(found.keys() | wanted.keys()):
            if found.get(name) != wanted.get(name):
                kind = "lost" if name not in found else "too much" if name not in wanted else "other bytes"
                self._find(f"{where} {kind}: {name}")

    def _objects(self) -> dict[str, str]:
        found = {}
        for page in self.mount.s3.get_paginator("list_objects_v2").paginate(
            Bucket=self.mount.bucket, Prefix=self.mount.prefix
        ):
            for row in page.get("Contents", ()):
                if not row["Key"].endswith("/"):
                    body = self.mount.s3.get_object(Bucket=self.mount.bucket, Key=row["Key"])["Body"].read()
                    found[row["Key"].removeprefix(self.mount.prefix)] = hashlib.sha256(body).hexdigest()
        return found

    def _run(self, code: str, *arguments: str) -> str:
        return subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True, timeout=300
        ).stdout

    def _find(self, text: str) -> None:
        self.findings.append(text)
        print("FOUND", text, flush=True)

    def end(self) -> None:
        """A new mount with an empty cache sees the same."""
        self.mount.unmount()
        self._run("import shutil, sys; shutil.rmtree(sys.argv[1])", str(self.mount.cache))
        self.mount.mount()
        self._compare("after a remount")
        for line in self.mount.log().splitlines():
            if LOUD.search(line) and not EXPLAINED.search(line):
                self._find(f"log: {line}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description="See the module.")
    parser.add_argument(
        "--seconds", type=float, default=300.0, help="in all, without the checks after the last round"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep-log", type=Path, help="copy the log of the mount here")
    options = parser.parse_args()
    end = time.monotonic() + options.seconds
    with ExitStack() as stack:
        server = stack.enter_context(minio())
        front: Proxy = stack.enter_context(proxy(server.endpoint_url))
        faults = Faults(random.Random(options.seed))
        lock = threading.Lock()
        asked = stack.enter_context(open(f"{options.keep_log}.requests" if options.keep_log else os.devnull, "w"))

        def script(request: Request) -> Answer | Forward:
            with lock:
                if options.keep_log:
                    print(
                        datetime.now(UTC).isoformat(timespec="milliseconds"), request.method, request.path, file=asked
                    )
                return faults.script(request)

        front.script = script
        flags = ("--attr-ttl", "1s", "-o", "retry-max=2s", "--log-level", "debug")
        mount = stack.enter_context(mounted(*flags, server=replace(server, endpoint_url=front.endpoint_url)))
        mount.expected.append("")  # the verdict on the log is given here
        torture = Torture(mount, faults, options.seed)
        number = 0
        if options.keep_log:
            stack.callback(lambda: options.keep_log.write_text(mount.log()))
        while time.monotonic() < end and not torture.findings:
            number += 1
            torture.round(number, min(ROUND_SECONDS, end - time.monotonic()))
            front.requests.clear()
            print(f"round {number}: {dict(torture.done)}, findings {len(torture.findings)}", flush=True)
        torture.end()
    print(f"seed {options.seed}: {dict(torture.done)}; {len(torture.findings)} findings")
    return 1 if torture.findings else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except StartupError as exc:
        sys.exit(f"torture: {exc}")

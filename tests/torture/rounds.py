"""Rounds of programs on one or several mounts of one prefix, what is done to them, and the verdict.

Owns the programs, the models that they leave behind and the findings.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from phfs_fuse.waiting import ended
from tests.support.mounts import TestMount
from tests.torture.editor import names_within, parse
from tests.torture.faults import Faults

ROUND_SECONDS = 30.0
KILL_SECONDS = 13.0  # between two deaths of a worker: the keeper gives up at the sixth in a minute
SEEN_SECONDS = 1.5  # until a mount sees what another one stored: `--attr-ttl 1s`, with room
WRITERS = 4  # in all
ROUNDS_KEPT = 2  # whose files are still there, and compared
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
    r"|failed: (head|list|get) |requests that were in work|the keeper is gone|disk failed|disk is full"
    r"|disk of the local state is full"
    r"|conflict: |was stored anew by somebody else|was deleted by somebody else|cannot be stored: somebody else"
    r"|cannot be fetched yet|attributes of key=|No space left|database or disk is full"
)
TORN = re.compile(r".+(?=\d{4}-\d\d-\d\dT[\d:.]+Z [A-Z]+ )")  # a line that was cut off, before the next one
LOUD = re.compile(r"^\S+ (WARNING|ERROR|CRITICAL) |^Traceback ")


@dataclass
class Place:
    """One mount and what is done to it."""

    mount: TestMount
    faults: Faults
    has_disks: bool
    killed: float = -KILL_SECONDS

    @property
    def may_kill(self) -> bool:
        return time.monotonic() - self.killed > KILL_SECONDS


@dataclass
class Round:
    """What has to be there of it."""

    files: dict[str, str] = field(default_factory=dict)  # path -> hash, of the folders of one program each
    folders: list[str] = field(default_factory=list)
    shared: str = ""  # folder that all mounts work in
    committed: dict[str, str] = field(default_factory=dict)  # line there -> where and when it was written
    refused: int = 0


class Torture:
    def __init__(self, places: Sequence[Place], seed: int, log_path: Path | None) -> None:
        self.places = places
        self.random = random.Random(seed)
        self.seed = seed
        self.done: Counter[str] = Counter()
        self.findings: list[str] = []
        self.rounds: list[Round] = []
        self._log_path = log_path

    # ---- one round

    def round(self, number: int, seconds: float) -> None:
        stop = self.places[0].mount.root / f"stop-{number}"
        now = Round(shared=f"r{number}shared" if len(self.places) > 1 else "")
        self.rounds.append(now)
        programs = self._start(number, now, stop)
        for place in self.places:
            place.faults.chance = self.random.choice([0.0, 0.02, 0.1])
        end = time.monotonic() + seconds
        while time.monotonic() < end and all(program.poll() is None for program in programs.values()):
            self._disturb()
        stop.touch()
        for name, program in programs.items():
            self._collect(name, program, now)
        stop.unlink()
        self._settle()
        self._compare(f"round {number}", now)
        self._tidy()
        self._check_logs()

    def _start(self, number: int, now: Round, stop: Path) -> dict[str, subprocess.Popen[str]]:
        programs = {}
        for at in range(WRITERS):
            folder = f"r{number}w{at}"
            path = self.places[at % len(self.places)].mount.path / folder
            programs[folder] = self._program("writer", path, self.seed * 1000 + number * 10 + at, stop)
        if now.shared:
            for at, place in enumerate(self.places):
                name, path = f"m{at}r{number}", place.mount.path / now.shared
                programs[name] = self._program("editor", path, self.seed * 1000 + number * 10 + 5 + at, stop, name)
        return programs

    def _program(self, module: str, *arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", f"tests.torture.{module}", *map(str, arguments)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def _collect(self, name: str, program: subprocess.Popen[str], now: Round) -> None:
        try:
            out, errors = program.communicate(timeout=150)
        except subprocess.TimeoutExpired:
            program.kill()
            self._find(f"{name}: a call hangs")
            return
        if program.returncode:
            self._find(f"{name}: {errors.strip()}")
            return
        model = json.loads(out)
        self.done["operations"] += model["operations"]
        self.done["refused (ENOSPC)"] += model["refused"]
        now.refused += model["refused"]
        if "committed" in model:
            self.done["shared edits"] += len(model["committed"])
            now.committed |= model["committed"]
            for text in model["torn"]:
                self._find(f"{name} read a mixed version: {text}")
        else:
            now.folders.append(name)
            now.files |= {f"{name}/{path}": found for path, found in model["files"].items()}

    # ---- what is done to it

    def _disturb(self) -> None:
        time.sleep(self.random.uniform(0.2, 2.0))
        place = self.random.choice(self.places)
        kills = ["kill"] * 3 if place.may_kill else []
        disks = ["state full", "cache full"] if place.has_disks else []
        what = self.random.choice([*kills, *disks, "upgrade", "forget", "away", "all away", "nothing"])
        self.done[what] += 1
        if what == "kill":
            self._kill(place)
        elif what == "upgrade":
            place.mount.upgrade()
        elif what == "forget" and os.geteuid() == 0:
            Path("/proc/sys/vm/drop_caches").write_text("2")
        elif what in ("away", "all away"):
            self._away([place] if what == "away" else self.places)
        elif what in ("state full", "cache full"):
            self._fill(place, what.split()[0])

    def _kill(self, place: Place, then: Callable[[], None] = lambda: None) -> None:
        place.killed = time.monotonic()
        place.mount.kill_worker(then)

    def _away(self, places: Sequence[Place]) -> None:
        for place in places:
            place.faults.away = True
        time.sleep(self.random.uniform(0.1, 6.0))
        for place in places:
            place.faults.away = False

    def _fill(self, place: Place, disk: str) -> None:
        place.mount.fill(disk)
        try:
            time.sleep(self.random.uniform(0.1, 3.0))
            if place.may_kill and self.random.random() < 0.3:
                self.done[f"kill, {disk} full"] += 1
                self._kill(place, partial(self._free_soon, place, disk))  # without any room it is not replaced
        finally:
            place.mount.free(disk)

    def _free_soon(self, place: Place, disk: str) -> None:
        time.sleep(self.random.uniform(0.0, 3.0))
        place.mount.free(disk)

    def _kill_keeper(self, place: Place) -> None:
        """The mount breaks; the next one takes up the state."""
        self.done["keeper killed"] += 1
        keeper, worker = place.mount.record().keeper_pid, place.mount.worker_pid
        os.kill(keeper, signal.SIGKILL)
        assert worker is None or ended(worker, 20)
        place.mount.must("umount", place.mount.path)
        try:
            place.mount.mount()
        except AssertionError as exc:  # its first request fails twice: refused, and whoever wants it asks again
            if "mount ended with 3:" not in str(exc):
                raise
            place.faults.chance = 0.0
            place.mount.mount()

    # ---- the verdict

    def _settle(self) -> None:
        for place in self.places:
            if self.random.random() < 0.4:
                self._kill_keeper(place)
            place.faults.chance = 0.0
        for place in self.places:
            place.mount.sync()
        if len(self.places) > 1:
            time.sleep(SEEN_SECONDS)

    def _compare(self, when: str, now: Round) -> None:
        wanted = {name: found for past in self.rounds for name, found in past.files.items()}
        objects = self._objects()
        hashes = {name: hashlib.sha256(data).hexdigest() for name, data in objects.items()}
        shared = {name: data for name, data in objects.items() if now.shared and name.startswith(f"{now.shared}/")}
        wanted |= {name: hashes[name] for name in shared}
        self._differences(f"{when}, objects say", hashes, wanted)
        for at, place in enumerate(self.places):
            self._differences(f"{when}, mount {at} sees", json.loads(self._run(HASHES, place.mount.path)), wanted)
        self._check_shared(when, now, shared)

    def _differences(self, where: str, found: Mapping[str, str], wanted: Mapping[str, str]) -> None:
        for name in sorted(found.keys() | wanted.keys()):
            if found.get(name) != wanted.get(name):
                kind = "lost" if name not in found else "too much" if name not in wanted else "other bytes"
                self._find(f"{where} {kind}: {name}")

    def _check_shared(self, when: str, now: Round, shared: Mapping[str, bytes]) -> None:
        """Every line whose close was answered is in an object, or in what was saved aside and reported."""
        there: set[str] = set()
        for name, data in shared.items():
            content = parse(data)
            there |= set(content.names)
            if content.good_bytes < len(data) and not now.refused:
                self._find(f"{when}, torn: {name} is good until {content.good_bytes} of {len(data)} bytes")
        self.done["conflict files"] += sum(".conflict-" in name for name in shared)
        missing = now.committed.keys() - there
        saved = {name for place in self.places for name in names_within(_saved(place.mount))}
        self.done["edits saved aside"] += len(missing & saved)
        for name in sorted(missing - saved):
            self._find(f"{when}, lost edit: {name} {now.committed[name]}")

    def _objects(self) -> dict[str, bytes]:
        mount, found = self.places[0].mount, {}
        for page in mount.s3.get_paginator("list_objects_v2").paginate(Bucket=mount.bucket, Prefix=mount.prefix):
            for row in page.get("Contents", ()):
                if not row["Key"].endswith("/"):
                    body = mount.s3.get_object(Bucket=mount.bucket, Key=row["Key"])["Body"]
                    found[row["Key"].removeprefix(mount.prefix)] = body.read()
        return found

    def _tidy(self) -> None:
        """Remove what is not compared any more, so that the run may last as long as it likes."""
        old, self.rounds = self.rounds[:-ROUNDS_KEPT], self.rounds[-ROUNDS_KEPT:]
        last = self.rounds[-1]
        shared, last.shared, last.committed = last.shared, "", {}
        names = [folder for past in old for folder in past.folders] + ([shared] if shared else [])
        if names and not self.findings:
            mount = self.random.choice(self.places).mount
            self._run(
                "import shutil, sys\nfor path in sys.argv[1:]: shutil.rmtree(path)",
                *map(mount.path.__truediv__, names),
            )

    def _run(self, code: str, *arguments: object) -> str:
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def _find(self, text: str) -> None:
        self.findings.append(text)
        print("FOUND", text, flush=True)

    def _check_logs(self) -> None:
        """Move the log lines of this round out of the state directories, which are small."""
        for at, place in enumerate(self.places):
            text = place.mount.log()
            for path in place.mount.state.glob("*/log"):
                os.truncate(path, 0)
            lines = text.splitlines()
            if text and not text.endswith("\n"):
                lines.pop()
            for line in lines:
                if place.has_disks:  # the log lies on the disk that is filled up
                    line = TORN.sub("", line)
                if LOUD.search(line) and not EXPLAINED.search(line):
                    self._find(f"log of mount {at}: {line}")
            if self._log_path:
                with open(f"{self._log_path}-{at}", "a") as log:
                    log.write(text)

    def end(self) -> None:
        """New mounts with empty caches see the same."""
        now = self.rounds[-1]
        for place in self.places:
            place.mount.unmount()
            for path in place.mount.cache.iterdir():
                self._run("import shutil, sys; shutil.rmtree(sys.argv[1])", path)
        for place in self.places:
            place.mount.mount()
        if not self.findings:
            self._compare("after a remount", now)
        self._check_logs()

    def give_up(self, exc: BaseException) -> None:
        """Something that is no program of the run failed: a command, or a part of the run itself."""
        self._find(f"{type(exc).__name__}: {exc}")
        for place in self.places:
            with suppress(Exception):
                print(place.mount.log()[-4000:])

    def report(self, seconds: float) -> str:
        """A row for docs/reliability.md, with its head."""
        names = [
            "operations", "shared edits", "conflict files", "edits saved aside", "refused (ENOSPC)", "kill",
            "kill, state full", "kill, cache full", "upgrade", "keeper killed", "away", "all away", "state full",
            "cache full", "forget",
        ]  # fmt: skip
        head = ["seed", "seconds", "mounts", *names, "findings"]
        row = [self.seed, round(seconds), len(self.places), *(self.done[name] for name in names), len(self.findings)]
        return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in (head, row))


def _saved(mount: TestMount) -> bytes:
    return b"".join(path.read_bytes() for path in mount.state.glob("*/saved/*.data"))

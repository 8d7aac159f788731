"""Rounds of programs on one or several mounts of one prefix, what is done to them, and the verdict.

Owns the programs, the models that they leave behind and the findings.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from phfs_fuse.host.processes import ended
from tests.support.mounts import TestMount, mounted
from tests.support.proxy import Proxy
from tests.support.servers import Server
from tests.torture.content import CLIENT, SHARED, first_files
from tests.torture.faults import KINDS, Faults
from tests.torture.keys import Keys
from tests.torture.outsider import Outsider
from tests.torture.verdict import Round, Verdict

FLAGS = ("--attr-ttl", "3s", "-o", "retry-max=2s", "--cache-size", "32MiB")
ROUND_SECONDS = 30.0
BIG_EVERY, BIG_FIRST = 3, 2  # rounds with a folder of so many files
BIG_FILES = (6000, 2300, 700, 1100)  # in turn
KILL_SECONDS = 13.0  # between two deaths of a worker: the keeper gives up at the sixth in a minute
SEEN_SECONDS = 4.5  # until a mount sees what another one stored: `--attr-ttl 3s`, with room
HANGS_SECONDS = 300.0  # a program that has been told to end
WRITERS = 4  # in all
UNDELETABLE = "undeletable"  # ends the name of a folder where deletions may be refused
REFUSED_CODE = 6  # of `phfs umount`
UNMOUNTED_SECONDS = 60.0
ROUNDS_KEPT = 2  # whose files are still there, and compared
EXPLAINED = re.compile(
    r"the worker ended with SIGKILL|upload of key=|delete of key=|: the store |store does not answer"
    r"|failed: (head|list|get) |requests that were in work|the keeper is gone|disk failed|disk is full"
    r"|disk of the local state is full"
    r"|conflict: |was stored anew by somebody else|was deleted by somebody else|cannot be stored: somebody else"
    r"|refused by the store: r\d+undeletable/|the store refused \d+ changes? for good; the log"
    r"|cannot be fetched yet|attributes of key=|No space left|database or disk is full"
)
TORN = re.compile(r".+(?=\d{4}-\d\d-\d\dT[\d:.]+Z [A-Z]+ )")  # a line that was cut off, before the next one
LOUD = re.compile(r"^\S+ (WARNING|ERROR|CRITICAL) |^Traceback ")


def big_files(number: int, seed: int) -> int:
    """The files in the folder that all work in, in this round; 0: each has a folder of its own."""
    return BIG_FILES[(number // BIG_EVERY + seed) % len(BIG_FILES)] if number % BIG_EVERY == BIG_FIRST else 0


@dataclass
class Place:
    """One mount and what is done to it."""

    mount: TestMount
    front: Proxy  # of its store
    faults: Faults
    has_disks: bool
    keys: Keys | None  # its credentials, where they change
    killed: float = -KILL_SECONDS

    @property
    def may_kill(self) -> bool:
        return time.monotonic() - self.killed > KILL_SECONDS


class Torture:
    """`kinds`: of faults, those of a round are drawn from them."""

    def __init__(
        self, places: Sequence[Place], server: Server, seed: int, kinds: Sequence[str], log_path: Path | None
    ) -> None:
        self.places = places
        self.server = server
        self.random = random.Random(seed)
        self.seed = seed
        self.kinds = kinds
        self.done: Counter[str] = Counter()
        self.findings: list[str] = []
        self.rounds: list[Round] = []
        self._log_path = log_path
        mounts = [place.mount for place in places]
        self._verdict = Verdict(mounts, server.log.parent / "data", self.done, self._find)

    # ---- one round

    def round(self, number: int, files: int, seconds: float) -> None:
        """`files`: in the folder that all work in; 0: each has a folder of its own."""
        stop = self.places[0].mount.root / f"stop-{number}"
        now = Round()
        self.rounds.append(now)
        programs = self._start_big(number, files, now, stop) if files else self._start(number, now, stop)
        if "deletes" in self.kinds:
            now.undeletable = f"r{number}{UNDELETABLE}"
            now.roots.append(now.undeletable)
            now.folders.add(now.undeletable)
            for at, place in enumerate(self.places):
                path, owner = place.mount.path / now.undeletable, f"m{at}"
                seed = self.seed * 1000 + number * 10 + 8 + at
                programs[f"{now.undeletable} {owner}"] = self._program("remover", path, seed, stop, owner)
        for place in self.places:
            self._choose_faults(place)
        end = time.monotonic() + seconds
        while time.monotonic() < end and all(program.poll() is None for program in programs.values()):
            self._disturb(may_fill=not files)
        stop.touch()
        for name, program in programs.items():
            self._collect(name, program, now)
        stop.unlink()
        self._settle(is_big=bool(files))
        self._compare(f"round {number}")
        self._tidy()
        self._check_logs()

    def _choose_faults(self, place: Place) -> None:
        faults = place.faults
        faults.chance = self.random.choice([0.0, 0.02, 0.1])
        kinds = [kind for kind in self.kinds if kind in KINDS] or ["errors"]
        faults.kinds = tuple(self.random.sample(kinds, self.random.randint(1, len(kinds))))
        faults.refused_deletes = UNDELETABLE if "deletes" in self.kinds and self.random.random() < 0.7 else ""
        faults.streams = self.random.random() < 0.7
        if not faults.streams:
            place.front.cut_streams()

    def _start(self, number: int, now: Round, stop: Path) -> dict[str, subprocess.Popen[str]]:
        programs = {}
        for at in range(WRITERS):
            folder = f"r{number}w{at}"
            path = self.places[at % len(self.places)].mount.path / folder
            programs[folder] = self._program("writer", path, self.seed * 1000 + number * 10 + at, stop)
            now.roots.append(folder)
        if len(self.places) > 1:
            now.shared = f"r{number}shared"
            now.roots.append(now.shared)
            for at, place in enumerate(self.places):
                name, path = f"m{at}r{number}", place.mount.path / now.shared
                programs[name] = self._program("editor", path, self.seed * 1000 + number * 10 + 5 + at, stop, name)
        now.folders |= set(now.roots)
        return programs

    def _start_big(self, number: int, count: int, now: Round, stop: Path) -> dict[str, subprocess.Popen[str]]:
        """A program on each mount and an S3 client, in a folder of thousands of files that is there already."""
        now.big = f"r{number}big"
        now.roots.append(now.big)
        mount, seed = self.places[0].mount, self.seed * 1000 + number * 10
        owners = [CLIENT, SHARED, *(f"m{at}" for at in range(len(self.places)))]
        self.done["big folders"] += 1
        key = f"{mount.prefix}{now.big}/"
        Outsider(mount.s3, mount.bucket, key, seed, {}).put_all(first_files(owners, count))
        programs = {now.big: self._program("outsider", mount.bucket, key, seed, stop, count, *owners)}
        for at, place in enumerate(self.places):
            path, owner = place.mount.path / now.big, f"m{at}"
            programs[f"{now.big} {owner}"] = self._program("crowd", path, seed + 1 + at, stop, owner, count, *owners)
        return programs

    def _program(self, module: str, *arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", f"tests.torture.{module}", *map(str, arguments)]
        env = {**os.environ, **self.server.env, "ENDPOINT_URL": self.server.endpoint_url}
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)

    def _collect(self, name: str, program: subprocess.Popen[str], now: Round) -> None:
        try:
            out, errors = program.communicate(timeout=HANGS_SECONDS)
        except subprocess.TimeoutExpired:
            program.kill()
            self._find(f"{name}: a call hangs")
            return
        if program.returncode:
            self._find(f"{name}: {errors.strip()}")
            return
        model = json.loads(out)
        self.done["operations"] += model["operations"]
        self.done["refused (ENOSPC)"] += model.get("refused", 0)
        self.done["shared edits"] += len(model.get("committed", ()))
        now.refused += model.get("refused", 0)
        now.committed |= model.get("committed", {})
        for text in model.get("torn", ()):
            self._find(f"{name} read a mixed version: {text}")
        root = name.partition(" ")[0]
        now.files |= {f"{root}/{path}": found for path, found in model.get("files", {}).items()}
        now.folders |= {f"{root}/{path}" for path in model.get("folders", ())}
        now.guests |= model.get("guests", {})
        now.removals |= model.get("removals", {})
        now.contents |= model.get("contents", {})
        for path, versions in model.get("shared", {}).items():
            now.versions.setdefault(path, set()).update(versions)

    # ---- what is done to it

    def _disturb(self, may_fill: bool) -> None:
        time.sleep(self.random.uniform(0.2, 2.0))
        place = self.random.choice(self.places)
        kills = ["kill"] * 3 if place.may_kill else []
        disks = ["state full", "cache full"] if place.has_disks and may_fill else []
        keys = ["new key"] if place.keys else []
        what = self.random.choice([*kills, *disks, *keys, "upgrade", "forget", "away", "all away", "cut", "nothing"])
        self.done[what] += 1
        if what == "kill":
            self._kill(place)
        elif what == "upgrade":
            place.mount.upgrade()
        elif what == "forget" and os.geteuid() == 0:
            Path("/proc/sys/vm/drop_caches").write_text("2")
        elif what in ("away", "all away"):
            self._away([place] if what == "away" else self.places)
        elif what == "cut":
            place.front.cut_streams()
        elif what == "new key":
            assert place.keys
            place.faults.refused_key = place.keys.renew()
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

    def _settle(self, is_big: bool) -> None:
        """A mount of a big folder hears of changes again: else each of the files costs it three requests."""
        for place in self.places:
            if self.random.random() < 0.4:
                self._kill_keeper(place)
            place.faults.chance = 0.0
            place.faults.refused_deletes = ""
            place.faults.streams |= is_big
        for place in self.places:
            self._sync(place)
        if len(self.places) > 1:
            time.sleep(SEEN_SECONDS)

    def _sync(self, place: Place) -> None:
        """Fails once where a deletion was refused and undone."""
        try:
            place.mount.sync()
        except AssertionError as exc:
            if UNDELETABLE not in str(exc).partition("\n")[0] or "AccessDenied" not in str(exc):
                raise
            place.mount.sync()

    def _compare(self, when: str) -> None:
        for at, place in enumerate(self.places):
            pending = place.mount.status()["pending"]
            if pending["files"] or pending["deletes"]:
                self._find(f"{when}, mount {at} has pending changes: {pending}")
        with mounted(*FLAGS, server=self.server, bucket=self.places[0].mount.bucket) as fresh:
            self._verdict.compare(when, self.rounds, {**self._views(), "a new mount": fresh.path})

    def _views(self) -> dict[str, Path]:
        return {f"mount {at}": place.mount.path for at, place in enumerate(self.places)}

    def _tidy(self) -> None:
        """Remove what is not compared any more, so that the run may last as long as it likes."""
        old, self.rounds = self.rounds[:-ROUNDS_KEPT], self.rounds[-ROUNDS_KEPT:]
        names = [root for past in old for root in past.roots]
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
        for place in self.places:
            self._unmount(place)
            for path in place.mount.cache.iterdir():
                self._run("import shutil, sys; shutil.rmtree(sys.argv[1])", path)
        for place in self.places:
            place.mount.mount()
        if not self.findings:
            self._verdict.compare("after a remount", self.rounds, self._views())
        self._check_logs()
        for place in self.places:
            self._unmount(place)

    def _unmount(self, place: Place) -> None:
        """Says so where deletions were refused and undone."""
        keeper_pid = place.mount.record().keeper_pid
        done = place.mount.phfs("umount", place.mount.path)
        lines = done.stderr.splitlines()[1:]
        only_refused = done.returncode == REFUSED_CODE and all(f"{UNDELETABLE}/" in line for line in lines)
        assert done.returncode == 0 or only_refused, done.stderr
        assert ended(keeper_pid, UNMOUNTED_SECONDS), f"the keeper of {place.mount.path} goes on after umount"

    def give_up(self, exc: BaseException) -> None:
        """Something that is no program of the run failed: a command, or a part of the run itself."""
        self._find(f"{type(exc).__name__}: {exc}")
        for place in self.places:
            with suppress(Exception):
                print(place.mount.log()[-4000:])
                self._unmount(place)

    def report(self, seconds: float) -> str:
        """A row for docs/reliability.md, with its head."""
        names = [
            "operations", "big folders", "guests", "shared edits", "conflict files", "edits saved aside",
            "refused (ENOSPC)", "kill", "kill, state full", "kill, cache full", "upgrade", "keeper killed", "away",
            "all away", "state full", "cache full", "forget", "cut", "new key",
        ]  # fmt: skip
        head = ["seed", "seconds", "mounts", *names, "findings"]
        row = [self.seed, round(seconds), len(self.places), *(self.done[name] for name in names), len(self.findings)]
        return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in (head, row))

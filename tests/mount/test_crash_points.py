"""The worker dies at each step of the journal and of the store, one after the other (P1, P3, P4, P6).

A program changes files. A first run, without a death, says which steps that takes until all is stored; then the
worker is killed at the first of them, in the next run at the second, and so on. After each death no call has failed,
and mount and store have just what the program made.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import pytest

from phfs_fuse.types import MIB
from tests.mount.place import MountPlace, a_mount, script

pytestmark = [pytest.mark.fuse, pytest.mark.minio, pytest.mark.slow]

SYNC_SECONDS = 90.0
BIG = random.Random(1).randbytes(17 * MIB)
TREE = """
import hashlib, json, os, sys
os.chdir(sys.argv[1])
paths = [os.path.normpath(os.path.join(at, name)) for at, _, names in os.walk(".") for name in names]
print(json.dumps({path: hashlib.sha256(open(path, "rb").read()).hexdigest() for path in paths}))
"""


@dataclass(frozen=True)
class Scenario:
    before: Mapping[str, bytes]  # objects that are there
    code: str  # what a program does in the folder
    after: Mapping[str, bytes]
    steps: frozenset[str]  # some that it has to take


SCENARIOS = {
    "write": Scenario(
        {"old": b"old"},
        """if True:
            open("new", "x").write("new")
            open("old", "r+").write("O")
        """,
        {"new": b"new", "old": b"Old"},
        frozenset({"commit", "put"}),
    ),
    "rename a file": Scenario(
        {"a": b"aaa", "b": b"bbb"},
        'os.rename("a", "b")',
        {"b": b"aaa"},
        frozenset({"commit", "copy", "delete"}),
    ),
    "rename a directory": Scenario(
        {"d/1": b"one", "d/sub/2": b"two"},
        'os.rename("d", "e")',
        {"e/1": b"one", "e/sub/2": b"two"},
        frozenset({"commit", "copy", "delete"}),
    ),
    "delete": Scenario(
        {"a": b"aaa", "kept": b"kept", "d/1": b"one"},
        """if True:
            os.unlink("a")
            os.unlink("d/1")
            os.rmdir("d")
        """,
        {"kept": b"kept"},
        frozenset({"commit", "delete"}),
    ),
    "change a part": Scenario(
        {"big": BIG},
        """if True:
            with open("big", "r+b") as file:
                file.write(b"changed")
        """,
        {"big": b"changed" + BIG[7:]},
        frozenset({"commit", "create_multipart", "upload_part", "upload_part_copy", "complete_multipart"}),
    ),
    "rename a big file": Scenario(
        {"big": BIG},
        'os.rename("big", "new")',
        {"new": BIG},
        frozenset({"commit", "create_multipart", "upload_part_copy", "complete_multipart", "delete"}),
    ),
}


@pytest.fixture(scope="module")
def place() -> Iterator[MountPlace]:
    with a_mount(
        "--attr-ttl", "0", "-o", "write-back-delay=100ms,retry-max=1s", module="tests.support.crashing"
    ) as found:
        yield found


class Points:
    def __init__(self, place: MountPlace) -> None:
        self.mount = place.mount
        (self.state,) = (path.parent for path in self.mount.state.glob("*/journal.db"))
        self.mount.expected += [
            "the worker ended with SIGKILL",
            "multipart upload of .* is kept",
        ]  # its id was not noted

    def run(self, folder: str, scenario: Scenario, target: str) -> list[str]:
        """The steps up to the death at `target`; all, if it did not come to that."""
        for name, data in scenario.before.items():
            self.mount.s3.put_object(Bucket=self.mount.bucket, Key=f"{self.mount.prefix}{folder}/{name}", Body=data)
        script(TREE, self.mount.path / folder)  # known, and in the cache
        (self.state / "steps").write_text("")
        (self.state / "crash-at").write_text(target)
        script(f"import os, sys\nos.chdir(sys.argv[1])\n{scenario.code}", self.mount.path / folder)
        self._sync()
        (self.state / "crash-at").unlink(missing_ok=True)
        return (self.state / "steps").read_text().splitlines()

    def _sync(self) -> None:
        """The worker may die under this command too."""
        deadline = time.monotonic() + SYNC_SECONDS
        while True:
            try:
                self.mount.sync()
                return
            except AssertionError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    def check(self, folder: str, scenario: Scenario) -> None:
        wanted = {name: hashlib.sha256(data).hexdigest() for name, data in scenario.after.items()}
        assert json.loads(script(TREE, self.mount.path / folder)) == wanted
        assert self._objects(folder) == dict(scenario.after)

    def uploads(self, name: str) -> list[object]:
        """MinIO lists those of one whole key."""
        key = self.mount.prefix + name
        return list(self.mount.s3.list_multipart_uploads(Bucket=self.mount.bucket, Prefix=key).get("Uploads", ()))

    def _objects(self, folder: str) -> dict[str, bytes]:
        at = f"{self.mount.prefix}{folder}/"
        listed = self.mount.s3.list_objects_v2(Bucket=self.mount.bucket, Prefix=at).get("Contents", ())
        found = {row["Key"]: self.mount.s3.get_object(Bucket=self.mount.bucket, Key=row["Key"]) for row in listed}
        return {key.removeprefix(at): answer["Body"].read() for key, answer in found.items()}


@pytest.mark.parametrize("name", SCENARIOS)
def test_death_at_each_step(place: MountPlace, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    points, scenario, folder = Points(place), SCENARIOS[name], name.replace(" ", "-")
    steps = points.run(folder, scenario, "0 never")
    points.check(folder, scenario)
    assert {f"{when} {step}" for step in scenario.steps for when in ("before", "after")} <= set(steps)
    died: Counter[str] = Counter()
    for at, step in enumerate(steps):
        number = steps[: at + 1].count(step)
        taken = points.run(f"{folder}-{at}", scenario, f"{number} {step}")
        points.check(f"{folder}-{at}", scenario)
        died[step] += taken.count(step) == number  # else what was two commits went as one
    with capsys.disabled():
        print(f"\n{name}: killed at {died.total()} of {len(steps)} steps, {dict(died)}")
    assert all(died.values())
    for at in range(len(steps)):
        for big in scenario.after:
            until_none(partial(points.uploads, f"{folder}-{at}/{big}"))


def until_none(found: Callable[[], object]) -> None:
    """A worker that resumed aborts what the one before began; where no id was noted, as soon as it must be ours (an
    hour, which these tests make two seconds)."""
    deadline = time.monotonic() + SYNC_SECONDS
    while left := found():
        assert time.monotonic() < deadline, left
        time.sleep(0.1)

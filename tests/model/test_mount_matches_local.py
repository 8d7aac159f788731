"""Random calls on the mount and on a local directory give the same answers and the same trees.

PHFS_MODEL_EXAMPLES and PHFS_MODEL_SEED run it longer or otherwise; the seed is in the failure's report.
With PHFS_TEST_DIR=/some/dir a second local directory stands for the mount: the rules themselves are then checked.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, note, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from tests.model.pair import Pair
from tests.mount.place import Place

pytestmark = [pytest.mark.fuse, pytest.mark.slow]
EXAMPLES = int(os.environ.get("PHFS_MODEL_EXAMPLES", "12"))
SEED = int(os.environ.get("PHFS_MODEL_SEED", "1"))
FOREIGN_SECONDS = 15.0  # until a foreign change has to be seen: the mount's attribute lifetime, with room

PATHS = st.sampled_from(["a", "b", "d", "e", "d/a", "d/b", "e/a", "d/d", "d/d/a", "e/d"])
TARGETS = st.sampled_from(["a", "d", "d/a", "../a", "missing", ".", "b"])
OFFSETS = st.sampled_from([0, 1, 5, 4095, 4096, 5000, 131_071, 131_072, 300_000])
SIZES = st.sampled_from([0, 1, 3, 4096, 4097, 131_072, 200_000])
DATA = st.builds(
    lambda text, times: text * times, st.sampled_from(["x", "ab", "\xe9\0", "0123456789"]), st.integers(0, 9000)
)
FLAGS = st.sampled_from(["r", "w", "rw", "x", "a", "t"])
MODES = st.sampled_from([0o755, 0o700, 0o777, 0o740, 0o1777])
SLOTS = st.integers(0, 2)
SELDOM = st.sampled_from([False, False, False, True])  # a new worker takes a second


class MountMatchesLocal(RuleBasedStateMachine):
    """The same calls on the mount and on a local directory: same result, or same errno."""

    def __init__(self, place: Place, local: Path) -> None:
        super().__init__()
        note(f"PHFS_MODEL_SEED={SEED}")
        self._place = place
        self._folder = Path(tempfile.mkdtemp(dir=place.path))
        self._pair = Pair(self._folder, Path(tempfile.mkdtemp(dir=local)))

    @rule(path=PATHS, flags=st.sampled_from(["w", "rw", "x", "a", "t"]), offset=OFFSETS, data=DATA)
    def write(self, path: str, flags: str, offset: int, data: str) -> None:
        self._pair.both("write", path, flags, offset, data)

    @rule(path=PATHS, offset=OFFSETS, length=SIZES)
    def read(self, path: str, offset: int, length: int) -> None:
        self._pair.both("read", path, offset, length)

    @rule(path=PATHS, size=SIZES)
    def truncate(self, path: str, size: int) -> None:
        self._pair.both("truncate", path, size)

    @rule(source=PATHS, destination=PATHS)
    def rename(self, source: str, destination: str) -> None:
        self._pair.both("rename", source, destination)

    @rule(name=st.sampled_from(["mkdir", "mkdir", "rmdir", "unlink", "readlink", "listdir", "stat"]), path=PATHS)
    def one_path(self, name: str, path: str) -> None:
        self._pair.both(name, path)

    @rule(to=TARGETS, path=PATHS)
    def symlink(self, to: str, path: str) -> None:
        self._pair.both("symlink", to, path)

    @rule(path=PATHS, mode=MODES)
    def chmod(self, path: str, mode: int) -> None:
        self._pair.both("chmod", path, mode)

    @rule(path=PATHS, seconds=st.sampled_from([0, 1_000_000_000, 5_000_000_000]))
    def utime(self, path: str, seconds: int) -> None:
        self._pair.both("utime", path, seconds)

    @rule(slot=SLOTS, path=PATHS, flags=FLAGS)
    def open(self, slot: int, path: str, flags: str) -> None:
        self._pair.both("open", slot, path, flags)

    @rule(slot=SLOTS)
    def close(self, slot: int) -> None:
        self._pair.both("close", slot)

    @rule(slot=SLOTS, offset=OFFSETS, data=DATA)
    def fwrite(self, slot: int, offset: int, data: str) -> None:
        self._pair.both("fwrite", slot, offset, data)

    @rule(slot=SLOTS, offset=OFFSETS, length=SIZES)
    def fread(self, slot: int, offset: int, length: int) -> None:
        self._pair.both("fread", slot, offset, length)

    @rule(slot=SLOTS, size=SIZES)
    def ftruncate(self, slot: int, size: int) -> None:
        self._pair.both("ftruncate", slot, size)

    @rule(name=st.sampled_from(["fsync", "fstat"]), slot=SLOTS)
    def one_slot(self, name: str, slot: int) -> None:
        self._pair.both(name, slot)

    @rule()
    def sync(self) -> None:
        self._place.sync()

    @rule(now=SELDOM)
    def remount(self, now: bool) -> None:
        if now:
            self._pair.pause()  # what was closed must survive
            self._place.remount()
            self._pair.resume()

    @rule(now=SELDOM)
    def kill(self, now: bool) -> None:
        """The worker dies; what is open goes on."""
        if now:
            self._place.kill()

    @rule(path=PATHS, data=DATA)
    def foreign_write(self, path: str, data: str) -> None:
        """Another client of the store writes an object where a file is, or could be."""
        if self._kind(path) not in ("", "file") or not self._names_an_object(path):
            return
        self._pair.both("close_all")  # an open file keeps its version, and a dirty one would conflict
        self._place.sync()
        self._pair.model("replace", path, data)
        self._place.foreign_put(self._folder / path, data.encode("latin-1"))
        self._pair.agree_within(FOREIGN_SECONDS)

    @rule(path=PATHS)
    def foreign_delete(self, path: str) -> None:
        """Another client removes an object; a folder that it empties would be gone there, so not the last."""
        folder = os.path.dirname(path) or "."
        if self._kind(path) != "file" or not self._names_an_object(path):
            return
        if folder != "." and len(self._pair.model("listdir", folder)[1]) < 2:
            return
        self._pair.both("close_all")
        self._place.sync()
        self._pair.model("unlink", path)
        self._place.foreign_delete(self._folder / path)
        self._pair.agree_within(FOREIGN_SECONDS)

    def _names_an_object(self, path: str) -> bool:
        """Whether `path` goes through folders only: through a link, the key of the same spelling is another file."""
        return all(self._kind(str(folder)) == "dir" for folder in Path(path).parents[:-1])

    def _kind(self, path: str) -> str:
        """What the model has at `path`: "dir", "file", "other", or "" for nothing. Links are not followed."""
        outcome, answer = self._pair.model("stat", path)
        if outcome == "error":
            return ""
        return {"0o4": "dir", "0o10": "file"}.get(answer[0][:-4], "other")

    @invariant()
    def trees_agree(self) -> None:
        self._pair.both("tree")

    def teardown(self) -> None:
        self._pair.pause()


def test_mount_matches_local(place: Place, tmp_path: Path) -> None:
    print(f"PHFS_MODEL_SEED={SEED} PHFS_MODEL_EXAMPLES={EXAMPLES}")
    machine = seed(SEED)(type("Machine", (MountMatchesLocal,), {}))
    run_state_machine_as_test(
        lambda: machine(place, tmp_path),  # type: ignore[arg-type]  # any callable that makes one
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=40,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        ),
    )

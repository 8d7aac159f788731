"""Where a test of the mount runs, and how it starts other programs there. Owns no state.

A `Place` is a real mount, or with PHFS_TEST_DIR=/some/dir a local directory: a test of what POSIX says that
fails on a local disk is a wrong test.
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pytest

from tests.mount.trees import pull, tree
from tests.support.mounts import mounted

LOCAL_ROOT = os.environ.get("PHFS_TEST_DIR", "")
SECONDS = 90.0  # for one program
HANG_SECONDS = 600  # of one module
WATCHDOG = """
import select, sys
if not select.select([sys.stdin], [], [], float(sys.argv[2]))[0]:
    open(f"/sys/fs/fuse/connections/{sys.argv[1]}/abort", "w").write("1")
"""


class Place(Protocol):
    @property
    def path(self) -> Path: ...

    def pull(self, folder: Path, to: Path) -> Path:
        """Wait until all is stored, then make `to` what the objects alone say of `folder`."""

    def sync(self) -> None:
        """Return when the store has everything."""

    def remount(self) -> None:
        """Unmount cleanly and mount again with the caches of the kernel and of the process gone."""

    def kill(self) -> None:
        """The worker dies, another one goes on."""

    def foreign_put(self, path: Path, body: bytes) -> None:
        """Write the object of this path as another client of the store does."""

    def foreign_delete(self, path: Path) -> None: ...


@dataclass(frozen=True, slots=True)
class LocalPlace:
    path: Path

    def pull(self, folder: Path, to: Path) -> Path:
        run("cp", "-a", folder, to)
        return to

    def sync(self) -> None: ...

    def remount(self) -> None: ...

    def kill(self) -> None: ...

    def foreign_put(self, path: Path, body: bytes) -> None:
        beside = path.with_name(".foreign")
        beside.write_bytes(body)
        beside.rename(path)

    def foreign_delete(self, path: Path) -> None:
        path.unlink()


@dataclass(frozen=True, slots=True)
class MountPlace:
    mount: Any

    @property
    def path(self) -> Path:
        return Path(self.mount.path)

    def pull(self, folder: Path, to: Path) -> Path:
        self.mount.sync()
        return pull(self.mount.s3, self.mount.bucket, f"{self.key(folder)}/", to)

    def sync(self) -> None:
        self.mount.sync()

    def remount(self) -> None:
        self.mount.remount()

    def kill(self) -> None:
        self.mount.kill_worker()

    def key(self, path: Path) -> str:
        return f"{self.mount.prefix}{path.relative_to(self.path)}"

    def foreign_put(self, path: Path, body: bytes) -> None:
        self.mount.s3.put_object(Bucket=self.mount.bucket, Key=self.key(path), Body=body)

    def foreign_delete(self, path: Path) -> None:
        self.mount.s3.delete_object(Bucket=self.mount.bucket, Key=self.key(path))


@contextmanager
def watchdog(path: Path) -> Iterator[None]:
    """Abort the mount's connection if the body takes too long: each call that hangs then ends with an error.

    In a process of its own: a hanging page fault stops every thread of this one.
    """
    minor = os.minor(os.stat(path).st_dev)
    argv = [sys.executable, "-c", WATCHDOG, str(minor), str(HANG_SECONDS)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE):  # leaving closes its stdin, which ends it
        yield


@contextmanager
def a_mount(*flags: str, **more: Any) -> Iterator[MountPlace]:
    """A mount with more flags of `phfs mount` (and what else `mounted` takes), under the watchdog."""
    if LOCAL_ROOT:
        pytest.skip("needs a store")
    if os.geteuid() == 0:
        flags += ("--allow-other",)
    with mounted(*flags, **more) as mount, watchdog(mount.path):
        yield MountPlace(mount)


@contextmanager
def a_place(**more: Any) -> Iterator[Place]:
    """A mount, or a folder in PHFS_TEST_DIR."""
    if LOCAL_ROOT:
        with tempfile.TemporaryDirectory(dir=LOCAL_ROOT) as path:
            yield LocalPlace(Path(path))
        return
    with a_mount(**more) as mount:
        yield mount


def run(
    *argv: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None, seconds: float = SECONDS
) -> str:
    """Output of a program that must succeed, and in time."""
    done = subprocess.run(
        [str(arg) for arg in argv],
        cwd=cwd,
        env={**os.environ, "LC_ALL": "C.UTF-8", **(env or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=seconds,
    )
    text = done.stdout.decode(errors="replace")
    assert done.returncode == 0, f"{argv[0]} ended with {done.returncode}:\n{text[-4000:]}"
    return text


def script(code: str, *argv: str | Path, cwd: Path | None = None, seconds: float = SECONDS) -> str:
    """Output of a Python program of its own, which must succeed. For what could hang its process."""
    return run(sys.executable, "-c", code, *argv, cwd=cwd, seconds=seconds)


def together(code: str, *argvs: Sequence[object], seconds: float = SECONDS) -> list[str]:
    """Outputs of one Python program run at the same time with each of `argvs`. All must succeed."""
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, *map(str, argv)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for argv in argvs
    ]
    try:
        outputs = [process.communicate(timeout=seconds)[0] for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait(10)
    assert [process.returncode for process in running] == [0] * len(running), "\n".join(outputs)
    return outputs


def attempt(call: Callable[..., object], *args: object) -> str:
    """Make the call; the name of its errno, or "" if it worked."""
    try:
        call(*args)
    except OSError as exc:
        return errno.errorcode[exc.errno or 0]
    return ""


def refused(code: int, call: Callable[..., object], *args: object) -> None:
    """Assert that the call fails with this errno."""
    assert attempt(call, *args) == errno.errorcode[code]


def saved(place: Place, folder: Path, to: Path) -> Path:
    """A local copy of `folder` made from the store alone, which is what the mount shows."""
    copy = place.pull(folder, to)
    stored, shown = tree(copy), tree(folder)
    differ = [name for name in sorted(stored.keys() | shown.keys()) if stored.get(name) != shown.get(name)]
    lines = [f"{name!r}: stored {stored.get(name)}, shown {shown.get(name)}" for name in differ]
    assert not lines, "\n".join(lines)
    return copy


def within(seconds: float, answer: Callable[[], object], wanted: object) -> None:
    """Ask until the answer is the one that is wanted."""
    deadline = time.monotonic() + seconds
    while (got := answer()) != wanted:
        assert time.monotonic() < deadline, f"still {got!r} instead of {wanted!r}"
        time.sleep(0.05)

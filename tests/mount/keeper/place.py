"""A mount with a worker that needs no store, and who reads it.

Whatever touches a file of the mount does it in a process of its own, with a deadline.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from phfs_fuse.config import resolve
from phfs_fuse.config.model import CacheConfig, KernelConfig, MountConfig, StoreConfig, TreeConfig, WritebackConfig
from phfs_fuse.host import registry
from phfs_fuse.host.mount_table import MountEntry, mount_table
from phfs_fuse.host.processes import ended

CHECKOUT = Path(__file__).resolve().parents[3]
SECONDS = 30.0
NOBODY = 65534

# What a command does: start, and tell the reason and the exit code of a failure.
START = """
import logging, sys
from pathlib import Path
from phfs_fuse.config import resolve as settings; from phfs_fuse.launch import launcher as starting
from phfs_fuse.errors import StartupError
logging.basicConfig(format="%(message)s")
path, foreground, *worker = sys.argv[1:]
try:
    sys.exit(starting.start(settings.load_config(Path(path).read_text()), Path(path), foreground=foreground == "yes",
                          worker=worker))
except StartupError as exc:
    print(exc, file=sys.stderr)
    sys.exit(exc.exit_code)
"""
# The keeper without its waits before a restart.
IMPATIENT = """
import sys
from phfs_fuse.keeper import keeper; from phfs_fuse.keeper import worker_process as workers
workers.RESTART_DELAYS = (0.0, 0.0)
sys.exit(keeper.main(sys.argv[1:]))
"""
UNMOUNT = """
import sys
from pathlib import Path
from phfs_fuse.launch import launcher as starting
starting.unmount(Path(sys.argv[1]), lazy=sys.argv[2] == "yes")
"""
# A mount namespace in which everybody may use /dev/fuse, as udev sets it up but not every container has it.
NAMESPACE = """
set -e
[ "$(stat -c %a /dev/fuse)" = 666 ] || { mknod -m 666 "$1/fuse" c 10 229; mount --bind "$1/fuse" /dev/fuse; }
echo ready
read line
"""
# Reads 16 bytes for each line of its input, from one descriptor.
READER = """
import os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
print("open", flush=True)
for _line in sys.stdin:
    print(os.pread(fd, 16, 0).decode(), flush=True)
"""


class Place:
    """A mount point with what belongs to it, in a folder that an ordinary user can be given."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.path, self.state, self.config_path = root / "mnt", root / "state", root / "config.json"
        self.as_user: Sequence[str] = ()
        self.namespace: subprocess.Popen[str] | None = None  # None: that of the tests
        kernel = KernelConfig(mountpoint=self.path, read_ahead_bytes=512 << 10)
        self.config = MountConfig(
            store=StoreConfig(bucket="bucket"),
            cache=CacheConfig(directory=root / "cache"),
            writeback=WritebackConfig(directory=self.state),
            tree=TreeConfig(uid=os.getuid(), gid=os.getgid()),
            kernel=kernel,
        )
        self.path.mkdir()
        self.state.mkdir()

    def become_nobody(self) -> None:
        """Go on as an ordinary user; the capability lets it read an interpreter that lies in the home of root."""
        if os.geteuid() != 0 or not shutil.which("setpriv"):
            pytest.skip("needs root, to become somebody else")
        self.namespace = self.spawn("unshare", "--mount", "sh", "-c", NAMESPACE, "sh", self.root)
        assert self.namespace.stdout is not None
        if self.namespace.stdout.readline() != "ready\n":
            pytest.skip("needs the right to make a device node")
        capability = ["--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search"]
        user = [f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", *capability]
        self.as_user = ["nsenter", f"--mount=/proc/{self.namespace.pid}/ns/mnt", "setpriv", *user]
        self.config = replace(self.config, tree=TreeConfig(uid=NOBODY, gid=NOBODY))
        for path in (self.root, *self.root.iterdir()):
            os.chown(path, NOBODY, NOBODY)

    @property
    def env(self) -> dict[str, str]:
        places = {"PHFS_RUNTIME_DIR": str(self.root / "run"), "HOME": str(self.root)}
        return {**os.environ, **places, "PYTHONPATH": str(CHECKOUT)}

    def python(self, code: str, *arguments: object, foreground: bool = False) -> subprocess.Popen[str]:
        return self.spawn(sys.executable, "-c", code, *arguments, foreground=foreground)

    def spawn(self, *command: object, foreground: bool = False) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*self.as_user, *map(str, command)],
            env=self.env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=foreground,
        )

    def run(self, *command: object) -> subprocess.CompletedProcess[str]:
        arguments = [*self.as_user, *map(str, command)]
        return subprocess.run(arguments, env=self.env, capture_output=True, text=True, timeout=SECONDS)

    def begin(self, *faults: str, foreground: bool = False) -> subprocess.Popen[str]:
        self.config_path.write_text(resolve.dump_config(self.config))
        worker = [sys.executable, "-m", "tests.support.memory_worker", *faults]
        return self.python(START, self.config_path, "yes" if foreground else "no", *worker, foreground=foreground)

    def start(self, *faults: str) -> None:
        result = finish(self.begin(*faults))
        assert result == (0, ""), (result, self.log())

    def unmount(self, *, lazy: bool = False) -> tuple[int, str]:
        return finish(self.python(UNMOUNT, self.path, "yes" if lazy else "no"))

    def record(self) -> registry.MountRecord | None:
        with suppress(StopIteration, FileNotFoundError):
            return registry.MountRecord(**json.loads(next((self.root / "run").glob("*.json")).read_text()))
        return None

    @property
    def keeper_pid(self) -> int:
        return int((self.state / "keeper-pid").read_text())

    @property
    def worker_pid(self) -> int:
        """As a program sees it that reads the mount."""
        return int(self.run("cat", self.path / "pid").stdout)

    @property
    def mounted(self) -> MountEntry | None:
        process = "self" if self.namespace is None else self.namespace.pid
        return mount_table(Path(f"/proc/{process}/mountinfo").read_text()).get(str(self.path))

    def signal(self, number: int = signal.SIGTERM) -> None:
        os.kill(self.keeper_pid, number)

    def log(self) -> str:
        path = self.state / "log"
        return path.read_text() if path.exists() else ""

    def remove(self) -> None:
        if self.namespace is not None:
            finish(self.namespace)  # its mounts go with it
            self.namespace = None
        while self.mounted:  # they may lie on each other
            subprocess.run(["umount", "-l", self.path], timeout=SECONDS, check=True)
        with suppress(OSError):
            if not ended(self.keeper_pid, 5):
                self.signal(signal.SIGKILL)
        shutil.rmtree(self.root)


class Reader:
    """A process that has one file open."""

    def __init__(self, place: Place, name: str) -> None:
        self.process = place.python(READER, place.path / name)
        assert self._line() == "open"

    def ask(self) -> None:
        assert self.process.stdin is not None
        print(file=self.process.stdin, flush=True)

    def answer(self) -> str:
        """The first 16 bytes of the file."""
        return self._line()

    def read(self) -> str:
        self.ask()
        return self.answer()

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip("\n")

    def close(self) -> None:
        assert finish(self.process) == (0, "")


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and what was said on stderr."""
    try:
        _output, errors = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    return process.returncode, errors


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)  # nothing here can be waited for

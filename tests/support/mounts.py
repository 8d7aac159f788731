"""`phfs mount` for tests: a real mount of a bucket of its own, made, watched and removed through the commands.

Owns the mount and its folders; nothing of them is left, however the test ended. Nothing here touches a file of the
mount, so that a mount that hangs fails its test and not the run. The store is one server for all mounts of a run.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config

from phfs_fuse.errors import StartupError
from phfs_fuse.host import registry
from phfs_fuse.host.mount_table import mount_table
from phfs_fuse.host.processes import ended
from phfs_fuse.host.registry import MountRecord
from phfs_fuse.launch import client
from tests.support import disks
from tests.support.servers import Server, real_store

COMMAND_SECONDS = 120.0
END_SECONDS = 20.0
PREFIX = "groups/test/"
CHECKOUT = str(Path(__file__).parents[2])
LOUD = re.compile(r"^\S+ (WARNING|ERROR|CRITICAL) |^Traceback |^\{.*\"level\": \"(warning|error|critical)\"")


@cache
def shared_server() -> Server:
    """The store of all mounts of this process, with which it ends."""
    stack = ExitStack()
    atexit.register(stack.close)
    return stack.enter_context(real_store())


def s3_client(server: Server) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=server.endpoint_url,
        aws_access_key_id=server.access_key,
        aws_secret_access_key=server.secret_key,
        region_name="us-east-1",
        config=Config(s3={"addressing_style": "path"}, retries={"max_attempts": 2}),
    )


class TestMount:
    """A mount that is mounted. Each method ends within COMMAND_SECONDS or fails."""

    __test__ = False  # not a test class of pytest

    def __init__(self, root: Path, bucket: str, server: Server, flags: tuple[str, ...], prefix: str) -> None:
        self.root = root
        self.path, self.state, self.cache = root / "mnt", root / "state", root / "cache"
        self.bucket, self.prefix, self.server = bucket, prefix, server
        self.endpoint_url, self.env = server.endpoint_url, server.env
        self.s3 = s3_client(server)
        self.flags = flags
        self.module = "phfs_fuse"  # what the commands run
        self.within: tuple[str, ...] = ()
        self.expected: list[str] = []  # patterns of loud log lines that the test provokes

    # --- the commands

    def phfs(self, *arguments: str | Path, seconds: float = COMMAND_SECONDS) -> subprocess.CompletedProcess[str]:
        """Run a `phfs` command that may fail."""
        return subprocess.run(
            [*self.within, sys.executable, "-m", self.module, *map(str, arguments)],
            env={**os.environ, **self.env, "PHFS_RUNTIME_DIR": str(self.root / "run"), "PYTHONPATH": CHECKOUT},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
        )

    def must(self, *arguments: str | Path) -> str:
        done = self.phfs(*arguments)
        assert done.returncode == 0, f"phfs {arguments[0]} ended with {done.returncode}: {done.stderr}\n{self.log()}"
        return done.stdout

    def mount(self, *flags: str) -> None:
        """`flags` come after those of the mount; the last of a name counts."""
        places = ("--endpoint-url", self.endpoint_url, "--state-dir", self.state, "--cache-dir", self.cache)
        self.must("mount", f"s3://{self.bucket}/{self.prefix}", self.path, *places, *self.flags, *flags)

    def unmount(self) -> None:
        """Upload what is pending and unmount; returns when keeper and worker have ended."""
        keeper_pid = self.record().keeper_pid
        self.must("umount", self.path)
        assert ended(keeper_pid, END_SECONDS), f"the keeper goes on after umount\n{self.log()}"

    def remount(self, *flags: str) -> None:
        """Unmount cleanly and mount again: the caches of kernel and process are gone, that on the disk stays."""
        self.unmount()
        self.mount(*flags)

    # asked for so often that the start of a command each time would be a good part of a run

    def sync(self, path: str | Path | None = None) -> None:
        """As `phfs sync`: wait until everything, or one path of the mount, is in the store."""
        try:
            for _ in client.sync(self.record(), str(path) if path else None, COMMAND_SECONDS):
                pass
        except StartupError as exc:
            raise AssertionError(f"{exc}\n{self.log()}") from exc

    def status(self) -> Mapping[str, Any]:
        """As `phfs status --json`. Raises: StartupError between two workers."""
        return client.status(self.record())

    # --- its processes

    def record(self) -> MountRecord:
        with _variable("PHFS_RUNTIME_DIR", str(self.root / "run")):
            record = registry.find(str(self.path))
        assert record is not None, self.log()
        return record

    @property
    def worker_pid(self) -> int | None:
        """None: between two of them."""
        keeper = self.record().keeper_pid
        with suppress(FileNotFoundError, ValueError, IndexError):
            return int(Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split()[0])
        return None

    def kill_worker(self, then: Callable[[], None] = lambda: None) -> int:
        """kill -9 the worker; returns the pid of the next one when it serves, `then` is called in between."""
        old = self.worker_pid
        assert old is not None, self.log()
        self.expected.append(r"the worker ended with SIGKILL")
        os.kill(old, signal.SIGKILL)
        then()
        deadline = time.monotonic() + COMMAND_SECONDS
        while time.monotonic() < deadline:
            with suppress(StartupError):
                pid = int(self.status()["pid"])
                if pid != old:
                    return pid
            time.sleep(0.1)  # the next worker announces itself to the keeper only
        raise AssertionError(f"no worker after kill -9\n{self.log()}")

    def upgrade(self) -> int:
        """Put another worker in the place of this one; returns its pid."""
        old = self.worker_pid
        self.must("upgrade", self.path)
        new = int(self.status()["pid"])
        assert new != old
        return new

    # --- its disks: small file systems of their own, see `mounted`

    def fill(self, disk: str) -> None:
        """Take all the space that is left on "state" or "cache"."""
        disks.fill(self.root / disk)

    def free(self, disk: str) -> None:
        """Give back what `fill` took."""
        disks.free(self.root / disk)

    # --- its log

    def log(self) -> str:
        return "".join(path.read_text(errors="replace") for path in sorted(self.state.glob("*/log")))

    def require_quiet_log(self) -> None:
        """Fail on warnings and errors that are not `expected`."""
        loud = [line for line in self.log().splitlines() if LOUD.search(line)]
        unexpected = [line for line in loud if not any(re.search(known, line) for known in self.expected)]
        assert not unexpected, "\n".join(["unexpected in the log:", *unexpected, "", self.log()])

    # --- its end

    def remove(self) -> None:
        """Unmount by force whatever is left, and end what served it."""
        keepers = self._keepers()
        for _ in range(4):  # mounts may lie on each other
            if (entry := mount_table().get(str(self.path))) is None:
                break
            for command in (["fusermount3", "-u"], ["umount", "-l"]):
                if str(self.path) in mount_table():
                    _run_briefly([*command, str(self.path)])
            if not all(ended(pid, END_SECONDS) for pid in keepers):
                _abort(entry.device)
        for pid in keepers:
            if not ended(pid, END_SECONDS):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def _keepers(self) -> list[int]:
        found = (json.loads(path.read_text()) for path in (self.root / "run").glob("*.json"))
        return [int(record["keeper_pid"]) for record in found]


@contextmanager
def mounted(
    *flags: str,
    server: Server | None = None,
    bucket: str | None = None,
    prefix: str = PREFIX,
    disks: Mapping[str, int] | None = None,
    module: str = "phfs_fuse",
    within: tuple[str, ...] = (),
) -> Iterator[TestMount]:
    """A mount with more flags of `phfs mount`, of an empty bucket unless one is named. Its end unmounts and fails
    on loud lines in the log. `disks`: "state" and "cache" as file systems of so many bytes, which needs root.
    `module`: what to run as `phfs`; `within`: the start of a command that runs it."""
    server = server or shared_server()
    root = Path(tempfile.mkdtemp(prefix="phfs-mount-"))
    mount = TestMount(root, bucket or f"test-{uuid.uuid4().hex[:12]}", server, flags, prefix)
    mount.module, mount.within = module, within
    try:
        mount.path.mkdir()
        for name, size in (disks or {}).items():
            (root / name).mkdir()
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "phfs-test", root / name], check=True)
        if bucket is None:
            mount.s3.create_bucket(Bucket=mount.bucket)
        mount.mount()
        yield mount
        if str(mount.path) in mount_table():
            mount.unmount()
        mount.require_quiet_log()
    finally:
        mount.s3.close()
        mount.remove()
        for name in disks or {}:
            _run_briefly(["umount", "-l", str(root / name)])
        if str(mount.path) not in mount_table():  # else this would remove what is in the mount
            shutil.rmtree(root, ignore_errors=True)


@contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _run_briefly(command: list[str]) -> None:
    with suppress(subprocess.TimeoutExpired, FileNotFoundError):
        subprocess.run(command, timeout=END_SECONDS, capture_output=True)


def _abort(device: str) -> None:
    """End every call that waits for the mount. Needs fusectl, which systemd mounts."""
    with suppress(OSError):
        Path(f"/sys/fs/fuse/connections/{device.partition(':')[2]}/abort").write_text("1")

"""The keeper with a worker that needs no store: every way in which a mount begins, goes on and ends.

Whatever touches a file of the mount does it in a process of its own, with a deadline.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from phfs_fuse import registry, settings
from phfs_fuse.config import CacheConfig, KernelConfig, MountConfig, StoreConfig, TreeConfig, WritebackConfig
from phfs_fuse.mountpoint import MountEntry, mount_table
from tests.support.mounts import ended

pytestmark = pytest.mark.fuse

CHECKOUT = Path(__file__).resolve().parents[2]
SECONDS = 30.0
NOBODY = 65534

# What a command does: start, and tell the reason and the exit code of a failure.
START = """
import logging, sys
from pathlib import Path
from phfs_fuse import settings, starting
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
from phfs_fuse import keeper, workers
workers.RESTART_DELAYS = (0.0, 0.0)
sys.exit(keeper.main(sys.argv[1:]))
"""
UNMOUNT = """
import sys
from pathlib import Path
from phfs_fuse import starting
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
        self.config_path.write_text(settings.dump_config(self.config))
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


@pytest.fixture
def place() -> Iterator[Place]:
    place = Place(Path(tempfile.mkdtemp(prefix="phfs-keeper-")))
    try:
        yield place
    finally:
        place.remove()


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


# --- the beginning


def test_start_returns_when_files_can_be_read(place: Place) -> None:
    place.start()
    assert place.run("cat", place.path / "text").stdout == "the same text from every worker\n"
    record = place.record()
    assert record is not None
    assert (record.mountpoint, record.url) == (str(place.path), "s3://bucket/")
    assert record.keeper_pid == place.keeper_pid
    assert (place.state / "log").stat().st_mode & 0o777 == 0o600


def test_the_keeper_leaves_the_session_and_the_folder_of_the_command(place: Place) -> None:
    place.start()
    proc = Path(f"/proc/{place.keeper_pid}")
    assert os.getsid(place.keeper_pid) != os.getsid(0)
    assert os.readlink(proc / "cwd") == "/"
    assert not [path for path in (proc / "fd").iterdir() if os.readlink(path).startswith(str(place.path))]


def test_kernel_is_asked_for_what_makes_it_fast(place: Place) -> None:
    place.config = replace(place.config, log_level="debug")
    place.start()
    got = next(line for line in place.log().splitlines() if "the kernel offered" in line)
    for flag in ("ASYNC_READ", "WRITEBACK_CACHE", "PARALLEL_DIROPS", "DO_READDIRPLUS", "MAX_PAGES"):
        assert flag in got
    assert place.mounted is not None
    if os.geteuid() == 0:
        assert Path(f"/sys/class/bdi/{place.mounted.device}/read_ahead_kb").read_text() == "512\n"


def test_requests_are_as_large_as_the_kernel_can_make_them(place: Place) -> None:
    place.config = replace(place.config, kernel=replace(place.config.kernel, read_ahead_bytes=1 << 20))
    place.start()
    data = place.path / "data"
    place.run("dd", "if=/dev/zero", f"of={data}", "bs=4k", "count=1024", "conv=fsync")
    place.run("dd", f"of={data}", "if=/dev/zero", "bs=4M", "count=1", "conv=notrunc", "oflag=direct")
    place.run("dd", f"if={data}", "of=/dev/null", "bs=4M", "iflag=direct")
    requests = (place.state / "requests").read_text().splitlines()
    sizes = {
        operation: [int(line.split()[3]) for line in requests if operation in line] for operation in ("read", "write")
    }
    assert sizes["read"].count(1 << 20) == 4
    assert len(sizes["write"]) < 100  # the kernel joined 1024 writes
    assert max(sizes["write"]) == 1 << 20


def test_read_only_is_the_kernels_business(place: Place) -> None:
    place.config = replace(place.config, tree=replace(place.config.tree, read_only=True))
    place.start()
    assert "Read-only file system" in place.run("truncate", "-s0", place.path / "data").stderr


def test_a_failing_check_makes_no_mount(place: Place) -> None:
    assert finish(place.begin("--fail-check")) == (3, "s3://bucket/: there is no such bucket\n")
    assert not place.mounted
    assert place.record() is None
    assert not place.config_path.exists()
    assert ended(place.keeper_pid, SECONDS)


def test_a_worker_that_ends_before_it_serves_leaves_no_mount(place: Place) -> None:
    code, errors = finish(place.begin("--no-serve"))
    assert (code, errors) == (1, "the worker ended with status 7 before the mount was ready\n")
    assert not place.mounted
    assert list(place.path.iterdir()) == []


def test_a_mount_point_that_is_used_or_not_empty_is_refused(place: Place) -> None:
    (place.path / "file").touch()
    assert finish(place.begin())[0] == 4
    (place.path / "file").unlink()
    place.start()
    code, errors = finish(place.begin())
    assert (code, errors.count("\n")) == (4, 1)
    assert place.worker_pid


def test_a_state_directory_that_cannot_be_written_is_named(place: Place) -> None:
    shutil.rmtree(place.state)
    place.state.touch()
    code, errors = finish(place.begin())
    assert code == 5
    assert str(place.state) in errors


def test_when_the_command_is_killed_the_mount_goes(place: Place) -> None:
    command = place.begin("--slow-check")
    until((place.state / "keeper-pid").exists)
    command.kill()
    finish(command)
    assert ended(place.keeper_pid, SECONDS)
    assert not place.mounted
    assert (place.state / "drained").exists()


def test_a_signal_before_it_is_ready_ends_the_start(place: Place) -> None:
    command = place.begin("--slow-check")
    until((place.state / "keeper-pid").exists)
    place.signal()
    assert finish(command) == (1, "interrupted before it was ready\n")
    assert not place.mounted


# --- the end


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_uploads_and_unmounts(place: Place, number: int) -> None:
    place.start()
    place.signal(number)
    assert ended(place.keeper_pid, SECONDS)
    assert not place.mounted
    assert (place.state / "drained").read_text() == "1"
    assert place.record() is None
    assert not place.config_path.exists()
    assert "exit_code=0" in place.log()


def test_a_second_signal_does_not_wait_for_uploads(place: Place) -> None:
    place.start("--never-drained")
    place.signal()
    assert not ended(place.keeper_pid, 0.5)
    assert place.mounted
    place.signal()
    assert ended(place.keeper_pid, SECONDS)
    assert not place.mounted


def test_what_the_kernel_holds_is_written_before_the_unmount(place: Place) -> None:
    place.start()
    place.run("dd", "if=/dev/zero", f"of={place.path / 'data'}", "bs=1M", "count=8")
    place.signal()
    assert ended(place.keeper_pid, SECONDS)
    assert (place.state / "data").stat().st_size == 8 << 20


def test_open_files_go_on_after_a_signal_until_they_are_closed(place: Place) -> None:
    place.start()
    reader = Reader(place, "text")
    place.signal()
    until(lambda: not place.mounted)
    assert "in use" in (place.state / "busy").read_text()
    assert reader.read() == "the same text fr"
    assert not ended(place.keeper_pid, 0)
    reader.close()
    assert ended(place.keeper_pid, SECONDS)


def test_a_worker_that_does_not_wait_for_the_last_open_file_ends_the_mount(place: Place) -> None:
    place.start("--impatient")
    reader = Reader(place, "text")
    place.signal()
    assert ended(place.keeper_pid, SECONDS)
    assert "starting it again" not in place.log()
    assert "exit_code=0" in place.log()
    reader.close()


def test_fusermount_ends_keeper_and_worker(place: Place) -> None:
    place.start()
    assert place.run("fusermount3", "-u", place.path).returncode == 0
    assert ended(place.keeper_pid, SECONDS)
    assert place.record() is None


def test_unmount_of_a_mount_in_use_says_so(place: Place) -> None:
    place.start()
    reader = Reader(place, "text")
    code, errors = place.unmount()
    assert code
    assert "files are in use" in errors
    assert place.unmount(lazy=True) == (0, "")
    reader.close()
    assert ended(place.keeper_pid, SECONDS)


def test_in_the_foreground_the_command_is_the_keeper(place: Place) -> None:
    command = place.begin(foreground=True)
    until(lambda: place.record() is not None)
    assert place.keeper_pid == command.pid
    os.killpg(command.pid, signal.SIGINT)  # Ctrl-C
    code, errors = finish(command)
    assert code == 0
    assert "ended mountpoint" in errors
    assert (place.state / "drained").exists()


def test_in_the_foreground_a_failure_is_one_line(place: Place) -> None:
    code, errors = finish(place.begin("--fail-check", foreground=True))
    assert (code, errors) == (3, "phfs: s3://bucket/: there is no such bucket\n")


# --- the death of the worker


def test_a_killed_worker_is_resumed_and_open_files_go_on(place: Place) -> None:
    place.start()
    first = place.worker_pid
    reader = Reader(place, "text")
    hanging = Reader(place, "hang")
    hanging.ask()
    until(lambda: "read hang" in (place.state / "requests").read_text())
    os.kill(first, signal.SIGKILL)
    assert hanging.answer() == "the same text fr"  # the request that the dead worker had taken
    assert reader.read() == "the same text fr"
    assert place.worker_pid != first
    reader.close()
    hanging.close()
    assert place.unmount() == (0, "")


def test_writes_go_on_over_the_death_of_the_worker(place: Place) -> None:
    place.start()
    worker = place.worker_pid
    writer = place.python(
        "import sys\n"
        "with open(sys.argv[1], 'wb', 0) as f:\n"
        "    for i in range(4000):\n"
        "        f.write(i.to_bytes(4, 'big') * 1024)\n"
        "        if i == 1000: print('quarter', flush=True)\n",
        place.path / "data",
    )
    assert writer.stdout
    assert writer.stdout.readline() == "quarter\n"
    os.kill(worker, signal.SIGKILL)
    assert finish(writer) == (0, "")
    place.signal()
    assert ended(place.keeper_pid, SECONDS)
    want = b"".join(i.to_bytes(4, "big") * 1024 for i in range(4000))
    assert (place.state / "data").read_bytes() == want


def test_a_hangup_puts_another_worker_in_its_place(place: Place) -> None:
    place.start()
    first = place.worker_pid
    reader = Reader(place, "text")
    place.signal(signal.SIGHUP)
    until(lambda: place.log().count("resumed") == 1)
    assert place.worker_pid != first
    assert ended(first, SECONDS)
    assert reader.read() == "the same text fr"
    assert "starting it again" not in place.log()
    place.signal(signal.SIGHUP)
    until(lambda: place.log().count("resumed") == 2)
    assert reader.read() == "the same text fr"
    reader.close()
    assert place.unmount() == (0, "")


def test_a_worker_that_cannot_take_over_changes_nothing(place: Place) -> None:
    place.start("--no-takeover")
    first = place.worker_pid
    reader = Reader(place, "text")
    place.signal(signal.SIGHUP)
    until(lambda: "not upgraded: the state is of a newer format" in place.log())
    assert place.worker_pid == first
    assert reader.read() == "the same text fr"
    reader.close()
    place.signal()
    assert ended(place.keeper_pid, SECONDS)
    assert not place.mounted


def test_a_signal_that_comes_while_no_worker_runs_is_not_lost(place: Place) -> None:
    place.start()
    worker = place.worker_pid
    os.kill(place.keeper_pid, signal.SIGSTOP)
    os.kill(worker, signal.SIGKILL)
    place.signal()
    os.kill(place.keeper_pid, signal.SIGCONT)
    assert ended(place.keeper_pid, SECONDS)
    assert not place.mounted
    assert "resumed" in place.log()


def test_a_worker_that_always_dies_leaves_the_mount_broken_not_empty(place: Place) -> None:
    place.config_path.write_text(settings.dump_config(place.config))
    worker = [sys.executable, "-m", "tests.support.memory_worker", "--no-resume"]
    keeper = place.python(IMPATIENT, f"--config={place.config_path}", "--", *worker)
    until(lambda: place.record() is not None)
    os.kill(place.worker_pid, signal.SIGKILL)
    code, errors = finish(keeper)
    assert code == 1
    assert errors.count("starting it again") == 2
    assert "gave up" in errors
    assert place.mounted
    assert "not connected" in place.run("ls", place.path).stderr
    assert place.unmount() == (0, "")
    assert not place.mounted
    assert place.record() is None


def test_the_death_of_the_keeper_leaves_the_mount_broken_not_empty(place: Place) -> None:
    place.start()
    worker = place.worker_pid
    place.signal(signal.SIGKILL)
    assert ended(worker, SECONDS)
    assert place.mounted
    assert "not connected" in place.run("ls", place.path).stderr
    code, errors = finish(place.begin())
    assert (code, "dead mount" in errors) == (4, True)
    assert place.unmount() == (0, "")
    place.start()
    assert place.worker_pid != worker


# --- an ordinary user


def test_an_ordinary_user_mounts_resumes_and_unmounts(place: Place) -> None:
    place.become_nobody()
    place.start()
    first = place.worker_pid
    assert Path(f"/proc/{place.keeper_pid}").stat().st_uid == NOBODY
    os.kill(first, signal.SIGKILL)
    assert place.worker_pid != first
    assert place.mounted is not None
    assert (place.mounted.kind, place.mounted.source) == ("fuse.phfs", "phfs")
    assert place.unmount() == (0, "")
    assert ended(place.keeper_pid, SECONDS)
    assert not place.mounted


def test_an_ordinary_users_signal_unmounts_too(place: Place) -> None:
    place.become_nobody()
    place.start()
    place.signal()
    assert ended(place.keeper_pid, SECONDS)
    assert not place.mounted


def test_without_user_allow_other_one_line_says_that_it_is_left_out(place: Place) -> None:
    place.become_nobody()
    if "user_allow_other" in [line.strip() for line in Path("/etc/fuse.conf").read_text().splitlines()]:
        pytest.skip("this machine has user_allow_other")
    place.config = replace(place.config, kernel=replace(place.config.kernel, allow_other=True))
    code, errors = finish(place.begin())
    assert (code, errors.count("\n")) == (0, 1)
    assert "user_allow_other" in errors
    assert "allow_other" not in place.run("grep", place.path, "/proc/self/mounts").stdout
    assert place.unmount() == (0, "")


def test_what_fusermount_says_reaches_the_user(place: Place) -> None:
    place.become_nobody()
    os.chown(place.path, 0, 0)
    code, errors = finish(place.begin())
    assert code == 4
    assert "fusermount3" in errors
    assert errors.count("\n") == 1

"""What commands call to start a keeper and to end a mount. Owns no state; standard library only.

A keeper tells whether its mount is ready by a pipe: one JSON object, `exit_code` and `reason`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO, Final, Protocol

from phfs_fuse.config import json_text
from phfs_fuse.config.dirs import make_private
from phfs_fuse.config.model import MountConfig
from phfs_fuse.errors import LocalStateError, StartupError, startup_error
from phfs_fuse.host import fusemount, registry
from phfs_fuse.host.fusemount import UNMOUNT_SECONDS
from phfs_fuse.host.mount_table import mount_table, require_free
from phfs_fuse.host.processes import readable
from phfs_fuse.types import MIB

log = logging.getLogger(__name__)

INTERRUPTED_SECONDS: Final = 10.0  # for a keeper that is not ready to take back what it has done
REPORT_BYTES_MAX: Final = 16384
LOG_BYTES_MAX: Final = 10 * MIB  # a longer one is put aside at the next start
NO_ALLOW_OTHER: Final = "allow-other is left out: /etc/fuse.conf has no line user_allow_other"


def start(config: MountConfig, config_path: Path, *, foreground: bool, worker: Sequence[str] = ()) -> int:
    """Mount. In the background: returns 0 when the mount is ready. In the foreground: does not return, this
    process becomes the keeper and ends with its exit code.

    `config_path` holds `config` for the keeper and its workers; it is theirs from now on and removed at the
    end.
    `worker` is the command to serve with in place of this package's.

    Raises:
        StartupError: the class says why not, and there is no mount. In the foreground: what shows at once.
    """
    try:
        require_free(config.kernel.mountpoint, mount_table())
        if config.kernel.allow_other and not fusemount.allows_other(config):
            log.warning(NO_ALLOW_OTHER)
        command = [*fusemount.python(), "phfs_fuse.keeper", f"--config={config_path.absolute()}"]
        if foreground:
            _become(command, worker)
        start_logged(config, command, worker)
    except BaseException:
        config_path.unlink(missing_ok=True)
        raise
    return 0


def start_logged(config: MountConfig, command: Sequence[str], worker: Sequence[str]) -> None:
    """Run `command` as the keeper, with its log in the state directory; return when the mount is ready.
    Raises: StartupError."""
    log_path = config.writeback.directory / "log"
    with _open_log(log_path) as log_fd:
        start = partial(_execute_keeper, command, worker, os.environ)
        _start_in_background(lambda report_fd: start(report_fd, log_fd), str(log_path))


class Spawn(Protocol):
    """Starts a keeper in a process group of its own, which is returned."""

    def __call__(
        self, config_path: Path, holder: Path | None, environ: Mapping[str, str], report_fd: int, log_fd: int
    ) -> int: ...


def start_held(
    config: MountConfig,
    config_path: Path,
    *,
    holder: Path | None,
    environ: Mapping[str, str],
    seconds: float,
    spawn: Spawn,
    log_fd: int,
) -> None:
    """Mount in the background, or go on with the connection that `holder` has of this mount point; return when it is
    served. Nothing here looks at the mount point. `environ` is that of keeper and workers, `log_fd` their log.

    Raises:
        StartupError: the class says why not; there is no mount, or the holder still has it.
        TimeoutError: the same, not ready within `seconds`.
    """
    start = partial(spawn, config_path.absolute(), holder, environ)
    try:
        _start_in_background(lambda report_fd: start(report_fd, log_fd), "the log", time.monotonic() + seconds)
    except BaseException:
        config_path.unlink(missing_ok=True)
        raise


def unmount(mountpoint: Path, *, lazy: bool = False) -> None:
    """Unmount without asking for uploads first (they go on after the unmount). Removes dead mounts too.

    Raises:
        MountpointError: in use, not ours, or not there.
    """
    fusemount.unmount(mountpoint, lazy=lazy, timeout_seconds=UNMOUNT_SECONDS)
    if (record := registry.find(str(mountpoint))) is not None and not record.alive:
        registry.remove(record.mountpoint, record.keeper_pid)


def _become(command: Sequence[str], worker: Sequence[str]) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [*command, "--", *worker], fusemount.environment())


def _start_in_background(start: Callable[[int], int], log_place: str, deadline: float | None = None) -> None:
    """`start` is given the descriptor to report to, and returns the process group."""
    ours, theirs = os.pipe()
    with open(ours, "rb", buffering=0) as answers:
        try:
            group = start(theirs)
        finally:
            os.close(theirs)
        answer = _read_until(answers, deadline)
        if answer is None:
            _end_group(group, answers)
            raise TimeoutError("the mount was not ready in time")
    if not answer:
        raise StartupError(f"the mount ended before it was ready; the reason is in {log_place}")
    report = json_text.parse(answer)
    if report["exit_code"]:
        raise startup_error(report["exit_code"], report["reason"])


def _read_until(pipe: BinaryIO, deadline: float | None) -> bytes | None:
    """All that is written until the pipe's other end is closed; None: that takes too long."""
    found = b""
    while True:
        wait = None if deadline is None else max(0.0, deadline - time.monotonic())
        if not readable(pipe.fileno(), wait):
            return None
        if not (chunk := pipe.read(REPORT_BYTES_MAX)):
            return found
        found += chunk


def _end_group(group: int, answers: BinaryIO) -> None:
    """End a keeper that is not ready: it takes back what it has done. Its descriptor of the pipe tells when."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGTERM)
        if _read_until(answers, time.monotonic() + INTERRUPTED_SECONDS) is None:
            os.killpg(group, signal.SIGKILL)


def execute(config_path: Path, holder: Path | None, environ: Mapping[str, str], report_fd: int, log_fd: int) -> int:
    """The `Spawn` that starts an interpreter."""
    command = [*fusemount.python(), "phfs_fuse.keeper", f"--config={config_path}"]
    return _execute_keeper([*command, *([f"--holder={holder}"] if holder else [])], (), environ, report_fd, log_fd)


def _execute_keeper(
    command: Sequence[str], worker: Sequence[str], environ: Mapping[str, str], report_fd: int, log_fd: int
) -> int:
    """Returns when the process has forked itself into the background (`main`) and is no child of ours: the id of
    its process group."""
    process = subprocess.Popen(
        [*command, f"--report-fd={report_fd}", "--", *worker],
        env=fusemount.environment(environ),
        stdin=subprocess.DEVNULL,
        stdout=log_fd,
        stderr=log_fd,
        pass_fds=[report_fd],
        start_new_session=True,
        cwd="/",
    )
    process.wait()
    return process.pid


@contextlib.contextmanager
def _open_log(path: Path) -> Iterator[int]:
    try:
        make_private(path.parent)
        if path.exists() and path.stat().st_size > LOG_BYTES_MAX:
            path.replace(path.with_suffix(".1"))
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        raise LocalStateError(f"{path}: {exc.strerror}: choose a writable --state-dir") from exc
    try:
        yield fd
    finally:
        os.close(fd)

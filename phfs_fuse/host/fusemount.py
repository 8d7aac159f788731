"""The kernel's side of a mount: make it, find it, tune it, end it. Owns no state.

Nothing here opens or stats a file of the mount: such a call waits for the server, and the caller may be what
the server waits for. Standard library only: the keeper imports this.

`python -m phfs_fuse.fusemount [--lazy] MOUNTPOINT` unmounts (as root): in a process of its own, since
umount(2) returns only when the server has taken the kernel's dirty pages.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import select
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from phfs_fuse.config.model import MountConfig
from phfs_fuse.errors import MountpointError
from phfs_fuse.host.mount_table import mount_table
from phfs_fuse.types import KIB, MIB

log = logging.getLogger(__name__)

FS_TYPE: Final = "phfs"
READ_BYTES_MAX: Final = 1 * MIB  # of one request; the kernel's limit is 256 pages
HELPER_SECONDS: Final = 30.0
UNMOUNT_SECONDS: Final = 60.0  # for the kernel's dirty pages to reach the worker

# Source: mount(2), umount(2)
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MNT_DETACH, UMOUNT_NOFOLLOW = 2, 8


def device_of(mountpoint: Path) -> str | None:
    """The device of what is mounted there, as `major:minor`; None: nothing."""
    entry = mount_table().get(str(mountpoint))
    return None if entry is None else entry.device


def mount(config: MountConfig) -> int:
    """Mount; return the descriptor of the connection. Does not wait for a server.

    Raises:
        MountpointError: with the reason and the remedy.
    """
    return _mount_as_root(config) if os.geteuid() == 0 else _mount_as_user(config)


def allows_other(config: MountConfig) -> bool:
    """Whether `allow_other` is asked for and to be had."""
    return config.kernel.allow_other and (os.geteuid() == 0 or _users_may_allow_other())


def _users_may_allow_other() -> bool:
    try:
        lines = Path("/etc/fuse.conf").read_text().splitlines()
    except OSError:
        return False
    return "user_allow_other" in (line.strip() for line in lines)


def _options(config: MountConfig) -> list[str]:
    options = ["default_permissions", f"max_read={READ_BYTES_MAX}"]
    return [*options, "allow_other"] if allows_other(config) else options


def _source(config: MountConfig) -> str:
    return config.kernel.fs_name or config.store.url


def _mount_as_root(config: MountConfig) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    fd = _open_device()
    root_mode = f"rootmode={stat.S_IFDIR:o}"
    options = [
        f"fd={fd}",
        root_mode,
        f"user_id={os.geteuid()}",
        f"group_id={os.getegid()}",
        *_options(config),
    ]
    flags = MS_NOSUID | MS_NODEV | (MS_RDONLY if config.tree.read_only else 0)
    flags |= MS_NOEXEC if config.kernel.noexec else 0
    target, source = os.fsencode(config.kernel.mountpoint), os.fsencode(_source(config))
    if libc.mount(source, target, f"fuse.{FS_TYPE}".encode(), flags, ",".join(options).encode()):
        os.close(fd)
        reason = os.strerror(ctypes.get_errno())
        raise MountpointError(f"{config.kernel.mountpoint}: mount failed: {reason}: is CAP_SYS_ADMIN missing?")
    return fd


def _open_device() -> int:
    try:
        return os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    except OSError as exc:
        raise MountpointError(f"/dev/fuse: {exc.strerror}: load the fuse module or pass the device in") from exc


def _mount_as_user(config: MountConfig) -> int:
    """libfuse's set-uid helper mounts, and sends the descriptor through a socket. Source: fusermount3(1)"""
    name = _source(config).replace("\\", "\\\\").replace(",", "\\,")
    options = [*_options(config), f"subtype={FS_TYPE}", f"fsname={name}"]
    options += ["ro"] if config.tree.read_only else []
    options += ["noexec"] if config.kernel.noexec else []
    ours, theirs = socket.socketpair()
    with ours, theirs:
        _run_helper(["-o", ",".join(options)], config.kernel.mountpoint, theirs)
        ours.setblocking(False)  # the helper has ended: what it sent is there
        try:
            _data, fds, _flags, _address = socket.recv_fds(ours, 1, 1, socket.MSG_CMSG_CLOEXEC)
            return fds[0]
        except (BlockingIOError, IndexError) as exc:
            raise MountpointError(f"{config.kernel.mountpoint}: fusermount3 sent no descriptor") from exc


def _run_helper(arguments: Sequence[str], mountpoint: Path, theirs: socket.socket) -> None:
    command = [_helper(), *arguments, "--", str(mountpoint)]
    environment = os.environ | {"_FUSE_COMMFD": str(theirs.fileno())}
    try:
        done = subprocess.run(
            command,
            env=environment,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=HELPER_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise MountpointError(f"{mountpoint}: {exc}") from exc
    if done.returncode:
        raise MountpointError(f"{mountpoint}: {_one_line(done.stderr) or 'fusermount3 failed'}")


def _helper() -> str:
    if (path := shutil.which("fusermount3")) is None:
        raise MountpointError("fusermount3: not found: install the package fuse3, or mount as root")
    return path


def _one_line(output: bytes) -> str:
    return " ".join(output.decode(errors="replace").split())


def unmount(mountpoint: Path, *, lazy: bool, timeout_seconds: float) -> None:
    """Unmount, in a child. Raises: MountpointError when it is busy, not ours, or not done in time."""
    child = start_unmount(mountpoint, lazy=lazy)
    try:
        child.wait(timeout_seconds)
    except subprocess.TimeoutExpired:
        child.kill()
        raise MountpointError(f"{mountpoint}: not unmounted in {timeout_seconds:g} s; try --lazy") from None
    check_unmounted(child, mountpoint)


def start_unmount(mountpoint: Path, *, lazy: bool) -> subprocess.Popen[bytes]:
    """A child for `check_unmounted` when it has ended. Raises: MountpointError: no helper is installed."""
    return subprocess.Popen(
        _unmount_command(mountpoint, lazy=lazy),
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        cwd="/",
    )


def check_unmounted(child: subprocess.Popen[bytes], mountpoint: Path) -> None:
    """Return if the child, which has ended, or somebody else unmounted. Raises: MountpointError: why not."""
    _output, reason = child.communicate()
    if child.returncode and device_of(mountpoint) is not None:
        raise MountpointError(_one_line(reason) or f"{mountpoint}: not unmounted in time")


def _unmount_command(mountpoint: Path, *, lazy: bool) -> list[str]:
    if os.geteuid() == 0:
        return [*python(), "phfs_fuse.fusemount", *(["--lazy"] if lazy else []), str(mountpoint)]
    return [_helper(), "-u", *(["-z"] if lazy else []), "--", str(mountpoint)]


def is_connected(fd: int) -> bool:
    """Whether the connection lives: false after the unmount took effect or after an abort."""
    poll = select.poll()
    poll.register(fd, 0)
    return not any(event & select.POLLERR for _fd, event in poll.poll(0))


def set_read_ahead(device: str, read_ahead_bytes: int) -> None:
    """Set the kernel's read-ahead, where this user may."""
    try:
        Path(f"/sys/class/bdi/{device}/read_ahead_kb").write_text(str(read_ahead_bytes // KIB))
    except OSError as exc:
        log.debug("the kernel's read-ahead stays at its default: %s", exc)


def python() -> list[str]:
    """The start of a command that runs a module of this package; -P: never one of the current directory."""
    return [sys.executable, "-P", "-m"]


def environment(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """`environ` (None: that of this process), in which `python()` finds this package also where it runs from a
    checkout."""
    found = dict(os.environ if environ is None else environ)
    here = str(Path(__file__).resolve().parents[2])
    paths = found.get("PYTHONPATH", "").split(os.pathsep)
    if here in paths or here in (path for path in sys.path if path.endswith(("site-packages", "dist-packages"))):
        return found
    return found | {"PYTHONPATH": os.pathsep.join(filter(None, [here, *paths]))}


def main(arguments: Sequence[str]) -> int:
    """The process `python -m phfs_fuse.fusemount`."""
    *options, target = arguments
    flags = UMOUNT_NOFOLLOW | (MNT_DETACH if options == ["--lazy"] else 0)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.umount2(os.fsencode(target), flags) == 0:
        return 0
    code = ctypes.get_errno()
    with contextlib.suppress(BrokenPipeError):
        print(f"{target}: {'files are in use' if code == errno.EBUSY else os.strerror(code)}", file=sys.stderr)
    return 1

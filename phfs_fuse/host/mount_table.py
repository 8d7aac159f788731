"""What is mounted where, found without a request to a FUSE mount: a hung one must not hang us. No state."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from phfs_fuse.errors import MountpointError

LINKS_MAX: Final = 40  # Source: path_resolution(7)
_STAT: Final = "import os, sys\ntry: os.stat(sys.argv[1])\nexcept OSError as exc: sys.exit(exc.errno)"


@dataclass(frozen=True, slots=True)
class MountEntry:
    mountpoint: str
    kind: str  # such as ext4 or fuse.phfs
    source: str
    device: str = ""  # "major:minor", as in /sys/class/bdi

    @property
    def is_fuse(self) -> bool:
        return self.kind == "fuse" or self.kind.startswith("fuse.")


MountTable = Mapping[str, MountEntry]


def mount_table(text: str | None = None) -> MountTable:
    """The mounts of this process by mount point, where several lie on each other the top one.

    Source: proc_pid_mountinfo(5).
    """
    if text is None:
        text = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
    found = {}
    for line in text.splitlines():
        fields, _, tail = line.partition(" - ")
        kind, source = tail.split(" ")[:2]
        _id, _parent, device, _root, place = fields.split(" ")[:5]
        mountpoint = _unescape(place)
        found[mountpoint] = MountEntry(mountpoint, kind, _unescape(source), device)
    return found


def locate(path: str, table: MountTable) -> tuple[str, MountEntry | None]:
    """`path` as an absolute path without symlinks, and the FUSE mount it lies in.

    Names inside a FUSE mount are not looked at, so symlinks there stay. Raises: MountpointError (loop).
    """
    current, pending = "/", os.path.join(os.getcwd(), path).split("/")[::-1]
    links = 0
    while pending:
        if (part := pending.pop()) in ("", "."):
            continue
        step = os.path.dirname(current) if part == ".." else os.path.join(current, part)
        target = None if part == ".." or covering(step, table) else _link(step)
        if target is None:
            current = step
            continue
        if (links := links + 1) > LINKS_MAX:
            raise MountpointError(f"{path}: too many symbolic links")
        current = "/" if target.startswith("/") else current
        pending += target.split("/")[::-1]
    return current, covering(current, table)


def covering(path: str, table: MountTable) -> MountEntry | None:
    """The FUSE mount that an absolute path without symlinks lies in."""
    for place in (path, *map(str, Path(path).parents)):
        if place in table:
            return table[place] if table[place].is_fuse else None
    return None


def require_free(mountpoint: Path, table: MountTable) -> None:
    """Raises: MountpointError unless this is an empty directory that nothing is mounted on."""
    if (entry := table.get(str(mountpoint))) is not None:
        if entry.is_fuse and probe(str(mountpoint)) == errno.ENOTCONN:
            raise MountpointError(f"{mountpoint}: a dead mount is left here; phfs umount {mountpoint} removes it")
        raise MountpointError(f"{mountpoint}: {entry.source} is mounted here already")
    try:
        with os.scandir(mountpoint) as entries:
            empty = next(entries, None) is None
    except FileNotFoundError as exc:
        raise MountpointError(f"{mountpoint}: does not exist; mkdir makes it") from exc
    except OSError as exc:
        raise MountpointError(f"{mountpoint}: {(exc.strerror or str(exc)).lower()}") from exc
    if not empty:
        raise MountpointError(f"{mountpoint}: is not empty; what is in it would be hidden")


def require_nothing_mounted(mountpoint: Path) -> None:
    """As `require_free`, without a look at the directory. Raises: MountpointError."""
    if (entry := mount_table().get(str(mountpoint))) is not None:
        raise MountpointError(f"{mountpoint}: {entry.source} is mounted here already, and cannot be taken up")


def probe(path: str, seconds: float = 2.0) -> int | None:
    """The errno of stat(2), 0 without an error, None when there is no answer in time.

    In a process of its own, left behind if it hangs: even SIGKILL cannot end a request to a hung mount.
    """
    child = subprocess.Popen([sys.executable, "-ISc", _STAT, path])
    try:
        return child.wait(seconds)
    except subprocess.TimeoutExpired:
        child.kill()
        child.returncode = -9  # nobody waits for it
        return None


def _link(path: str) -> str | None:
    try:
        return os.readlink(path)
    except OSError:
        return None


def _unescape(text: str) -> str:
    raw = re.sub(rb"\\([0-7]{3})", lambda found: bytes([int(found[1], 8)]), os.fsencode(text))
    return os.fsdecode(raw)

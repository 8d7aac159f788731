"""Which mounts run on this machine: one small file per mount in the runtime directory.

State: files `<hash of the mount point>.json`, mode 0600, written and removed by the keeper, read by the
commands. A record whose keeper is gone is the trace of a crash, not a mount. Standard library only.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from phfs_fuse.config import json_text
from phfs_fuse.config.dirs import make_private, runtime_dir
from phfs_fuse.host.processes import ended


@dataclass(frozen=True, slots=True, kw_only=True)
class MountRecord:
    mountpoint: str  # absolute, without symlinks, as /proc/self/mountinfo has it
    control_socket: str
    keeper_pid: int
    url: str

    @property
    def alive(self) -> bool:
        """Whether the keeper's process is there. A process of another user counts."""
        try:  # one that has ended may stay as a zombie where nobody reaps, as in a container without an init
            return not ended(self.keeper_pid, 0)
        except OSError:
            return False


def path_of(mountpoint: str) -> Path:
    return runtime_dir() / (hashlib.sha256(os.fsencode(mountpoint)).hexdigest()[:16] + ".json")


def write(record: MountRecord) -> None:
    """Announce a mount. Atomic; replaces the trace of an earlier mount on the same mount point."""
    path = path_of(record.mountpoint)
    make_private(path.parent)
    draft = path.with_suffix(f".{os.getpid()}.tmp")
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        json.dump(asdict(record), file)
    draft.replace(path)


def remove(mountpoint: str, keeper_pid: int) -> None:
    """Take back the announcement, if it is still the one of this keeper."""
    if (record := find(mountpoint)) is not None and record.keeper_pid == keeper_pid:
        path_of(mountpoint).unlink(missing_ok=True)


def find(mountpoint: str) -> MountRecord | None:
    return _read(path_of(mountpoint))


def records() -> Iterator[MountRecord]:
    """All records, in the order of their mount points; those of dead keepers too."""
    found = (_read(path) for path in runtime_dir().glob("*.json"))
    yield from sorted((record for record in found if record is not None), key=lambda record: record.mountpoint)


def _read(path: Path) -> MountRecord | None:
    """None: not there, or not a record (another version's, or half of one after a power cut)."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        data = json_text.parse(path.read_text(encoding="utf-8"))
        return MountRecord(
            mountpoint=str(data["mountpoint"]),
            control_socket=str(data["control_socket"]),
            keeper_pid=int(data["keeper_pid"]),
            url=str(data["url"]),
        )
    return None

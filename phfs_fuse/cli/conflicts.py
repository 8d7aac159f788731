"""`phfs conflicts`: show the copies of what lost, and settle one by ordinary calls on the mount. Owns no state."""

from __future__ import annotations

import json
import os
from dataclasses import asdict

from phfs_fuse.errors import MountpointError, UsageError
from phfs_fuse.host import registry
from phfs_fuse.host.mount_table import mount_table
from phfs_fuse.launch import client
from phfs_fuse.launch.client import Conflict

KEEP = ("ours", "theirs", "both")


def show(mountpoint: str | None, *, as_json: bool) -> None:
    """Print the conflicts of one mount or of all. Raises: MountpointError."""
    if mountpoint is not None:
        records = [client.mount_of(mountpoint, mount_table())[0]]
    else:
        records = [record for record in registry.records() if record.alive]
    found = [conflict for record in records for conflict in client.conflicts(record)]
    if as_json:
        print(json.dumps([_fields(conflict) for conflict in found], indent=1))
    elif found:
        from phfs_fuse.cli import display

        display.conflicts(found)
    else:
        print("no conflicts")


def _fields(conflict: Conflict) -> dict[str, object]:
    fields = asdict(conflict)
    del fields["record"]
    names = {"original": conflict.original, "copy": conflict.copy}
    return {"mountpoint": conflict.record.mountpoint, **fields, **names}


def resolve(path: str, keep: str | None) -> None:
    """Settle the conflict of `path`, the name or its copy. Raises: UsageError, MountpointError."""
    if keep not in KEEP:
        raise UsageError(f"--keep: say what stays, one of {', '.join(KEEP)}")
    conflict = _find(path)
    if keep == "ours" and (conflict.outside or not conflict.kept_as):
        where = f"lies in {conflict.copy}, changed ranges only" if conflict.kept_as else "could not be kept"
        raise UsageError(f"{conflict.original}: ours {where}; put it together by hand, then use --keep both")
    try:
        if keep == "ours":
            os.replace(conflict.copy, conflict.original)
        elif keep == "theirs" and conflict.kept_as:
            os.unlink(conflict.copy)
    except OSError as exc:
        raise MountpointError(f"{exc.filename}: {exc.strerror}") from exc
    client.settled(conflict)


def _find(path: str) -> Conflict:
    record, inner = client.mount_of(os.path.dirname(os.path.abspath(path)), mount_table())
    inner = os.path.normpath(os.path.join(inner, os.path.basename(path)))
    found = [conflict for conflict in client.conflicts(record) if inner in (conflict.path, conflict.kept_as)]
    if not found:
        raise UsageError(f"{path}: has no conflict; phfs conflicts lists them")
    if len(found) > 1:
        copies = ", ".join(conflict.copy for conflict in found)
        raise UsageError(f"{path}: has several conflicts, name one copy: {copies}")
    return found[0]

"""A tree as a value, to compare two of them, and the tree that the objects alone describe. Owns no state.

`pull` is the independent reader of the tests: it knows the format of docs/SEMANTICS.md, plain S3 calls and
nothing of the file system's own code.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE_MODE, DIR_MODE = 0o644, 0o755  # of objects without metadata


@dataclass(frozen=True, slots=True)
class Entry:
    """What must be the same in two trees. `data`: hash of the bytes, or where the link points."""

    mode: int
    uid: int
    gid: int
    size: int
    mtime_ns: int
    data: str


def entry(path: bytes, *, times: bool) -> Entry:
    info = os.lstat(path)
    kind = stat.S_IFMT(info.st_mode)
    sized = kind in (stat.S_IFREG, stat.S_IFLNK)
    data = ""
    if kind == stat.S_IFREG:
        with open(path, "rb") as file:
            data = hashlib.file_digest(file, "sha256").hexdigest()
    elif kind == stat.S_IFLNK:
        data = os.fsdecode(os.readlink(path))
    mtime_ns = info.st_mtime_ns if times and kind == stat.S_IFREG else 0
    return Entry(info.st_mode, info.st_uid, info.st_gid, info.st_size if sized else 0, mtime_ns, data)


def walk(root: bytes) -> Iterator[bytes]:
    """Every path under `root` but itself, parents first."""
    for found in sorted(os.scandir(root), key=lambda item: item.name):
        yield found.path
        if found.is_dir(follow_symlinks=False):
            yield from walk(found.path)


def tree(root: Path, *, times: bool = True, leave_out: Callable[[str], bool] | None = None) -> dict[str, Entry]:
    """Relative path -> entry of all that is under `root`; mtimes of files only."""
    top = os.fsencode(root)
    relative = {os.fsdecode(os.path.relpath(path, top)): path for path in walk(top)}
    return {name: entry(path, times=times) for name, path in relative.items() if not (leave_out and leave_out(name))}


def local_name(key: str) -> str:
    """The path of a key. In keys a byte that is not UTF-8 is U+201B and two hex digits, U+201B itself may be
    doubled."""
    mark = "\N{SINGLE HIGH-REVERSED-9 QUOTATION MARK}"
    return re.sub(
        f"{mark}({mark}|[89A-F][0-9A-F])",
        lambda found: mark if found[1] == mark else os.fsdecode(bytes.fromhex(found[1])),
        key,
    )


def pull(client: Any, bucket: str, prefix: str, to: Path) -> Path:
    """Make `to` from the objects under `prefix`, by the S3 API alone, with modes, owners, times and links."""
    to.mkdir(parents=True)
    directories: list[tuple[Path, dict[str, str]]] = []
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
        for found in page.get("Contents", []):
            answer = client.get_object(Bucket=bucket, Key=found["Key"])
            target = to / local_name(found["Key"][len(prefix) :])
            target.parent.mkdir(parents=True, exist_ok=True)
            metadata = answer["Metadata"]
            metadata.setdefault("mtime", str(answer["LastModified"].timestamp()))
            if found["Key"].endswith("/"):
                assert found["Size"] == 0, f"marker {found['Key']} has {found['Size']} bytes"
                target.mkdir(exist_ok=True)
                directories.append((target, metadata))
            else:
                _make(target, answer["Body"].read(), metadata)
    for target, metadata in reversed(directories):  # last, since a mode may forbid to write there
        _dress(target, int(metadata.get("mode", f"{stat.S_IFDIR | DIR_MODE:o}"), 8), metadata)
    return to


def _make(target: Path, body: bytes, metadata: dict[str, str]) -> None:
    mode = int(metadata.get("mode", f"{stat.S_IFREG | FILE_MODE:o}"), 8)
    kind = stat.S_IFMT(mode)
    if kind == stat.S_IFLNK:
        os.symlink(body, os.fsencode(target))
    elif kind == stat.S_IFREG:
        target.write_bytes(body)
    else:
        assert body == b"", f"special file {target} has a body"
        os.mknod(target, mode, int(metadata.get("rdev", "0")))
    _dress(target, mode, metadata)


def _dress(target: Path, mode: int, metadata: dict[str, str]) -> None:
    if os.geteuid() == 0:
        os.chown(target, int(metadata.get("uid", "0")), int(metadata.get("gid", "0")), follow_symlinks=False)
    if not stat.S_ISLNK(mode):
        target.chmod(stat.S_IMODE(mode))
    seconds, _, fraction = metadata["mtime"].partition(".")
    mtime_ns = int(seconds) * 10**9 + int(fraction.ljust(9, "0")[:9])
    os.utime(target, ns=(mtime_ns, mtime_ns), follow_symlinks=False)

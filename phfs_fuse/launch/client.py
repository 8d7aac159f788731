"""The commands' side of the control socket: JSON lines, one request and its answers per connection. No state.

`{"op": ..., ...}` is answered by one object, or by `{"progress": {...}}` objects and then `{"done": {...}}`
or `{"error": "one line", "exit_code": n}`.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any, Final

from phfs_fuse.config import json_text
from phfs_fuse.errors import MountpointError, NotDrained, StoreRefused, startup_error
from phfs_fuse.host import registry
from phfs_fuse.host.mount_table import MountTable, locate
from phfs_fuse.host.registry import MountRecord

Answer = Mapping[str, Any]
STATUS_SECONDS: Final = 5.0
UPGRADE_SECONDS: Final = 90.0
ANSWER_BYTES_MAX: Final = 16 << 20


class _Ended(MountpointError):
    """The connection ended without an answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """`bytes_done` counts from the start of the request."""

    files_pending: int
    bytes_pending: int
    bytes_done: int


@dataclass(frozen=True, slots=True)
class Conflict:
    """What lost `path` (below the mount point) was kept as `kept_as`: below it too, or `outside`, or "": nothing."""

    record: MountRecord
    path: str
    kept_as: str
    outside: bool
    at: float  # seconds since the epoch

    @property
    def original(self) -> str:
        return os.path.join(self.record.mountpoint, self.path)

    @property
    def copy(self) -> str:
        return self.kept_as if self.outside else os.path.join(self.record.mountpoint, self.kept_as)


def mount_of(path: str, table: MountTable) -> tuple[MountRecord, str]:
    """The running mount that `path` lies in, and the path within it ("" for its root).

    Raises: MountpointError when it lies in none of ours.
    """
    place, entry = locate(path, table)
    if entry is None:
        raise MountpointError(f"{path}: is not in a phfs mount")
    if (record := registry.find(entry.mountpoint)) is None:
        raise MountpointError(f"{entry.mountpoint}: no phfs of this user serves this mount ({entry.kind})")
    return record, os.path.relpath(place, entry.mountpoint) if place != entry.mountpoint else ""


def status(record: MountRecord) -> Answer:
    """Raises: MountpointError when the mount does not answer within seconds."""
    try:
        return next(ask(record, {"op": "status"}, STATUS_SECONDS))
    except TimeoutError as exc:
        raise MountpointError(f"{record.mountpoint}: the mount does not answer") from exc


def sync(record: MountRecord, path: str | None, timeout: float | None, *, retry: bool = False) -> Iterator[Progress]:
    """Yield while uploads go on; ends when everything (or the file `path`) is in the store. `retry`: what the store
    has refused for good is tried again first.

    Raises: NotDrained after `timeout` seconds; StartupError as the mount reports it.
    """
    return _follow(record, {"op": "sync", "path": path, **({"retry": True} if retry else {})}, timeout)


def umount(record: MountRecord, timeout: float | None, *, lazy: bool) -> Iterator[Progress]:
    """As `sync` of everything, and then unmount; the mount stays when this is given up earlier."""
    return _follow(record, {"op": "umount", "lazy": lazy}, timeout)


def conflicts(record: MountRecord) -> list[Conflict]:
    """Those whose copy is still there, oldest first; the others are settled. Raises: MountpointError."""
    found = []
    for row in next(ask(record, {"op": "conflicts"}, STATUS_SECONDS))["conflicts"]:
        conflict = Conflict(record, row["path"], row["kept_as"], row["outside"], row["at"])
        if conflict.kept_as and not os.path.lexists(conflict.copy):
            settled(conflict)
        else:
            found.append(conflict)
    return found


def settled(conflict: Conflict) -> None:
    """Show it no more. Raises: MountpointError."""
    request = {"op": "settled", "path": conflict.path, "kept_as": conflict.kept_as}
    next(ask(conflict.record, request, STATUS_SECONDS))


def set_quota(record: MountRecord, path: str, size: int | None) -> None:
    """Let `path` below the mount point ("": all of it) hold `size` bytes, None: as many as there are, until the
    mount ends. Raises: MountpointError, StartupError."""
    next(ask(record, {"op": "quota", "path": path, "size": size}, STATUS_SECONDS))


def upgrade(record: MountRecord) -> tuple[str, str]:
    """Have a worker of what is installed now take over; returns the versions before and after, when it serves.

    Raises: StartupError, and the mount goes on as it was.
    """
    before = status(record)
    with suppress(_Ended, TimeoutError):
        for _ in ask(record, {"op": "upgrade"}, UPGRADE_SECONDS):
            pass
    deadline = time.monotonic() + UPGRADE_SECONDS
    while time.monotonic() < deadline:
        with suppress(MountpointError):
            if (now := status(record))["pid"] != before["pid"]:
                return before["version"], now["version"]
        time.sleep(0.1)
    raise MountpointError(
        f"{record.mountpoint}: no other worker has taken over in {UPGRADE_SECONDS:g} s; see its log"
    )


def _follow(record: MountRecord, request: Mapping[str, object], timeout: float | None) -> Iterator[Progress]:
    last = None
    try:
        for answer in ask(record, request, timeout):
            if "progress" in answer:
                last = Progress(**{name: int(answer["progress"].get(name, 0)) for name in Progress.__slots__})
                yield last
    except TimeoutError as exc:
        waiting = f"{last.files_pending} files, {last.bytes_pending} bytes" if last else "some files"
        raise NotDrained(f"{record.mountpoint}: {waiting} still wait for upload after {timeout:g} s") from exc


def ask(record: MountRecord, request: Mapping[str, object], timeout: float | None) -> Iterator[Answer]:
    """The answers to one request, `timeout` seconds for all of them.

    Raises: TimeoutError; MountpointError when nobody listens; StartupError that the mount answers with.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    with closing(_connect(record)) as channel:
        with suppress(ConnectionError):  # the process at the other end died: it does not answer either
            channel.sendall(json.dumps(request).encode() + b"\n")
        for line in _lines(channel, deadline):
            answer = json_text.parse(line)
            if "error" in answer and answer.get("refused"):
                raise StoreRefused(f"{record.mountpoint}: {answer['error']}", answer["refused"])
            if "error" in answer:
                raise startup_error(int(answer.get("exit_code", 1)), f"{record.mountpoint}: {answer['error']}")
            yield answer
            if "progress" not in answer:
                return
    raise _Ended(f"{record.mountpoint}: the mount ended before it had answered")


def _connect(record: MountRecord) -> socket.socket:
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    channel.settimeout(STATUS_SECONDS)
    try:
        channel.connect(record.control_socket)
    except OSError as exc:
        channel.close()
        why = "does not answer" if record.alive else f"is dead; phfs umount {record.mountpoint} removes it"
        raise MountpointError(f"{record.mountpoint}: the mount {why}") from exc
    return channel


def _lines(channel: socket.socket, deadline: float | None) -> Iterator[bytes]:
    buffer = b""
    while len(buffer) < ANSWER_BYTES_MAX:
        *lines, buffer = buffer.split(b"\n")
        yield from lines
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            raise TimeoutError
        channel.settimeout(left)
        try:
            received = channel.recv(65536)
        except ConnectionError:  # the process at the other end died
            return
        if not received:
            return
        buffer += received

"""The commands' side of the control socket: JSON lines, one request and its answers per connection. No state.

`{"op": ..., ...}` is answered by one object, or by `{"progress": {...}}` objects and then `{"done": {...}}`
or `{"error": "one line", "exit_code": n}`.
"""

from __future__ import annotations

import json
import os
import select
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Final

from phfs_fuse import registry
from phfs_fuse.errors import MountpointError, NotDrained, startup_error
from phfs_fuse.mountpoint import MountTable, locate
from phfs_fuse.registry import MountRecord

Answer = Mapping[str, Any]
STATUS_SECONDS: Final = 5.0
ANSWER_BYTES_MAX: Final = 16 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """`bytes_done` counts from the start of the request."""

    files_pending: int
    bytes_pending: int
    bytes_done: int


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


def sync(record: MountRecord, path: str | None, timeout: float | None) -> Iterator[Progress]:
    """Yield while uploads go on; ends when everything (or the file `path`) is in the store.

    Raises: NotDrained after `timeout` seconds; StartupError as the mount reports it.
    """
    return _follow(record, {"op": "sync", "path": path}, timeout)


def umount(record: MountRecord, timeout: float | None, *, lazy: bool) -> Iterator[Progress]:
    """As `sync` of everything, and then unmount; the mount stays when this is given up earlier."""
    return _follow(record, {"op": "umount", "lazy": lazy}, timeout)


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
        channel.sendall(json.dumps(request).encode() + b"\n")
        for line in _lines(channel, deadline):
            answer = json.loads(line)
            if "error" in answer:
                raise startup_error(int(answer.get("exit_code", 1)), f"{record.mountpoint}: {answer['error']}")
            yield answer
            if "progress" not in answer:
                return
    raise MountpointError(f"{record.mountpoint}: the mount ended before it had answered")


def wait_for_end(pid: int, timeout: float | None) -> bool:
    """Whether the process ended in time."""
    try:
        watch = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([watch], [], [], timeout)[0])
    finally:
        os.close(watch)


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
        if not (received := channel.recv(65536)):
            return
        buffer += received

"""The unix socket beside the mount: JSON lines, one request a line, each with one last answer.

    {"op": "ping"}                      {"done": {}}
    {"op": "status"}                    the status itself
    {"op": "sync", "path": "a/b"}       {"progress": {...}} five times a second, then {"done": {...}}
                                        with "retry": true what the store has refused is tried again first
    {"op": "umount", "lazy": false}     the same; uploads everything first
    {"op": "conflicts"}                 {"conflicts": [{"path": ..., "kept_as": ..., "outside": ..., "at": ...}, ...]}
    {"op": "settled", "path": ..., "kept_as": ...}      {"done": {}}; the conflict is not shown any more
    {"op": "limits", "cache_bytes": 1073741824, "dirty_bytes": 1073741824}      {"done": {}}; either may be left out
    {"op": "quota", "path": "a/b", "size": n}       {"done": {}}; null takes the quota away, "" is the whole mount
    {"op": "upgrade"}                   the end of the connection: another worker takes over

What cannot be done is answered by {"error": "one line", "exit_code": n}; n is that of a command that ends so. A mount
that has ended with changes that the store had refused says so like that, with one line for each in "refused".
State: the socket file and its connections. Heard are the user of the mount and root. A request ends with its
connection: who asked for an unmount and goes away while uploads are waited for keeps the mount.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import socket
import struct
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Final, Protocol

import trio

from phfs_fuse.config import json_text, values
from phfs_fuse.errors import NotDrained, NotFound, PhfsError, StartupError, UsageError
from phfs_fuse.state.refusal import summary
from phfs_fuse.tasks import surviving, unforeseen

log = logging.getLogger(__name__)

LINE_BYTES_MAX: Final = 64 << 10
CONNECTIONS_MAX: Final = 32
LINE_SECONDS: Final = 30.0  # for a whole request to arrive, and for an answer to be taken
PROGRESS_SECONDS: Final = 0.2
LAST_WORD_SECONDS: Final = 1.0
_PEER: Final = struct.Struct("3i")  # struct ucred: pid, uid, gid. Source: unix(7)

Fields = Mapping[str, object]


class Controllable(Protocol):
    def status(self) -> Fields: ...

    def pending(self) -> Mapping[str, int]:
        """What is not in the store yet; of `bytes_done` only the growth counts."""

    def conflicts(self) -> Sequence[Fields]: ...

    def settled(self, path: str, kept_as: str) -> None: ...

    def limit(self, *, cache_bytes: int | None, dirty_bytes: int | None) -> None:
        """Keep to other limits from now on. Raises: ConfigError."""

    def set_quota(self, path: str, size: int | None) -> None:
        """Raises: LocalStateError, it holds but will not after a restart."""

    def refused(self) -> Sequence[str]:
        """One line for each change that the store has refused for good."""

    async def sync(self, path: str | None, *, retry: bool) -> None:
        """Return when `path` (None: everything) is in the store. `retry`: what was refused is tried again first.
        Raises: PhfsError."""


class Ending(Protocol):
    async def shutdown(self, *, lazy: bool) -> None:
        """Upload everything, unmount. Raises: StartupError, PhfsError."""

    async def upgrade(self) -> None:
        """Return when this process ends because another takes over. Raises: StartupError."""


class ControlServer:
    def __init__(self, path: Path, mount: Controllable, worker: Ending) -> None:
        self._path = path
        self._mount = mount
        self._worker = worker
        self._connections = 0

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Service: answer until cancelled. Replaces the socket of a dead worker; removes its own at the end."""
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(_listen(self._path)))
        try:
            task_status.started()
            await trio.serve_listeners(self._serve, [listener])
        finally:
            self._path.unlink(missing_ok=True)

    async def _serve(self, stream: trio.SocketStream) -> None:
        """One connection. Whatever it sends, and however it ends, nothing is raised."""
        self._connections += 1
        with surviving("control connection"):
            await self._heard(stream)

    async def _heard(self, stream: trio.SocketStream) -> None:
        try:
            if (refusal := self._refusal(stream)) is not None:
                await _send(stream, _error(refusal))
            else:
                await self._converse(stream)
        except (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
            log.debug("control connection lost")
        finally:
            self._connections -= 1
            with trio.move_on_after(LAST_WORD_SECONDS, shield=True):
                await stream.aclose()

    def _refusal(self, stream: trio.SocketStream) -> StartupError | None:
        raw = stream.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
        _pid, uid, _gid = _PEER.unpack(raw)
        if uid not in (0, os.geteuid()):
            return UsageError("only the user of the mount and root are heard here")
        if self._connections > CONNECTIONS_MAX:
            return StartupError(f"more than {CONNECTIONS_MAX} connections")
        return None

    async def _converse(self, stream: trio.SocketStream) -> None:
        lines = _Lines(stream)
        while True:
            try:
                with trio.fail_after(LINE_SECONDS):
                    line = await lines.read()
                if line is None:
                    return
                request = _parse(line)
            except UsageError as exc:
                await _send(stream, _error(exc))
                return  # where the next request starts is not known
            await self._answer(stream, request)

    async def _answer(self, stream: trio.SocketStream, request: Fields) -> None:
        try:
            match request.get("op"):
                case "ping":
                    await _send(stream, {"done": {}})
                case "status":
                    await _send(stream, self._mount.status())
                case "sync":
                    work = partial(self._mount.sync, _path(request), retry=_flag(request, "retry"))
                    await self._with_progress(stream, work)
                case "umount":
                    await self._umount(stream, lazy=_flag(request, "lazy"))
                case "conflicts":
                    await _send(stream, {"conflicts": self._mount.conflicts()})
                case "settled":
                    self._mount.settled(_text(request, "path"), _text(request, "kept_as"))
                    await _send(stream, {"done": {}})
                case "limits":
                    self._mount.limit(
                        cache_bytes=_count(request, "cache_bytes"), dirty_bytes=_count(request, "dirty_bytes")
                    )
                    await _send(stream, {"done": {}})
                case "quota":
                    self._mount.set_quota(*_quota(request))
                    await _send(stream, {"done": {}})
                case "upgrade":
                    await self._worker.upgrade()
                case other:
                    raise UsageError(f"no such op: {other!r}")
        except (PhfsError, StartupError) as exc:
            await _send(stream, _error(exc))
        except (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
            raise
        except Exception as exc:  # a bug must not end the mount
            unforeseen("control request", exc)
            await _send(stream, _error(StartupError(f"internal error: {type(exc).__name__}")))

    async def _umount(self, stream: trio.SocketStream, *, lazy: bool) -> None:
        try:
            await self._with_progress(stream, partial(self._worker.shutdown, lazy=lazy), self._mount.refused)
        except BaseException:  # trio.Cancelled, or a group of it
            if trio.current_effective_deadline() > -math.inf:
                raise
            # The worker ends because the mount has ended: it can know that before the keeper has said so.
            with trio.move_on_after(LAST_WORD_SECONDS, shield=True), contextlib.suppress(trio.BrokenResourceError):
                await _send(stream, _last_word(self._mount.pending(), self._mount.refused()))
            raise

    async def _with_progress(
        self,
        stream: trio.SocketStream,
        work: Callable[[], Awaitable[None]],
        refused: Callable[[], Sequence[str]] = tuple,
    ) -> None:
        """Send what is pending until `work` is done, then the last answer. Cancels it when nobody listens."""
        before = self._mount.pending().get("bytes_done", 0)
        failure: Exception | None = None

        def pending() -> Fields:
            now = self._mount.pending()
            return {**now, "bytes_done": now.get("bytes_done", 0) - before}

        async def report(cancel: Callable[[], None]) -> None:
            nonlocal failure
            try:
                while True:
                    await _send(stream, {"progress": pending()})
                    await trio.sleep(PROGRESS_SECONDS)
            except (trio.BrokenResourceError, trio.TooSlowError) as exc:
                failure = exc
                cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(report, nursery.cancel_scope.cancel)
            try:
                await work()
            except Exception as exc:
                failure = exc
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure
        await _send(stream, _last_word(pending(), refused()))


class _Lines:
    """The lines of a stream, without their ends."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._buffer = bytearray()

    async def read(self) -> bytes | None:
        """None: the stream ended. Raises: UsageError, the line is too long."""
        while (end := self._buffer.find(b"\n")) < 0:
            if len(self._buffer) > LINE_BYTES_MAX:
                raise UsageError(f"a request has at most {LINE_BYTES_MAX} bytes")
            if not (received := await self._stream.receive_some(LINE_BYTES_MAX)):
                return None
            self._buffer += received
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return line


def _parse(line: bytes) -> Fields:
    try:
        request = json_text.parse(line)
    except ValueError as exc:
        raise UsageError("the request is not JSON") from exc
    if not isinstance(request, dict):
        raise UsageError("the request is not a JSON object")
    return request


def _path(request: Fields) -> str | None:
    return None if request.get("path") is None else _text(request, "path")


def _quota(request: Fields) -> tuple[str, int | None]:
    size = request.get("size")
    try:
        if size is not None and not (isinstance(size, int) and not isinstance(size, bool)):
            raise ValueError("size as a number or null")
        return values.folder(_text(request, "path")), None if size is None else values.quota_size(size)
    except ValueError as exc:
        raise UsageError(f"expected {exc}") from exc


def _text(request: Fields, name: str) -> str:
    text = request.get(name)
    if isinstance(text, str):
        return text
    raise UsageError(f"{name}: not a string")


def _count(request: Fields, name: str) -> int | None:
    count = request.get(name)
    if count is None or (isinstance(count, int) and not isinstance(count, bool)):
        return count
    raise UsageError(f"{name}: not a whole number")


def _flag(request: Fields, name: str) -> bool:
    value = request.get(name, False)
    if isinstance(value, bool):
        return value
    raise UsageError(f"{name}: not true or false")


def _error(exc: PhfsError | StartupError) -> Fields:
    match exc:
        case StartupError():
            code = exc.exit_code
        case NotFound():
            code = 1
        case _:  # the store said no, or nothing: the bytes still wait
            code = NotDrained.exit_code
    return {"error": " ".join(str(exc).split()), "exit_code": code}


def _last_word(pending: Fields, refused: Sequence[str]) -> Fields:
    """The answer to what has been done, with one line for each change that the store had refused."""
    if not refused:
        return {"done": pending}
    return {**_error(NotDrained(summary(len(refused)))), "refused": list(refused)}


async def _send(stream: trio.SocketStream, answer: Fields) -> None:
    with trio.fail_after(LINE_SECONDS):
        await stream.send_all(json.dumps(answer).encode() + b"\n")


def _listen(path: Path) -> socket.socket:
    path.unlink(missing_ok=True)  # nobody serves it: the state directory is locked
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(str(path))
        path.chmod(0o600)  # nobody can connect before listen()
        listener.listen(CONNECTIONS_MAX)
    except BaseException:
        listener.close()
        raise
    return listener

"""The control socket over a mount that is none: what is answered, who is heard, what a bad client can do."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock as Clock

from phfs_fuse.errors import AccessDenied, ConfigError, LocalStateError, MountpointError, NotFound
from phfs_fuse.worker import control_socket
from phfs_fuse.worker.control_socket import ControlServer


class Mount:
    """Three files wait for upload; `sync` uploads one of them per 0.5 s, or raises `failure`."""

    def __init__(self) -> None:
        self.files = 3
        self.done = 1000
        self.asked: list[object] = []
        self.lines: list[str] = []
        self.failure: Exception | None = None
        self.cancelled = trio.Event()

    def status(self) -> Mapping[str, object]:
        if self.failure is not None:
            raise self.failure
        return {"mountpoint": "/mnt", "pending": {"files": self.files}}

    def pending(self) -> Mapping[str, int]:
        return {"files_pending": self.files, "bytes_pending": self.files * 10, "bytes_done": self.done}

    def limit(self, *, cache_bytes: int | None, dirty_bytes: int | None) -> None:
        if cache_bytes == 1:
            raise ConfigError("cache.size_max", cache_bytes, ">= 16M")
        self.asked.append((cache_bytes, dirty_bytes))

    def set_quota(self, path: str, size: int | None) -> None:
        self.asked.append((path, size))
        if self.failure is not None:
            raise self.failure

    def refused(self) -> Sequence[str]:
        return self.lines

    async def sync(self, path: str | None, *, retry: bool) -> None:
        self.asked += ["retry"] * retry
        self.asked.append(path)
        if self.failure is not None:
            raise self.failure
        try:
            while self.files:
                await trio.sleep(0.5)
                self.files, self.done = self.files - 1, self.done + 10
        except trio.Cancelled:
            self.cancelled.set()
            raise

    async def shutdown(self, *, lazy: bool) -> None:
        await self.sync(f"lazy={lazy}", retry=False)

    async def upgrade(self) -> None:
        self.asked.append("upgrade")
        if self.failure is not None:
            raise self.failure


class Client:
    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self._buffer = b""

    async def send(self, line: bytes) -> None:
        await self.stream.send_all(line + b"\n")

    async def receive(self) -> Any:
        """The next answer; None at the end of the conversation."""
        while b"\n" not in self._buffer:
            if not (received := await self.stream.receive_some()):
                return None
            self._buffer += received
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)

    async def ask(self, **request: object) -> Any:
        await self.send(json.dumps(request).encode())
        return await self.receive()


@pytest.fixture
def mount() -> Mount:
    return Mount()


@asynccontextmanager
async def served(path: Path, mount: Mount) -> AsyncIterator[trio.CancelScope]:
    with trio.fail_after(100):
        async with trio.open_nursery() as nursery:
            await nursery.start(ControlServer(path, mount, mount).run)
            yield nursery.cancel_scope
            nursery.cancel_scope.cancel()


async def connect(path: Path) -> Client:
    stream = await trio.open_unix_socket(path)
    assert isinstance(stream, trio.SocketStream)
    return Client(stream)


@pytest.fixture
async def client(tmp_path: Path, mount: Mount) -> AsyncIterator[Client]:
    async with served(tmp_path / "control.sock", mount):
        client = await connect(tmp_path / "control.sock")
        async with client.stream:
            yield client


async def test_requests_of_one_connection_are_answered_in_turn(client: Client) -> None:
    assert await client.ask(op="ping") == {"done": {}}
    assert await client.ask(op="status") == {"mountpoint": "/mnt", "pending": {"files": 3}}


async def test_sync_reports_progress_from_the_start_of_the_request(
    client: Client, mount: Mount, autojump_clock: Clock
) -> None:
    answers = [await client.ask(op="sync", path="a/b")]
    while "progress" in answers[-1]:
        answers.append(await client.receive())
    assert mount.asked == ["a/b"]
    assert answers[0] == {"progress": {"files_pending": 3, "bytes_pending": 30, "bytes_done": 0}}
    assert answers[-1] == {"done": {"files_pending": 0, "bytes_pending": 0, "bytes_done": 30}}
    assert 7 <= len(answers) <= 10  # 1.5 s, five times a second


async def test_sync_without_a_path_means_everything(client: Client, mount: Mount) -> None:
    mount.files = 0
    answer = await client.ask(op="sync")
    while "progress" in answer:
        answer = await client.receive()
    assert "done" in answer
    assert mount.asked == [None]


@pytest.mark.parametrize(
    ("failure", "exit_code"),
    [
        (AccessDenied("put", "a", "no\nright"), 6),
        (NotFound("sync", "a"), 1),
        (MountpointError("files are in use"), 4),
    ],
)
async def test_a_failure_is_one_line_with_an_exit_code(
    client: Client, mount: Mount, failure: Exception, exit_code: int
) -> None:
    mount.failure = failure
    answer = await client.ask(op="umount")
    while "progress" in answer:
        answer = await client.receive()
    assert answer == {"error": " ".join(str(failure).split()), "exit_code": exit_code}


async def test_umount_passes_lazy_on(client: Client, mount: Mount) -> None:
    mount.files = 0
    answer = await client.ask(op="umount", lazy=True)
    while "progress" in answer:
        answer = await client.receive()
    assert mount.asked == ["lazy=True"]


async def test_umount_names_what_the_store_had_refused(client: Client, mount: Mount) -> None:
    mount.files, mount.lines = 0, ["a: delete refused: AccessDenied; it is there again"]
    answer = await client.ask(op="umount")
    while "progress" in answer:
        answer = await client.receive()
    assert answer == {"error": "the store refused 1 change for good", "exit_code": 6, "refused": mount.lines}


async def test_sync_can_ask_for_another_try(client: Client, mount: Mount) -> None:
    mount.files = 0
    answer = await client.ask(op="sync", retry=True)
    while "progress" in answer:
        answer = await client.receive()
    assert mount.asked == ["retry", None]


async def test_a_refused_upgrade_is_one_line(client: Client, mount: Mount) -> None:
    mount.failure = LocalStateError("not upgraded: the state is of a newer format")
    assert await client.ask(op="upgrade") == {"error": str(mount.failure), "exit_code": 5}
    assert mount.asked == ["upgrade"]


async def test_a_bug_is_an_answer_and_the_server_lives(client: Client, mount: Mount) -> None:
    mount.failure = KeyError("secret")
    assert await client.ask(op="status") == {"error": "internal error: KeyError", "exit_code": 1}
    assert await client.ask(op="ping") == {"done": {}}


@pytest.mark.parametrize(
    ("path", "size", "told"), [("", 5, ("", 5)), ("/a//b/", 1 << 40, ("a/b", 1 << 40)), ("a", None, ("a", None))]
)
async def test_a_quota_is_set(client: Client, mount: Mount, path: str, size: int | None, told: object) -> None:
    assert await client.ask(op="quota", path=path, size=size) == {"done": {}}
    assert mount.asked == [told]


async def test_limits_change(client: Client, mount: Mount) -> None:
    assert await client.ask(op="limits", cache_bytes=1 << 30, dirty_bytes=1 << 20) == {"done": {}}
    assert await client.ask(op="limits", dirty_bytes=1 << 21) == {"done": {}}
    assert mount.asked == [(1 << 30, 1 << 20), (None, 1 << 21)]
    assert (await client.ask(op="limits", cache_bytes=1))["exit_code"] == 2
    for wrong in ("1G", 1.5, True, []):
        assert (await client.ask(op="limits", cache_bytes=wrong))["exit_code"] == 2


@pytest.mark.parametrize(
    "request_",
    [
        {"op": "explode"},
        {},
        {"op": "sync", "path": 3},
        {"op": "umount", "lazy": 1},
        {"op": "quota", "size": 5},
        {"op": "quota", "path": "../a", "size": 5},
        {"op": "quota", "path": "a" * 256, "size": 5},
        {"op": "quota", "path": "a\0", "size": 5},
        *({"op": "quota", "path": "a", "size": size} for size in (0, -1, 1.5, "5G", True, 1 << 61, [])),
    ],
)
async def test_a_wrong_request_gets_an_answer_and_the_next_is_heard(
    client: Client, mount: Mount, request_: Mapping[str, object]
) -> None:
    assert (await client.ask(**request_))["exit_code"] == 2
    assert mount.asked == []
    assert await client.ask(op="ping") == {"done": {}}


@pytest.mark.parametrize(
    "line",
    [b"status", b"[1]", b"\xff\xfe", b"[" * 60_000, b"x" * (control_socket.LINE_BYTES_MAX + 2)],
    ids=["word", "list", "binary", "deep", "long"],
)
async def test_what_is_no_request_ends_the_conversation_with_an_answer(
    client: Client, tmp_path: Path, line: bytes
) -> None:
    await client.send(line)
    assert (await client.receive())["exit_code"] == 2
    assert await client.receive() is None
    other = await connect(tmp_path / "control.sock")
    async with other.stream:
        assert await other.ask(op="ping") == {"done": {}}


async def test_a_request_that_never_ends_is_given_up(client: Client, autojump_clock: Clock) -> None:
    await client.stream.send_all(b'{"op": ')
    start = trio.current_time()
    assert await client.receive() is None
    assert trio.current_time() - start == pytest.approx(control_socket.LINE_SECONDS, abs=1)


async def test_work_for_a_client_that_left_is_cancelled(client: Client, mount: Mount) -> None:
    mount.files = 1000
    assert "progress" in await client.ask(op="umount")
    await client.stream.aclose()
    await mount.cancelled.wait()


async def test_connections_are_limited(client: Client, tmp_path: Path) -> None:
    others = [await connect(tmp_path / "control.sock") for _ in range(control_socket.CONNECTIONS_MAX)]
    for other in others[:-1]:
        assert await other.ask(op="ping") == {"done": {}}
    assert "connections" in (await others[-1].receive())["error"]
    for other in others:
        await other.stream.aclose()
    assert await client.ask(op="ping") == {"done": {}}


async def test_strangers_are_refused(client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stranger = control_socket._PEER.pack(1, os.geteuid() + 1, 0)
    monkeypatch.setattr(trio.SocketStream, "getsockopt", lambda *_arguments: stranger)
    other = await connect(tmp_path / "control.sock")
    async with other.stream:
        assert (await other.receive())["exit_code"] == 2


async def test_the_end_of_the_worker_is_the_answer_to_umount(tmp_path: Path, mount: Mount) -> None:
    async with served(tmp_path / "control.sock", mount) as scope:
        client = await connect(tmp_path / "control.sock")
        assert "progress" in await client.ask(op="umount")
        scope.cancel()
        with trio.CancelScope(shield=True):
            async with client.stream:
                answer = await client.receive()
                while "progress" in answer:
                    answer = await client.receive()
        assert "done" in answer


async def test_socket_is_private_replaces_a_stale_one_and_goes(tmp_path: Path, mount: Mount) -> None:
    path = tmp_path / "control.sock"
    path.write_bytes(b"left by a worker that was killed")
    async with served(path, mount):
        mode = path.stat().st_mode
        assert stat.S_ISSOCK(mode)
        assert stat.S_IMODE(mode) == 0o600
    assert not path.exists()

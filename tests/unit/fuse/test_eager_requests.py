"""Requests that wait already are taken at once, and everybody else has a turn in time."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pyfuse3
import pytest

from phfs_fuse.fuse import eager_requests as eager
from phfs_fuse.fuse.eager_requests import SPIN_SECONDS, eager_requests


class Connection:
    """What the kernel would send, and how often the loop waited for it."""

    def __init__(self) -> None:
        self.ours, self.kernel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.waits = 0
        self.ended = False

    async def wait(self) -> bool:
        """In place of pyfuse3's. Somebody else takes what is there the first time."""
        self.waits += 1
        if self.waits == 1:
            self.kernel.send(b"request")
        return not self.ended

    async def next(self) -> bool:
        return await pyfuse3._wait_fuse_readable()  # type: ignore[attr-defined,no-any-return]


@pytest.fixture
def connection(monkeypatch: pytest.MonkeyPatch) -> Iterator[Connection]:
    found = Connection()
    monkeypatch.setattr(pyfuse3, "_wait_fuse_readable", found.wait)
    with found.ours, found.kernel:
        yield found


async def test_what_waits_already_is_taken_at_once(connection: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager, "TURN_SECONDS", 60.0)
    with eager_requests(connection.ours.fileno()):
        assert await connection.next()
        assert await connection.next()
        assert connection.waits == 1


async def test_what_comes_a_moment_later_needs_no_turn(
    connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eager, "TURN_SECONDS", 60.0)
    monkeypatch.setattr(eager, "SPIN_SECONDS", 60.0)
    with eager_requests(connection.ours.fileno()):
        assert await connection.next()
        connection.ours.recv(100)
        program = threading.Thread(target=connection.kernel.send, args=(b"request",))
        program.start()
        assert await connection.next()
        program.join()
        assert connection.waits == 1


async def test_who_asks_late_is_not_waited_for_busily(
    connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was spent in vain comes back a little with each turn."""
    looks = 0

    def clock() -> float:
        nonlocal looks
        looks += 1
        return looks * 1e-6

    async def late() -> bool:
        connection.kernel.send(b"request")
        return True

    monkeypatch.setattr(eager, "time", SimpleNamespace(perf_counter=clock))
    monkeypatch.setattr(pyfuse3, "_wait_fuse_readable", late)
    with eager_requests(connection.ours.fileno()):
        looked = []
        for _ in range(300):
            before = looks
            assert await connection.next()
            looked.append(looks - before)
            connection.ours.recv(100)
    often = SPIN_SECONDS / 1e-6
    assert looked[1] >= often
    spins = sum(count >= often for count in looked)
    assert 1 < spins < 300 / 5


async def test_after_a_while_the_loop_has_its_turn(connection: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager, "TURN_SECONDS", 0.0)
    with eager_requests(connection.ours.fileno()):
        assert await connection.next()
        assert await connection.next()
        assert connection.waits == 2


async def test_it_waits_on_where_somebody_was_quicker(connection: Connection) -> None:
    async def quicker() -> bool:
        connection.waits += 1
        if connection.waits == 3:
            connection.kernel.send(b"request")
        return True

    pyfuse3._wait_fuse_readable = quicker  # type: ignore[attr-defined]
    with eager_requests(connection.ours.fileno()):
        assert await connection.next()
    assert connection.waits == 3


async def test_the_end_of_the_mount_is_an_end(connection: Connection) -> None:
    connection.ended = True
    with eager_requests(connection.ours.fileno()):
        assert not await connection.next()


async def test_another_pyfuse3_serves_as_it_does(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delattr(pyfuse3, "_wait_fuse_readable")
    with eager_requests(0):
        assert not hasattr(pyfuse3, "_wait_fuse_readable")
    assert "one a turn" in caplog.text

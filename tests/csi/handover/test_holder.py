"""The holder alone, with a descriptor that needs no mount: whoever asks, and whatever dies, it is not lost."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from phfs_csi.handover.succession import Marks
from phfs_fuse.errors import LocalStateError
from phfs_fuse.host.holder_link import HolderLink
from tests.csi.node.test_mounts import eventually

SECONDS = 30.0
HOLD = """
import logging, sys
from pathlib import Path
from phfs_csi.handover import holder
logging.basicConfig(level=logging.INFO)
holder.hold(Path(sys.argv[1]), sys.argv[2])
"""


class Place:
    def __init__(self, root: Path) -> None:
        self.path, self.log = root / "h.sock", root / "log"
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, pod_uid: str = "") -> subprocess.Popen[bytes]:
        """A holder, once it listens."""
        before = self._inode()
        with self.log.open("ab") as output:
            process = subprocess.Popen([sys.executable, "-c", HOLD, self.path, pod_uid], stderr=output)
        self.processes.append(process)
        eventually(lambda: self._inode() not in (None, before) or "idle" in self.log.read_text())
        return process

    def _inode(self) -> int | None:
        return os.stat(self.path).st_ino if self.path.exists() else None


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    found = Place(tmp_path)
    yield found
    for process in found.processes:
        process.kill()
        process.wait(SECONDS)


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """What is given to the holder is the end that is read: it is open as long as a write works."""
    ends = os.pipe()
    yield ends
    for fd in ends:
        os.close(fd)


def names(path: Path) -> list[str]:
    link, found = HolderLink(path), [""]
    while (held := link.after(found[-1])) is not None:
        os.close(held.fd)
        found.append(held.name)
    link.close()
    return found[1:]


def test_keep_take_drop(place: Place, pipe: tuple[int, int]) -> None:
    place.start()
    link = HolderLink(place.path)
    assert link.take("a") is None
    link.keep("a", "0:1", pipe[0])
    link.keep("a", "0:2", pipe[0])
    link.keep("b", "0:3", pipe[0])
    held = link.take("a")
    assert held is not None
    assert (held.name, held.device) == ("a", "0:2")
    os.write(pipe[1], b"x")
    assert os.read(held.fd, 1) == b"x"
    os.close(held.fd)
    assert names(place.path) == ["a", "b"]
    link.drop("a")
    link.drop("never there")
    assert names(place.path) == ["b"]
    link.close()


def test_it_holds_what_its_giver_had(place: Place) -> None:
    place.start()
    reading, writing = os.pipe()
    link = HolderLink(place.path)
    link.keep("a", "0:1", reading)
    os.close(reading)
    link.close()
    os.write(writing, b"still there")
    link = HolderLink(place.path)
    held = link.take("a")
    link.close()
    assert held is not None
    assert os.read(held.fd, 20) == b"still there"
    os.close(held.fd)
    os.close(writing)


def test_what_has_ended_is_let_go(place: Place) -> None:
    """A pipe whose reader is gone tells an error, as a connection does whose mount has ended."""
    place.start()
    reading, writing = os.pipe()
    link = HolderLink(place.path)
    link.keep("a", "0:1", writing)
    assert names(place.path) == ["a"]
    os.close(reading)
    eventually(lambda: names(place.path) == [])
    with pytest.raises(LocalStateError, match="living mount"):
        link.keep("a", "0:1", writing)
    os.close(writing)
    link.close()


def test_a_successor_takes_all(place: Place, pipe: tuple[int, int]) -> None:
    first = place.start("pod-1")
    link = HolderLink(place.path)
    for number in range(30):
        link.keep(f"{number:02}", "0:1", pipe[0])
    place.start("pod-2")
    assert names(place.path) == [f"{number:02}" for number in range(30)]
    with pytest.raises(LocalStateError):  # its keepers come to the new one
        link.take("00")
    link.close()
    assert Marks(place.path, "holder").is_set("pod-1")
    assert first.poll() is None  # idle: what ends in a pod is started again
    place.start("pod-1")
    assert names(place.path) == [f"{number:02}" for number in range(30)]
    first.send_signal(signal.SIGTERM)
    assert first.wait(SECONDS) == 0


def test_it_does_not_end_with_what_only_it_holds(place: Place, pipe: tuple[int, int]) -> None:
    process = place.start()
    link = HolderLink(place.path)
    link.keep("a", "0:1", pipe[0])
    process.send_signal(signal.SIGTERM)
    eventually(lambda: "waiting for another holder" in place.log.read_text())
    assert names(place.path) == ["a"]
    link.drop("a")
    assert process.wait(SECONDS) == 0
    link.close()


@pytest.mark.parametrize(
    "packet",
    [
        b"{",
        b"[]",
        b'{"op": "keep", "name": "a", "device": "0:1"}',
        b'{"op": "keep", "name": 7, "device": "0:1"}',
        b'{"op": "take"}',
        b'{"op": "take", "name": "' + b"x" * 5000 + b'"}',
        b'{"op": "what"}',
        b'{"op": []}',
        b'{"op": "take", "name": {}}',
        b"[" * 16_000,
        b"9" * 5000,
        b"7",
        b"\xff",
    ],
)
def test_nonsense_is_answered(place: Place, packet: bytes) -> None:
    """And does not end the holder, which is all that its mounts have."""
    process = place.start()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as channel:
        channel.settimeout(SECONDS)
        channel.connect(str(place.path))
        channel.send(packet)
        assert "error" in json.loads(channel.recv(1 << 16))
    assert names(place.path) == []
    assert process.poll() is None


def test_descriptors_nobody_asked_for_are_closed(place: Place, pipe: tuple[int, int]) -> None:
    process = place.start()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as channel:
        channel.settimeout(SECONDS)
        channel.connect(str(place.path))
        for _ in range(50):
            socket.send_fds(channel, [b'{"op": "take", "name": "a"}'], [pipe[0]])
            channel.recv(4096)
        assert len(os.listdir(f"/proc/{process.pid}/fd")) < 20


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(LocalStateError, match="no holder answers"):
        HolderLink(tmp_path / "nobody.sock")

"""The commands' side of the control socket, against a socket that says what a test tells it to."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from phfs_fuse.errors import MountpointError, NotDrained, StoreStartupError
from phfs_fuse.host import registry
from phfs_fuse.host.mount_table import mount_table
from phfs_fuse.host.registry import MountRecord
from phfs_fuse.launch import client
from phfs_fuse.launch.client import Progress


class Mount:
    """Takes one connection, notes the request, sends `answer`; with `silent` it then stays open."""

    def __init__(self, path: Path) -> None:
        self.requests: list[object] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._threads: list[threading.Thread] = []
        self._end = threading.Event()
        self.record = MountRecord(mountpoint="/mnt", control_socket=str(path), keeper_pid=os.getpid(), url="s3://b/")

    def answers(self, *chunks: bytes, silent: bool = False) -> MountRecord:
        thread = threading.Thread(target=self._serve, args=(chunks, silent))
        thread.start()
        self._threads.append(thread)
        return self.record

    def _serve(self, chunks: tuple[bytes, ...], silent: bool) -> None:
        channel, _ = self._listener.accept()
        with channel, channel.makefile("rb") as lines:
            self.requests.append(json.loads(lines.readline()))
            for chunk in chunks:
                channel.sendall(chunk)
            if silent:
                self._end.wait(10)

    def close(self) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join(10)
        self._listener.close()


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    found = Mount(tmp_path / "s")
    yield found
    found.close()


def test_status(mount: Mount) -> None:
    assert client.status(mount.answers(b'{"conflicts"', b": 3}\n")) == {"conflicts": 3}
    assert mount.requests == [{"op": "status"}]


def test_sync_follows_the_progress_to_its_end(mount: Mount) -> None:
    record = mount.answers(
        b'{"progress": {"files_pending": 2, "bytes_pending": 10, "bytes_done": 0}}\n'
        b'{"progress": {"files_pending": 1, "bytes_pending": 4, "bytes_done": 6}}\n{"do',
        b'ne": {}}\n',
    )
    assert list(client.sync(record, "a/b", None)) == [
        Progress(files_pending=2, bytes_pending=10, bytes_done=0),
        Progress(files_pending=1, bytes_pending=4, bytes_done=6),
    ]
    assert mount.requests == [{"op": "sync", "path": "a/b"}]


def test_umount_is_one_request(mount: Mount) -> None:
    assert list(client.umount(mount.answers(b'{"done": {}}\n'), None, lazy=True)) == []
    assert mount.requests == [{"op": "umount", "lazy": True}]


def test_an_error_of_the_mount_keeps_its_code(mount: Mount) -> None:
    record = mount.answers(b'{"error": "access denied", "exit_code": 3}\n')
    with pytest.raises(StoreStartupError, match="/mnt: access denied"):
        list(client.sync(record, None, None))


def test_sync_gives_up_in_time_and_says_what_waits(mount: Mount) -> None:
    record = mount.answers(b'{"progress": {"files_pending": 2, "bytes_pending": 10}}\n', silent=True)
    with pytest.raises(NotDrained, match=r"/mnt: 2 files, 10 bytes still wait for upload after 0\.2 s"):
        list(client.sync(record, None, 0.2))


def test_a_mount_that_ends_in_the_middle(mount: Mount) -> None:
    record = mount.answers(b'{"progress": {"files_pending": 2, "bytes_pending": 10}}\n{"do')
    with pytest.raises(MountpointError, match="the mount ended before it had answered"):
        list(client.sync(record, None, None))


def test_a_mount_that_ends_before_it_is_asked(mount: Mount, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair()
    theirs.close()
    monkeypatch.setattr(client, "_connect", lambda _record: ours)
    with pytest.raises(MountpointError, match="the mount ended before it had answered"):
        client.status(mount.record)


def test_a_mount_that_says_nothing(mount: Mount, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "STATUS_SECONDS", 0.1)
    with pytest.raises(MountpointError, match="/mnt: the mount does not answer"):
        client.status(mount.answers(silent=True))


def test_nobody_listens() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    gone = MountRecord(mountpoint="/mnt", control_socket="/no/socket", keeper_pid=child.pid, url="s3://b/")
    with pytest.raises(MountpointError, match="/mnt: the mount is dead; phfs umount /mnt removes it"):
        client.status(gone)


def test_the_mount_of_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHFS_RUNTIME_DIR", str(tmp_path))
    table = mount_table("1 0 0:1 / /mnt/a rw - fuse.phfs s rw\n2 0 0:2 / /mnt/b rw - fuse.sshfs s rw")
    record = MountRecord(mountpoint="/mnt/a", control_socket="/s", keeper_pid=1, url="s3://b/")
    registry.write(record)
    assert client.mount_of("/mnt/a", table) == (record, "")
    assert client.mount_of("/mnt/a/x/y", table) == (record, "x/y")
    with pytest.raises(MountpointError, match=r"no phfs of this user serves this mount \(fuse\.sshfs\)"):
        client.mount_of("/mnt/b/x", table)
    with pytest.raises(MountpointError, match="is not in a phfs mount"):
        client.mount_of("/mnt/c", table)

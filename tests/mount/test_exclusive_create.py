"""Lock files between two mounts of one prefix: --exclusive-create store."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.place import script, together
from tests.support.mounts import TestMount, mounted

pytestmark = [pytest.mark.fuse, pytest.mark.minio]
ROUNDS = 25
RACE = """
import ctypes, errno, os, sys, time
kind, folder, other, rounds, me = *sys.argv[1:4], int(sys.argv[4]), sys.argv[5]
libc = ctypes.CDLL(None, use_errno=True)

def rename_noreplace(source, target):
    if libc.renameat2(-100, os.fsencode(source), -100, os.fsencode(target), 1):
        raise OSError(ctypes.get_errno(), "renameat2")

def make(path):
    if kind == "create":
        fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        os.write(fd, me.encode())
        os.close(fd)
    elif kind == "mkdir":
        os.mkdir(path)
    elif kind == "symlink":
        os.symlink(me, path)
    else:
        with open(path + "." + me, "w") as file:
            file.write(me)
        rename_noreplace(path + "." + me, path)

for number in range(rounds):
    open(os.path.join(sys.argv[6], f"{me}{number}"), "w").close()
    while not os.path.exists(os.path.join(sys.argv[6], f"{other}{number}")):
        pass
    try:
        make(os.path.join(folder, f"{kind}{number}"))
        print("won")
    except FileExistsError:
        print("lost")
"""


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[TestMount, TestMount]]:
    flags = ("--exclusive-create", "store")
    with mounted(*flags) as one, mounted(*flags, bucket=one.bucket, server=one.server) as two:
        yield one, two


@pytest.mark.parametrize("kind", ["create", "mkdir", "symlink", "rename"])
def test_exactly_one_of_two_mounts_wins(pair: tuple[TestMount, TestMount], kind: str, tmp_path: Path) -> None:
    one, two = pair
    first, second = together(
        RACE,
        (kind, one.path, "b", ROUNDS, "a", tmp_path),
        (kind, two.path, "a", ROUNDS, "b", tmp_path),
    )
    outcomes = list(zip(first.split(), second.split(), strict=True))
    assert len(outcomes) == ROUNDS
    assert [sorted(pair) for pair in outcomes] == [["lost", "won"]] * ROUNDS
    for mount in pair:
        mount.sync()
        assert mount.status()["conflicts"] == 0


def test_a_lock_that_was_given_back_can_be_taken(pair: tuple[TestMount, TestMount]) -> None:
    code = """
import os, sys, time
for path in sys.argv[1:] * 3:
    deadline = time.monotonic() + 60
    while True:
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            break
        except FileExistsError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    os.unlink(path)
"""
    script(code, *(mount.path / "given" for mount in pair))


def test_a_worker_that_is_killed_does_not_lose_a_lock(pair: tuple[TestMount, TestMount]) -> None:
    """The call that it had not answered is asked again, and finds what it has made itself."""
    one, _ = pair
    one.expected.append("the worker ended with SIGKILL")
    code = """
import os, sys
for number in range(400):
    os.close(os.open(f"{sys.argv[1]}/killed{number}", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
"""
    pid = one.worker_pid
    assert pid is not None
    killer = threading.Timer(0.4, os.kill, (pid, signal.SIGKILL))  # while the program is at work
    killer.start()
    script(code, one.path)
    killer.join()
    assert one.worker_pid != pid


@pytest.mark.parametrize("exclusive", ["local", "store"])
def test_a_name_that_others_have_is_refused(exclusive: str) -> None:
    with mounted("--exclusive-create", exclusive, "--attr-ttl", "0") as mount:
        mount.s3.put_object(Bucket=mount.bucket, Key=mount.prefix + "f", Body=b"theirs")
        code = "import os, sys; os.open(sys.argv[1], os.O_CREAT | os.O_EXCL)"
        with pytest.raises(AssertionError, match=os.strerror(errno.EEXIST)):
            script(code, mount.path / "f")
        assert mount.s3.get_object(Bucket=mount.bucket, Key=mount.prefix + "f")["Body"].read() == b"theirs"

"""Several processes on the same files of one mount."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mount.place import SECONDS, Place, run, saved, script, together

pytestmark = pytest.mark.fuse


def test_log_is_followed(place: Place, mnt: Path, tmp_path: Path) -> None:
    lines = 300
    writer = f"""if True:
        import sys, time
        with open(sys.argv[1], "a", buffering=1) as log:
            for number in range({lines}):
                log.write(f"line {{number}} " + "x" * (number % 90) + "\\n")
                if number % 20 == 0:
                    time.sleep(0.02)  # so that the follower meets the end of the file
    """
    follower = f"""if True:
        import sys, time
        seen, rest, deadline = [], b"", time.monotonic() + 60
        with open(sys.argv[1], "rb", buffering=0) as log:
            while len(seen) < {lines}:
                assert time.monotonic() < deadline, f"only {{len(seen)}} lines"
                rest += log.read(1000) or time.sleep(0.005) or b""
                *whole, rest = rest.split(b"\\n")
                seen += whole
        assert rest == b"" and seen == [b"line %d " % n + b"x" * (n % 90) for n in range({lines})]
    """
    path = mnt / "app.log"
    path.touch()
    following = subprocess.Popen([sys.executable, "-c", follower, str(path)], stderr=subprocess.PIPE, text=True)
    try:
        script(writer, path)
        _, errors = following.communicate(timeout=SECONDS)
    finally:
        following.kill()
        following.wait()
    assert following.returncode == 0, errors
    assert (saved(place, mnt, tmp_path / "stored") / "app.log").read_bytes().count(b"\n") == lines


def test_appends_by_four_processes(place: Place, mnt: Path, tmp_path: Path) -> None:
    code = """if True:
        import os, sys
        fd = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        for number in range(250):
            line = f"{sys.argv[2]} {number} {'x' * (number % 200)}\\n".encode()
            assert os.write(fd, line) == len(line)
    """
    together(code, *([mnt / "log", f"p{process}"] for process in range(4)))
    wanted = {f"p{process} {number} {'x' * (number % 200)}" for process in range(4) for number in range(250)}
    for path in (mnt / "log", saved(place, mnt, tmp_path / "stored") / "log"):
        lines = path.read_text().splitlines()
        assert len(lines) == 1000
        assert set(lines) == wanted
        for process in range(4):
            own = [line.split()[1] for line in lines if line.startswith(f"p{process} ")]
            assert own == [str(number) for number in range(250)], "lines of one writer out of order"


def test_a_thousand_small_files_by_eight_processes(place: Place, mnt: Path, tmp_path: Path) -> None:
    code = """if True:
        import os, sys
        for number in range(125):
            with open(f"{sys.argv[1]}/{sys.argv[2]}-{number}", "xb") as file:
                file.write(f"{sys.argv[2]} {number}".encode() * 30)
    """
    together(code, *([mnt, f"p{process}"] for process in range(8)))
    stored = saved(place, mnt, tmp_path / "stored")
    assert len(os.listdir(mnt)) == len(os.listdir(stored)) == 1000
    assert (stored / "p7-124").read_bytes() == b"p7 124" * 30


@pytest.mark.parametrize("lock", ["fcntl.flock(fd, fcntl.LOCK_EX)", "fcntl.lockf(fd, fcntl.LOCK_EX)"])
def test_locks_keep_four_processes_apart(place: Place, mnt: Path, tmp_path: Path, lock: str) -> None:
    code = f"""if True:
        import fcntl, os, sys
        for _ in range(50):
            fd = os.open(sys.argv[1], os.O_RDWR)
            {lock}
            number = int(os.read(fd, 20))
            os.pwrite(fd, b"%d" % (number + 1), 0)
            os.close(fd)
    """
    (mnt / "counter").write_text("0")
    together(code, *([mnt / "counter"] for _ in range(4)))
    assert (mnt / "counter").read_text() == "200"
    assert (saved(place, mnt, tmp_path / "stored") / "counter").read_text() == "200"


@pytest.mark.parametrize("call", ["flock", "lockf"])
def test_a_held_lock_is_refused_to_others_and_freed_at_close(mnt: Path, call: str) -> None:
    code = f"""if True:
        import fcntl, subprocess, sys
        other = "import fcntl, sys; fcntl.{call}(open(sys.argv[1], 'r+'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
        def refused():
            done = subprocess.run([sys.executable, "-c", other, sys.argv[1]], capture_output=True, timeout=30)
            return b"BlockingIOError" in done.stderr
        held = open(sys.argv[1], "r+")
        fcntl.{call}(held, fcntl.LOCK_EX)
        assert refused()
        fcntl.{call}(held, fcntl.LOCK_UN)
        assert not refused()
        fcntl.{call}(held, fcntl.LOCK_EX)
        held.close()
        assert not refused()
    """
    (mnt / "f").write_text("x")
    script(code, mnt / "f")


def test_ranges_of_a_file_are_locked_apart(mnt: Path) -> None:
    code = """if True:
        import fcntl, os, sys
        file = open(sys.argv[1], "r+")
        fcntl.lockf(file, fcntl.LOCK_EX, 10, 0)
        if (child := os.fork()) == 0:
            mine = open(sys.argv[1], "r+")
            fcntl.lockf(mine, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, 10)
            try:
                fcntl.lockf(mine, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 9)
            except BlockingIOError:
                os._exit(0)
            os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
    """
    (mnt / "f").write_bytes(bytes(100))
    script(code, mnt / "f")


def test_flock_program(mnt: Path) -> None:
    """A lock is released when its holder is killed."""
    (mnt / "lock").touch()
    holder = subprocess.Popen(
        ["flock", "-F", str(mnt / "lock"), "sh", "-c", "echo held; exec sleep 60"], stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        busy = subprocess.run(["flock", "-n", str(mnt / "lock"), "true"], timeout=30, check=False)
        assert busy.returncode == 1
    finally:
        holder.kill()
        holder.communicate(timeout=30)
    run("flock", "-w", "20", mnt / "lock", "true")


def test_mapped_memory_is_shared_between_processes(place: Place, mnt: Path, tmp_path: Path) -> None:
    code = """if True:
        import mmap, os, sys
        file = open(sys.argv[1], "r+b")
        memory = mmap.mmap(file.fileno(), 0)
        ours, theirs = os.pipe(), os.pipe()
        if os.fork() == 0:
            again = open(sys.argv[1], "r+b")
            mine = mmap.mmap(again.fileno(), 0)
            os.read(ours[0], 1)
            assert mine[5000:5005] == b"hello", mine[5000:5005]
            mine[70000:70005] = b"world"
            os.write(theirs[1], b"x")
            os._exit(0)
        memory[5000:5005] = b"hello"
        os.write(ours[1], b"x")
        assert os.read(theirs[0], 1) == b"x"
        assert memory[70000:70005] == b"world"
        memory.flush()
        assert os.pread(file.fileno(), 5, 70000) == b"world"
        assert os.wait()[1] == 0
    """
    (mnt / "f").write_bytes(bytes(100_000))
    script(code, mnt / "f")
    wanted = bytearray(100_000)
    wanted[5000:5005], wanted[70000:70005] = b"hello", b"world"
    assert (saved(place, mnt, tmp_path / "stored") / "f").read_bytes() == wanted


def test_write_is_seen_through_a_mapping_and_the_other_way_round(mnt: Path) -> None:
    code = """if True:
        import mmap, os, sys
        fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
        os.ftruncate(fd, 10_000)
        memory = mmap.mmap(fd, 10_000)
        os.pwrite(fd, b"written", 4090)
        assert memory[4090:4097] == b"written"
        memory[8000:8006] = b"mapped"
        assert os.pread(fd, 6, 8000) == b"mapped"
    """
    script(code, mnt / "f")


def test_mapping_outlives_close_and_unlink(mnt: Path) -> None:
    code = """if True:
        import mmap, os, sys
        fd = os.open(sys.argv[1], os.O_RDWR)
        memory = mmap.mmap(fd, 0)
        os.close(fd)
        os.unlink(sys.argv[1])
        assert memory[:5] == b"abcde" and memory[-1:] == b"z"
        memory[:5] = b"12345"
        assert memory[:5] == b"12345"
    """
    (mnt / "f").write_bytes(b"abcde" + bytes(50_000) + b"z")
    script(code, mnt / "f")


def test_private_mapping_does_not_change_the_file(mnt: Path) -> None:
    code = """if True:
        import mmap, sys
        with open(sys.argv[1], "r+b") as file:
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            memory[:3] = b"xxx"
    """
    (mnt / "f").write_bytes(b"abcdef")
    script(code, mnt / "f")
    assert (mnt / "f").read_bytes() == b"abcdef"


def test_executables_run_from_the_mount(place: Place, mnt: Path) -> None:
    tool = mnt / "tool"
    tool.write_text("#!/bin/sh\necho args: $@\n")
    with pytest.raises(PermissionError):
        subprocess.run([tool], check=True, timeout=30)
    tool.chmod(0o755)
    assert run(tool, "a", "b") == "args: a b\n"
    run("cp", "/bin/echo", mnt / "echo")
    place.remount()
    assert run(tool, "c") == "args: c\n"
    assert run(mnt / "echo", "binary") == "binary\n"

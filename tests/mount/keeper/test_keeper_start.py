"""The keeper with a worker that needs no store: how a mount begins, of root and of an ordinary user."""

from __future__ import annotations

import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from phfs_fuse.host.processes import ended
from tests.mount.keeper.place import NOBODY, SECONDS, Place, finish, until

pytestmark = pytest.mark.fuse


# --- the beginning


def test_start_returns_when_files_can_be_read(place: Place) -> None:
    place.start()
    assert place.run("cat", place.path / "text").stdout == "the same text from every worker\n"
    record = place.record()
    assert record is not None
    assert (record.mountpoint, record.url) == (str(place.path), "s3://bucket/")
    assert record.keeper_pid == place.keeper_pid
    assert (place.state / "log").stat().st_mode & 0o777 == 0o600


def test_the_keeper_leaves_the_session_and_the_folder_of_the_command(place: Place) -> None:
    place.start()
    proc = Path(f"/proc/{place.keeper_pid}")
    assert os.getsid(place.keeper_pid) != os.getsid(0)
    assert os.readlink(proc / "cwd") == "/"
    assert not [path for path in (proc / "fd").iterdir() if os.readlink(path).startswith(str(place.path))]


def test_kernel_is_asked_for_what_makes_it_fast(place: Place) -> None:
    place.config = replace(place.config, log_level="debug")
    place.start()
    got = next(line for line in place.log().splitlines() if "the kernel offered" in line)
    for flag in ("ASYNC_READ", "WRITEBACK_CACHE", "PARALLEL_DIROPS", "DO_READDIRPLUS", "MAX_PAGES"):
        assert flag in got
    assert place.mounted is not None
    if os.geteuid() == 0:
        assert Path(f"/sys/class/bdi/{place.mounted.device}/read_ahead_kb").read_text() == "512\n"


def test_requests_are_as_large_as_the_kernel_can_make_them(place: Place) -> None:
    place.config = replace(place.config, kernel=replace(place.config.kernel, read_ahead_bytes=1 << 20))
    place.start()
    data = place.path / "data"
    place.run("dd", "if=/dev/zero", f"of={data}", "bs=4k", "count=1024", "conv=fsync")
    place.run("dd", f"of={data}", "if=/dev/zero", "bs=4M", "count=1", "conv=notrunc", "oflag=direct")
    place.run("dd", f"if={data}", "of=/dev/null", "bs=4M", "iflag=direct")
    requests = (place.state / "requests").read_text().splitlines()
    sizes = {
        operation: [int(line.split()[3]) for line in requests if operation in line] for operation in ("read", "write")
    }
    assert sizes["read"].count(1 << 20) == 4
    assert len(sizes["write"]) < 100  # the kernel joined 1024 writes
    assert max(sizes["write"]) == 1 << 20


def test_read_only_is_the_kernels_business(place: Place) -> None:
    place.config = replace(place.config, tree=replace(place.config.tree, read_only=True))
    place.start()
    assert "Read-only file system" in place.run("truncate", "-s0", place.path / "data").stderr


def test_a_failing_check_makes_no_mount(place: Place) -> None:
    assert finish(place.begin("--fail-check")) == (3, "s3://bucket/: there is no such bucket\n")
    assert not place.mounted
    assert place.record() is None
    assert not place.config_path.exists()
    assert ended(place.keeper_pid, SECONDS)


def test_a_worker_that_ends_before_it_serves_leaves_no_mount(place: Place) -> None:
    code, errors = finish(place.begin("--no-serve"))
    assert (code, errors) == (1, "the worker ended with status 7 before the mount was ready\n")
    assert not place.mounted
    assert list(place.path.iterdir()) == []


def test_a_mount_point_that_is_used_or_not_empty_is_refused(place: Place) -> None:
    (place.path / "file").touch()
    assert finish(place.begin())[0] == 4
    (place.path / "file").unlink()
    place.start()
    code, errors = finish(place.begin())
    assert (code, errors.count("\n")) == (4, 1)
    assert place.worker_pid


def test_a_state_directory_that_cannot_be_written_is_named(place: Place) -> None:
    shutil.rmtree(place.state)
    place.state.touch()
    code, errors = finish(place.begin())
    assert code == 5
    assert str(place.state) in errors


def test_when_the_command_is_killed_the_mount_goes(place: Place) -> None:
    command = place.begin("--slow-check")
    until((place.state / "keeper-pid").exists)
    command.kill()
    finish(command)
    assert ended(place.keeper_pid, SECONDS)
    assert not place.mounted
    assert (place.state / "drained").exists()


def test_a_signal_before_it_is_ready_ends_the_start(place: Place) -> None:
    command = place.begin("--slow-check")
    until((place.state / "keeper-pid").exists)
    place.signal()
    assert finish(command) == (1, "interrupted before it was ready\n")
    assert not place.mounted


# --- an ordinary user


def test_an_ordinary_user_mounts_resumes_and_unmounts(place: Place) -> None:
    place.become_nobody()
    place.start()
    first = place.worker_pid
    assert Path(f"/proc/{place.keeper_pid}").stat().st_uid == NOBODY
    os.kill(first, signal.SIGKILL)
    assert place.worker_pid != first
    assert place.mounted is not None
    assert (place.mounted.kind, place.mounted.source) == ("fuse.phfs", "phfs")
    assert place.unmount() == (0, "")
    assert ended(place.keeper_pid, SECONDS)
    assert not place.mounted


def test_an_ordinary_users_signal_unmounts_too(place: Place) -> None:
    place.become_nobody()
    place.start()
    place.signal()
    assert ended(place.keeper_pid, SECONDS)
    assert not place.mounted


def test_without_user_allow_other_one_line_says_that_it_is_left_out(place: Place) -> None:
    place.become_nobody()
    if "user_allow_other" in [line.strip() for line in Path("/etc/fuse.conf").read_text().splitlines()]:
        pytest.skip("this machine has user_allow_other")
    place.config = replace(place.config, kernel=replace(place.config.kernel, allow_other=True))
    code, errors = finish(place.begin())
    assert (code, errors.count("\n")) == (0, 1)
    assert "user_allow_other" in errors
    assert "allow_other" not in place.run("grep", place.path, "/proc/self/mounts").stdout
    assert place.unmount() == (0, "")


def test_what_fusermount_says_reaches_the_user(place: Place) -> None:
    place.become_nobody()
    os.chown(place.path, 0, 0)
    code, errors = finish(place.begin())
    assert code == 4
    assert "fusermount3" in errors
    assert errors.count("\n") == 1

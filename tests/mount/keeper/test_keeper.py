"""The keeper with a worker that needs no store: how a mount goes on over the death of its worker, and ends."""

from __future__ import annotations

import os
import signal
import sys

import pytest

from phfs_fuse.config import resolve
from phfs_fuse.host.processes import ended
from tests.mount.keeper.place import IMPATIENT, SECONDS, Place, Reader, finish, until

pytestmark = pytest.mark.fuse


# --- the end


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_uploads_and_unmounts(place: Place, number: int) -> None:
    place.start()
    place.signal(number)
    assert ended(place.keeper_pid, SECONDS)
    assert not place.mounted
    assert (place.state / "drained").read_text() == "1"
    assert place.record() is None
    assert not place.config_path.exists()
    assert "exit_code=0" in place.log()


def test_a_second_signal_does_not_wait_for_uploads(place: Place) -> None:
    place.start("--never-drained")
    place.signal()
    assert not ended(place.keeper_pid, 0.5)
    assert place.mounted
    place.signal()
    assert ended(place.keeper_pid, SECONDS)
    assert not place.mounted


def test_what_the_kernel_holds_is_written_before_the_unmount(place: Place) -> None:
    place.start()
    place.run("dd", "if=/dev/zero", f"of={place.path / 'data'}", "bs=1M", "count=8")
    place.signal()
    assert ended(place.keeper_pid, SECONDS)
    assert (place.state / "data").stat().st_size == 8 << 20


def test_open_files_go_on_after_a_signal_until_they_are_closed(place: Place) -> None:
    place.start()
    reader = Reader(place, "text")
    place.signal()
    until(lambda: not place.mounted)
    assert "in use" in (place.state / "busy").read_text()
    assert reader.read() == "the same text fr"
    assert not ended(place.keeper_pid, 0)
    reader.close()
    assert ended(place.keeper_pid, SECONDS)


def test_a_worker_that_does_not_wait_for_the_last_open_file_ends_the_mount(place: Place) -> None:
    place.start("--impatient")
    reader = Reader(place, "text")
    place.signal()
    assert ended(place.keeper_pid, SECONDS)
    assert "starting it again" not in place.log()
    assert "exit_code=0" in place.log()
    reader.close()


def test_fusermount_ends_keeper_and_worker(place: Place) -> None:
    place.start()
    assert place.run("fusermount3", "-u", place.path).returncode == 0
    assert ended(place.keeper_pid, SECONDS)
    assert place.record() is None


def test_unmount_of_a_mount_in_use_says_so(place: Place) -> None:
    place.start()
    reader = Reader(place, "text")
    code, errors = place.unmount()
    assert code
    assert "files are in use" in errors
    assert place.unmount(lazy=True) == (0, "")
    reader.close()
    assert ended(place.keeper_pid, SECONDS)


def test_in_the_foreground_the_command_is_the_keeper(place: Place) -> None:
    command = place.begin(foreground=True)
    until(lambda: place.record() is not None)
    assert place.keeper_pid == command.pid
    os.killpg(command.pid, signal.SIGINT)  # Ctrl-C
    code, errors = finish(command)
    assert code == 0
    assert "ended mountpoint" in errors
    assert (place.state / "drained").exists()


def test_in_the_foreground_a_failure_is_one_line(place: Place) -> None:
    code, errors = finish(place.begin("--fail-check", foreground=True))
    assert (code, errors) == (3, "phfs: s3://bucket/: there is no such bucket\n")


# --- the death of the worker


def test_a_killed_worker_is_resumed_and_open_files_go_on(place: Place) -> None:
    place.start()
    first = place.worker_pid
    reader = Reader(place, "text")
    hanging = Reader(place, "hang")
    hanging.ask()
    until(lambda: "read hang" in (place.state / "requests").read_text())
    os.kill(first, signal.SIGKILL)
    assert hanging.answer() == "the same text fr"  # the request that the dead worker had taken
    assert reader.read() == "the same text fr"
    assert place.worker_pid != first
    reader.close()
    hanging.close()
    assert place.unmount() == (0, "")


def test_writes_go_on_over_the_death_of_the_worker(place: Place) -> None:
    place.start()
    worker = place.worker_pid
    writer = place.python(
        "import sys\n"
        "with open(sys.argv[1], 'wb', 0) as f:\n"
        "    for i in range(4000):\n"
        "        f.write(i.to_bytes(4, 'big') * 1024)\n"
        "        if i == 1000: print('quarter', flush=True)\n",
        place.path / "data",
    )
    assert writer.stdout
    assert writer.stdout.readline() == "quarter\n"
    os.kill(worker, signal.SIGKILL)
    assert finish(writer) == (0, "")
    place.signal()
    assert ended(place.keeper_pid, SECONDS)
    want = b"".join(i.to_bytes(4, "big") * 1024 for i in range(4000))
    assert (place.state / "data").read_bytes() == want


def test_a_hangup_puts_another_worker_in_its_place(place: Place) -> None:
    place.start()
    first = place.worker_pid
    reader = Reader(place, "text")
    place.signal(signal.SIGHUP)
    until(lambda: place.log().count("resumed") == 1)
    assert place.worker_pid != first
    assert ended(first, SECONDS)
    assert reader.read() == "the same text fr"
    assert "starting it again" not in place.log()
    place.signal(signal.SIGHUP)
    until(lambda: place.log().count("resumed") == 2)
    assert reader.read() == "the same text fr"
    reader.close()
    assert place.unmount() == (0, "")


def test_a_worker_that_cannot_take_over_changes_nothing(place: Place) -> None:
    place.start("--no-takeover")
    first = place.worker_pid
    reader = Reader(place, "text")
    place.signal(signal.SIGHUP)
    until(lambda: "not upgraded: the state is of a newer format" in place.log())
    assert place.worker_pid == first
    assert reader.read() == "the same text fr"
    reader.close()
    place.signal()
    assert ended(place.keeper_pid, SECONDS)
    assert not place.mounted


def test_a_signal_that_comes_while_no_worker_runs_is_not_lost(place: Place) -> None:
    place.start()
    worker = place.worker_pid
    os.kill(place.keeper_pid, signal.SIGSTOP)
    os.kill(worker, signal.SIGKILL)
    place.signal()
    os.kill(place.keeper_pid, signal.SIGCONT)
    assert ended(place.keeper_pid, SECONDS)
    assert not place.mounted
    assert "resumed" in place.log()


def test_a_worker_that_always_dies_leaves_the_mount_broken_not_empty(place: Place) -> None:
    place.config_path.write_text(resolve.dump_config(place.config))
    worker = [sys.executable, "-m", "tests.support.memory_worker", "--no-resume"]
    keeper = place.python(IMPATIENT, f"--config={place.config_path}", "--", *worker)
    until(lambda: place.record() is not None)
    os.kill(place.worker_pid, signal.SIGKILL)
    code, errors = finish(keeper)
    assert code == 1
    assert errors.count("starting it again") == 2
    assert "gave up" in errors
    assert place.mounted
    assert "not connected" in place.run("ls", place.path).stderr
    assert place.unmount() == (0, "")
    assert not place.mounted
    assert place.record() is None


def test_the_death_of_the_keeper_leaves_the_mount_broken_not_empty(place: Place) -> None:
    place.start()
    worker = place.worker_pid
    place.signal(signal.SIGKILL)
    assert ended(worker, SECONDS)
    assert place.mounted
    assert "not connected" in place.run("ls", place.path).stderr
    code, errors = finish(place.begin())
    assert (code, "dead mount" in errors) == (4, True)
    assert place.unmount() == (0, "")
    place.start()
    assert place.worker_pid != worker

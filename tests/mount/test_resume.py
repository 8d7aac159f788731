"""The worker dies, the mount goes on (P6): what programs hold keeps its meaning over kill -9."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest

from phfs_fuse.tree.kernel_log import _FORMAT, FORMAT, _packed
from tests.mount.place import MountPlace, a_mount, attempt, run, within

pytestmark = [pytest.mark.fuse, pytest.mark.minio]


@pytest.fixture
def place() -> Iterator[MountPlace]:
    with a_mount("--attr-ttl", "1s") as found:
        yield found


def test_open_files_go_on(place: MountPlace) -> None:
    path = place.path
    (path / "stored").write_bytes(b"0123456789" * 100_000)
    place.sync()
    place.remount()
    with (path / "stored").open("rb", buffering=0) as reader, (path / "log").open("ab", buffering=0) as log:
        assert reader.read(5) == b"01234"
        log.write(b"before ")
        os.fsync(log.fileno())
        log.write(b"unsent ")
        place.mount.kill_worker()
        assert reader.read(5) == b"56789"
        reader.seek(-10, os.SEEK_END)
        assert reader.read() == b"0123456789"
        log.write(b"after")
    place.sync()
    place.remount()
    assert (path / "log").read_bytes() == b"before unsent after"


def test_unlinked_and_replaced_files_stay_open(place: MountPlace) -> None:
    path = place.path
    for name in ("clean", "replaced"):
        (path / name).write_bytes(name.encode() * 1000)
    place.sync()
    place.remount()
    with (
        (path / "clean").open("rb", buffering=0) as clean,
        (path / "replaced").open("rb", buffering=0) as replaced,
        (path / "dirty").open("w+b", buffering=0) as dirty,
    ):
        dirty.write(b"only here")
        (path / "clean").unlink()
        (path / "dirty").unlink()
        (path / "new").write_bytes(b"new")
        (path / "new").rename(path / "replaced")
        place.mount.kill_worker()
        assert clean.read() == b"clean" * 1000
        assert replaced.read() == b"replaced" * 1000
        dirty.seek(0)
        dirty.write(b"ONLY")
        dirty.seek(0)
        assert dirty.read() == b"ONLY here"
        assert sorted(os.listdir(path)) == ["replaced"]
        assert (path / "replaced").read_bytes() == b"new"
    place.sync()
    listed = place.mount.s3.list_objects_v2(Bucket=place.mount.bucket)["Contents"]
    assert [entry["Key"] for entry in listed] == ["groups/test/replaced"]


def test_bytes_for_a_file_that_others_have_replaced_are_kept_beside_it(place: MountPlace) -> None:
    path = place.path
    place.mount.expected.append("conflict: .* was changed by somebody else")
    for name in ("before", "after"):
        (path / name).write_bytes(b"base")
    place.sync()
    with (path / "before").open("r+b", buffering=0) as before, (path / "after").open("r+b", buffering=0) as after:
        before.read()
        after.read()
        for name in ("before", "after"):
            place.foreign_put(path / name, b"theirs")
            within(20, (path / name).read_bytes, b"theirs")
        before.write(b" and ours")
        place.mount.kill_worker()
        after.write(b" and ours")
    place.sync()
    for name in ("before", "after"):
        (beside,) = path.glob(f"{name}.conflict-*")
        assert beside.read_bytes() == b"base and ours"
        assert (path / name).read_bytes() == b"theirs"


def test_working_directories_and_renamed_folders(place: MountPlace) -> None:
    (place.path / "a/b").mkdir(parents=True)
    (place.path / "a/b/f").write_text("inside")
    (place.path / "a").rename(place.path / "c")
    code = """if True:
        import os, sys
        os.chdir(sys.argv[1])
        print("there", flush=True)
        sys.stdin.readline()
        print(os.getcwd(), open("f").read(), os.listdir("."), flush=True)
        open("g", "w").write("new")
    """
    with subprocess.Popen(
        [sys.executable, "-c", code, place.path / "c/b"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as inside:
        assert inside.stdin is not None
        assert inside.stdout is not None
        assert inside.stdout.readline() == "there\n"
        place.mount.kill_worker()
        found, _ = inside.communicate("go on\n", timeout=60)
    assert found == f"{place.path / 'c/b'} inside ['f']\n"
    assert (place.path / "c/b/g").read_text() == "new"
    assert attempt(os.stat, place.path / "a") == "ENOENT"


def test_maps_and_locks(place: MountPlace) -> None:
    with (place.path / "map").open("w+b", buffering=0) as file:
        file.write(bytes(8192))
        fcntl.flock(file, fcntl.LOCK_EX)
        with mmap.mmap(file.fileno(), 8192) as mapped:
            mapped[0:5] = b"first"
            place.mount.kill_worker()
            assert mapped[0:5] == b"first"
            mapped[4096:4100] = b"then"
            mapped.flush()
        busy = "import fcntl, sys; fcntl.flock(open(sys.argv[1]), fcntl.LOCK_EX | fcntl.LOCK_NB)"
        done = subprocess.run([sys.executable, "-c", busy, place.path / "map"], timeout=30, capture_output=True)
        assert b"BlockingIOError" in done.stderr
    place.sync()
    place.remount()
    found = (place.path / "map").read_bytes()
    assert (found[:5], found[4096:4100], len(found)) == (b"first", b"then", 8192)


def test_a_directory_stream_goes_on_where_it_was(place: MountPlace) -> None:
    for number in range(1500):
        key = f"{place.mount.prefix}many/{number:05}"
        place.mount.s3.put_object(Bucket=place.mount.bucket, Key=key, Body=b"")
    (place.path / "many/00001-local").touch()
    with os.scandir(place.path / "many") as entries:
        found = [next(entries).name for _ in range(40)]
        place.mount.kill_worker()
        found += [entry.name for entry in entries]
    assert sorted(found) == sorted([f"{number:05}" for number in range(1500)] + ["00001-local"])


def test_pages_are_dropped_while_others_write_past_them(place: MountPlace) -> None:
    """At each open while a handle with O_DIRECT is open, and at the first after it, over the death of the worker."""

    def asks_to_read() -> bool:
        before = place.mount.status()["counters"]["fuse_requests"].get("read", 0)
        assert len((place.path / "db").read_bytes()) == 65536
        return int(place.mount.status()["counters"]["fuse_requests"].get("read", 0)) > before

    (place.path / "db").write_bytes(b"x" * 65536)
    assert not asks_to_read()
    database = os.open(place.path / "db", os.O_RDWR | os.O_DIRECT)
    assert asks_to_read()
    assert asks_to_read()
    place.mount.kill_worker()
    assert asks_to_read()
    assert asks_to_read()
    os.close(database)
    assert asks_to_read()
    within(20, asks_to_read, False)
    (place.path / "db").write_bytes(b"y" * 65536)
    assert not asks_to_read()


def test_places_in_a_directory_stay_valid(place: MountPlace) -> None:
    """As xfstests generic/676 (seeks backwards and to anywhere), with names that go and a worker that dies."""
    folder = place.path / "many"
    for number in range(1500):
        key = f"{place.mount.prefix}many/{number:05}"
        place.mount.s3.put_object(Bucket=place.mount.bucket, Key=key, Body=b"")
    with Directory(folder) as directory:
        found = list(directory)
        assert [name for _, name, _ in found] == [f"{number:05}" for number in range(1500)]
        chance = random.Random(1)
        for is_killed in (True, False):
            count = len(found)
            for index in [*range(count - 1, -1, -75), *chance.sample(range(count), 50)]:
                directory.seek(found[index][0])
                assert list(islice(directory, 3)) == found[index : index + 3]
            for _, name, _ in found[:50]:
                (folder / name).unlink()
            directory.seek(found[100][0])
            assert [name for _, name, _ in directory] == [name for _, name, _ in found[100:]]
            found = found[50:]
            if is_killed:
                place.mount.kill_worker()


class _Entry(ctypes.Structure):
    _fields_ = (
        ("ino", ctypes.c_uint64),
        ("behind", ctypes.c_int64),
        ("length", ctypes.c_uint16),
        ("type", ctypes.c_uint8),
        ("name", ctypes.c_char * 256),
    )


class Directory:
    """A directory stream of the C library: yields (place before the name, name, place behind it)."""

    def __init__(self, path: Path) -> None:
        self._libc = libc = ctypes.CDLL(None, use_errno=True)
        libc.opendir.restype = libc.readdir.restype = ctypes.c_void_p
        libc.telldir.restype = ctypes.c_long
        libc.readdir.argtypes = libc.telldir.argtypes = libc.closedir.argtypes = (ctypes.c_void_p,)
        libc.seekdir.argtypes = (ctypes.c_void_p, ctypes.c_long)
        self._stream = libc.opendir(os.fsencode(path))
        assert self._stream

    def __enter__(self) -> Directory:
        return self

    def __exit__(self, *_: object) -> None:
        self._libc.closedir(self._stream)

    def __iter__(self) -> Directory:
        return self

    def __next__(self) -> tuple[int, str, int]:
        at = self._libc.telldir(self._stream)
        if not (entry := self._libc.readdir(self._stream)):
            raise StopIteration
        found = _Entry.from_address(entry)
        return at, found.name.decode(), found.behind

    def seek(self, place: int) -> None:
        self._libc.seekdir(self._stream, place)


@pytest.mark.parametrize("how", ["killed", "upgraded"])
def test_again_and_again_under_load(place: MountPlace, how: str) -> None:
    """Programs that write, rename, list and delete see no error, and nothing they did is missing or done twice."""
    code = """if True:
        import os, sys
        at, number = sys.argv[1], 0
        os.mkdir(at)
        while not os.path.exists(sys.argv[2]):
            number += 1
            folder = f"{at}/{number}"
            os.mkdir(folder)
            for name in "abc":
                with open(f"{folder}/{name}", "x") as file:
                    file.write(name * number)
            os.rename(f"{folder}/a", f"{folder}/d")
            os.rename(folder, f"{folder}-moved")
            os.unlink(f"{folder}-moved/b")
            os.symlink("d", f"{folder}-moved/link")
            assert sorted(os.listdir(f"{folder}-moved")) == ["c", "d", "link"], os.listdir(f"{folder}-moved")
            assert open(f"{folder}-moved/link").read() == "a" * number
        print(number)
    """
    stop = place.mount.root / "stop"
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", code, place.path / f"w{at}", stop],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for at in range(3)
    ]
    for _ in range(4):
        time.sleep(0.7)
        if how == "killed":
            place.mount.kill_worker()
        else:
            place.mount.upgrade()
    time.sleep(1)
    stop.touch()
    done = [worker.communicate(timeout=60) for worker in workers]
    assert [(worker.returncode, err) for worker, (_, err) in zip(workers, done, strict=True)] == [(0, "")] * 3
    place.sync()
    place.remount()
    for at, (out, _) in enumerate(done):
        folder = place.path / f"w{at}"
        assert sorted(os.listdir(folder)) == sorted(f"{number}-moved" for number in range(1, int(out) + 1))
        for number in range(1, int(out) + 1):
            assert (folder / f"{number}-moved/c").read_text() == "c" * number
            assert (folder / f"{number}-moved/link").read_text() == "a" * number


def test_a_version_that_cannot_read_the_state_does_not_take_over(place: MountPlace) -> None:
    (log,) = place.mount.state.glob("*/kernel.log")
    known = log.read_bytes()
    newer = _packed(_FORMAT, FORMAT + 1)
    log.write_bytes(newer + known[len(newer) :])
    place.mount.expected.append("is not of the format")
    with open(place.path / "file", "w") as file:
        found = place.mount.phfs("upgrade", place.path)
        assert (found.returncode, found.stdout) == (5, "")
        assert "is not of the format that phfs" in found.stderr
        assert found.stderr.count("\n") == 1
        file.write("goes on")
    assert (place.path / "file").read_text() == "goes on"
    log.write_bytes(known)
    place.mount.upgrade()
    assert (place.path / "file").read_text() == "goes on"


def test_many_known_inodes(place: MountPlace, tmp_path: Path) -> None:
    for folder in range(20):
        (place.path / f"{folder}").mkdir()
        for number in range(100):
            (place.path / f"{folder}/{number}").touch()
    run("find", place.path, "-type", "f")
    place.mount.kill_worker()
    assert len(run("find", place.path, "-type", "f").splitlines()) == 2000
    place.sync()

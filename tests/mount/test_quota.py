"""Quotas on a real mount: what df shows, what programs are told and when, and that the count outlives the worker."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from phfs_fuse.errors import UsageError
from phfs_fuse.launch import client
from phfs_fuse.types import MIB
from tests.mount.place import MountPlace, a_mount, refused, run
from tests.support.mounts import mounted

pytestmark = [pytest.mark.fuse, pytest.mark.minio]
LATE_SECONDS = 30.0  # when a count that is due after a second or two is given up


@pytest.fixture
def place() -> Iterator[MountPlace]:
    """16 MiB, of these 8 in `a` and 4 in `b`."""
    flags = ("--quota", "16M", "--quota", "a=8M", "--quota", "b=4M", "-o", "quota-recount=1s")
    with a_mount("--attr-ttl", "1s", *flags) as found:
        for name in "ab":
            (found.path / name).mkdir()
        yield found


def df(path: Path) -> tuple[int, int, int]:
    """(size, used, available) in bytes, as `df` has them."""
    line = run("df", "--block-size=1", "--output=size,used,avail", path).splitlines()[1]
    size, used, available = map(int, line.split())
    return size, used, available


def eventually(find: Callable[[], object], wanted: object) -> None:
    deadline = time.monotonic() + LATE_SECONDS
    while (found := find()) != wanted and time.monotonic() < deadline:
        time.sleep(0.1)
    assert found == wanted


def write(path: Path, size: int, flags: int = os.O_WRONLY | os.O_CREAT) -> int:
    """write(2) MiB by MiB, then close(2); returns how many bytes were taken. Raises: OSError of the first failure."""
    fd, done = os.open(path, flags, 0o644), 0
    try:
        while done < size:
            done += os.write(fd, os.urandom(min(MIB, size - done)))
    finally:
        os.close(fd)
    return done


def test_df_shows_the_quota_of_the_mount_and_of_its_folders(place: MountPlace) -> None:
    path = place.path
    assert df(path) == (16 * MIB, 0, 16 * MIB)
    write(path / "a" / "f", 3 * MIB)
    (path / "a" / "sub").mkdir()
    assert df(path / "a") == df(path / "a" / "sub") == df(path / "a" / "f") == (8 * MIB, 3 * MIB, 5 * MIB)
    assert df(path / "b") == (4 * MIB, 0, 4 * MIB)
    assert df(path) == (16 * MIB, 3 * MIB, 13 * MIB)
    write(path / "f", 11 * MIB)
    assert df(path / "a") == (8 * MIB, 3 * MIB, 2 * MIB)  # the mount has less than the folder
    (path / "f").unlink()
    place.sync()
    place.remount()
    eventually(lambda: df(path / "a"), (8 * MIB, 3 * MIB, 5 * MIB))


def test_what_others_store_is_counted(place: MountPlace) -> None:
    write(place.path / "a" / "ours", MIB)
    place.foreign_put(place.path / "a" / "theirs", b"x" * 2 * MIB)
    eventually(lambda: df(place.path / "a"), (8 * MIB, 3 * MIB, 5 * MIB))
    place.foreign_delete(place.path / "a" / "theirs")
    eventually(lambda: df(place.path / "a"), (8 * MIB, MIB, 7 * MIB))


def test_near_the_limit_write_itself_fails(place: MountPlace) -> None:
    path = place.path / "b" / "f"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    assert os.write(fd, b"x" * 4 * MIB) == 4 * MIB
    refused(errno.EDQUOT, os.write, fd, b"y")
    refused(errno.EDQUOT, os.pwrite, fd, b"y", 10 * MIB)
    assert os.pwrite(fd, b"z", 4 * MIB - 1) == 1  # what is there may change
    os.fsync(fd)
    os.close(fd)
    refused(errno.EDQUOT, write, place.path / "b" / "new", 1)
    assert sorted(os.listdir(place.path / "b")) == ["f"]
    assert path.read_bytes() == b"x" * (4 * MIB - 1) + b"z"
    assert df(path.parent) == (4 * MIB, 4 * MIB, 0)
    path.unlink()
    assert write(place.path / "b" / "new", 4 * MIB) == 4 * MIB


def test_programs_say_so(place: MountPlace, tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(b"x" * 6 * MIB)
    done = subprocess.run(
        ["cp", tmp_path / "big", place.path / "b"], capture_output=True, text=True, timeout=60, env={"LC_ALL": "C"}
    )
    assert (done.returncode, "Disk quota exceeded" in done.stderr) == (1, True), done.stderr


def test_growing_by_truncate(place: MountPlace) -> None:
    path = place.path / "b" / "f"
    path.touch()
    refused(errno.EDQUOT, os.truncate, path, 4 * MIB + 1)
    os.truncate(path, 4 * MIB)
    assert df(path) == (4 * MIB, 4 * MIB, 0)
    os.truncate(path, MIB)
    assert df(path) == (4 * MIB, MIB, 3 * MIB)
    with path.open("wb"):
        assert df(path) == (4 * MIB, 0, 4 * MIB)


def test_moving_between_folders(place: MountPlace) -> None:
    a, b = place.path / "a", place.path / "b"
    (a / "tree").mkdir()
    for name in ("x", "y"):
        write(a / "tree" / name, 2 * MIB)
    write(a / "tree" / "z", 1)
    refused(errno.EDQUOT, os.rename, a / "tree", b / "tree")
    assert sorted(os.listdir(a / "tree")) == ["x", "y", "z"]
    (a / "tree" / "z").unlink()
    os.rename(a / "tree", b / "tree")
    assert (df(a)[1], df(b)[1], df(place.path)[1]) == (0, 4 * MIB, 4 * MIB)
    place.sync()
    assert (df(a)[1], df(b)[1]) == (0, 4 * MIB)
    write(a / "x", MIB)
    os.rename(a / "x", b / "tree" / "x")  # what it replaces makes room
    assert (df(a)[1], df(b)[1]) == (0, 3 * MIB)
    time.sleep(3)  # counted anew in between
    shutil.rmtree(b / "tree")
    assert df(b)[1] == 0


@pytest.mark.parametrize("how", ["close", "fsync"])
def test_through_the_kernels_cache_close_and_fsync_tell(how: str) -> None:
    """A file that was opened while there was much room: write(2) is answered by the kernel."""
    with a_mount("--quota", "80M") as place:
        path = place.path / "f"
        fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
        for _ in range(100):
            os.write(fd, b"x" * MIB)
        if how == "fsync":
            refused(errno.ENOSPC, os.fsync, fd)
            os.close(fd)
        else:
            refused(errno.ENOSPC, os.close, fd)
        size = place.mount.status()["quotas"][0]["used"]
        assert 64 * MIB < size <= 80 * MIB
        eventually(lambda: path.stat().st_size, size)  # what was refused is not shown
        assert path.read_bytes() == b"x" * size
        place.sync()
        place.remount()
        assert path.read_bytes() == b"x" * size


def test_times_move_past_the_cache_too(place: MountPlace) -> None:
    path = place.path / "a" / "f"
    write(path, 10)
    for flags in (os.O_WRONLY | os.O_APPEND, os.O_WRONLY | os.O_TRUNC):
        place.sync()
        os.utime(path, (1000, 1000))
        place.sync()
        write(path, 10, flags)
        assert path.stat().st_mtime == pytest.approx(time.time(), abs=60)
    os.utime(path, (2000, 2000))
    fd = os.open(path, os.O_WRONLY)
    os.write(fd, b"x")
    os.utime(fd, (3000, 3000))
    os.close(fd)
    assert path.stat().st_mtime == 3000  # as cp -p and tar leave it
    place.sync()
    place.remount()
    assert path.stat().st_mtime == 3000


def test_past_the_cache_and_through_it_bytes_are_the_same(place: MountPlace) -> None:
    path = place.path / "a" / "f"
    path.write_bytes(b"old" * 1000)
    place.sync()
    assert path.read_bytes() == b"old" * 1000  # in the page cache now
    fd = os.open(path, os.O_WRONLY | os.O_APPEND)
    with path.open("rb", buffering=0) as reader:
        for number in range(50):
            os.write(fd, b"line %06d\n" % number)
            reader.seek(3000 + 12 * number)
            assert reader.read() == b"line %06d\n" % number
        assert path.read_bytes() == b"old" * 1000 + b"".join(b"line %06d\n" % number for number in range(50))
    os.pwrite(fd, b"", 0)
    os.close(fd)
    with path.open("r+b") as both:
        both.write(b"new")
    assert path.read_bytes()[:6] == b"newold"
    place.sync()
    place.remount()
    assert path.read_bytes() == b"newold" + b"old" * 998 + b"".join(b"line %06d\n" % number for number in range(50))


def test_the_count_outlives_the_worker(place: MountPlace) -> None:
    a = place.path / "a"
    write(a / "stored", 3 * MIB)
    place.sync()
    fd = os.open(a / "open", os.O_WRONLY | os.O_CREAT, 0o644)
    os.write(fd, b"x" * 2 * MIB)
    time.sleep(2)
    place.mount.kill_worker()
    assert df(a) == (8 * MIB, 5 * MIB, 3 * MIB)
    os.write(fd, b"x" * 3 * MIB)
    refused(errno.EDQUOT, os.write, fd, b"y")
    os.close(fd)
    place.sync()
    time.sleep(2)  # counted anew
    assert df(a) == (8 * MIB, 8 * MIB, 0)
    (a / "stored").unlink()
    place.mount.kill_worker()
    eventually(lambda: df(a), (8 * MIB, 5 * MIB, 3 * MIB))
    assert (a / "open").read_bytes() == b"x" * 5 * MIB


def test_the_limit_of_a_running_mount_changes(place: MountPlace) -> None:
    a, record = place.path / "a", place.mount.record()
    write(a / "f", 8 * MIB)
    refused(errno.EDQUOT, write, a / "g", 1)
    client.set_quota(record, "a", 10 * MIB)
    write(a / "g", 1)
    assert df(a) == (10 * MIB, 8 * MIB + 4096, 2 * MIB - 4096)
    place.mount.kill_worker()
    eventually(lambda: df(a)[0], 10 * MIB)
    client.set_quota(record, "a", None)
    assert df(a)[0] == 16 * MIB
    client.set_quota(record, "", None)
    assert df(a)[0] == 1 << 50
    with pytest.raises(UsageError, match="SIZE or PATH=SIZE"):
        client.set_quota(record, "a", 0)


def test_a_file_of_quotas_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "quotas"
    file.write_text("# of the groups\na = 1M\n")
    with a_mount("--quota-file", str(file)) as place:
        (place.path / "a").mkdir()
        assert (df(place.path / "a")[0], df(place.path)[0]) == (MIB, 1 << 50)
        file.write_text("a=2M\n64M\n")
        eventually(lambda: (df(place.path / "a")[0], df(place.path)[0]), (2 * MIB, 64 * MIB))
        place.mount.expected.append("'nothing' is not valid")
        file.write_text("nothing\n")
        eventually(lambda: "'nothing' is not valid" in place.mount.log(), True)
        assert df(place.path / "a")[0] == 2 * MIB


def test_status_shows_them(place: MountPlace) -> None:
    write(place.path / "b" / "f", 4 * MIB)
    refused(errno.EDQUOT, write, place.path / "b" / "g", 1)
    eventually(lambda: [quota["counted"] for quota in place.mount.status()["quotas"]], [True] * 3)
    shown = place.mount.status()["quotas"][2]
    assert shown == {
        "path": "b", "limit": 4 * MIB, "used": 4 * MIB, "free": 0, "counted": True, "refused": 1,
    }  # fmt: skip
    assert f"{place.path}/b: 4.0 MiB of 4.0 MiB, 0 B free, refused 1 times" in place.mount.must("status", place.path)


def test_several_mounts_of_one_prefix_see_each_other_at_the_next_count(place: MountPlace) -> None:
    mount = place.mount
    flags = ("--quota", "16M", "-o", "quota-recount=1s", "--allow-other")
    with mounted(*flags, bucket=mount.bucket, server=mount.server, prefix=mount.prefix) as other:
        write(Path(other.path) / "theirs", 10 * MIB)
        other.sync()
        eventually(lambda: df(place.path)[1], 10 * MIB)
        refused(errno.EDQUOT, write, place.path / "ours", 7 * MIB)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (("--quota", "much"), "--quota: 'much' is not valid, expected SIZE or PATH=SIZE"),
        (("--quota", "../x=1G"), "--quota: '../x=1G' is not valid, expected a path below the mount point"),
        (("--quota-file", "/no/such/file"), "--quota-file: '/no/such/file' is not valid, expected a file that can"),
    ],
)
def test_a_wrong_quota_is_one_line(place: MountPlace, tmp_path: Path, flags: tuple[str, str], line: str) -> None:
    (tmp_path / "mnt").mkdir()
    mount = place.mount
    places = ("--endpoint-url", mount.endpoint_url, "--state-dir", tmp_path / "s", "--cache-dir", tmp_path / "c")
    done = mount.phfs("mount", f"s3://{mount.bucket}/other/", tmp_path / "mnt", *places, *flags)
    assert done.returncode == 2
    assert line in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr

"""Changes that the store would refuse for good: refused at the call, and what is kept is kept."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.mount.place import MountPlace, a_mount, attempt, refused, saved

pytestmark = [pytest.mark.fuse, pytest.mark.minio]

GBK = "数据分析报告".encode("gbk") * 5
LARGEST = 5 << 40


@pytest.fixture(scope="module")
def place() -> Iterator[MountPlace]:
    with a_mount("--xattrs") as found:
        yield found


def at(mnt: Path, name: bytes) -> bytes:
    return os.path.join(os.fsencode(mnt), name)


def make_file(path: bytes) -> None:
    with open(path, "xb") as file:
        file.write(b"data")


def make_link(path: bytes) -> None:
    os.symlink(b"target", path)


def move_file(path: bytes) -> None:
    make_file(path[:-4])
    os.rename(path[:-4], path)


def move_folder(path: bytes) -> None:
    os.mkdir(path[:-4])
    make_file(path[:-4] + b"/x")
    os.rename(path[:-4], path)


@pytest.mark.parametrize("make", [make_file, make_link, os.mkfifo, move_file, os.mkdir, move_folder])
@pytest.mark.parametrize("name", [b"n" * 247, b"n" * 255, GBK, b"\xff" * 49], ids=["247", "255", "gbk", "raw"])
def test_a_name_is_stored_or_refused(
    make: Callable[[bytes], None], name: bytes, place: MountPlace, mnt: Path, tmp_path: Path
) -> None:
    """MinIO takes 255 bytes between two slashes, of a directory marker 246; a byte that is not UTF-8 takes five."""
    is_folder = make in (os.mkdir, move_folder)
    if name == GBK or (is_folder and name[:1] == b"n"):
        refused(errno.ENAMETOOLONG, make, at(mnt, name))
        assert attempt(os.stat, at(mnt, name)) in ("ENOENT", "ENAMETOOLONG")
    else:
        make(at(mnt, name))
        assert name in os.listdir(os.fsencode(mnt))
    saved(place, mnt, tmp_path / "stored")


@pytest.mark.parametrize("name", [b" .", b".. ", b"..\\x", b"x\\.", b"x__XLDIR__"])
def test_a_name_that_minio_takes_for_another(name: bytes, place: MountPlace, mnt: Path, tmp_path: Path) -> None:
    for make in (make_file, make_link, os.mkdir):
        refused(errno.EINVAL, make, at(mnt, name))
        refused(errno.ENOENT, os.stat, at(mnt, name))
    assert os.listdir(mnt) == []
    saved(place, mnt, tmp_path / "stored")


@pytest.mark.parametrize("is_folder", [False, True])
def test_attributes_are_stored_or_refused(is_folder: bool, place: MountPlace, mnt: Path) -> None:
    path = mnt / "x"
    path.mkdir() if is_folder else path.write_bytes(b"1")
    count = 0
    while (found := attempt(os.setxattr, path, f"user.a{count}", b"v")) == "":
        count += 1
    assert found == "ENOSPC"
    assert count > 10
    path.chmod(0o700)
    place.sync()
    place.remount()
    assert len(os.listxattr(path)) == count
    assert path.stat().st_mode & 0o777 == 0o700


def test_a_size_is_refused_at_the_call(mnt: Path) -> None:
    path = mnt / "x"
    path.write_bytes(b"1")
    refused(errno.EFBIG, os.truncate, path, LARGEST + 1)
    fd = os.open(path, os.O_WRONLY | os.O_DIRECT)
    with mmap.mmap(-1, 4096) as page:
        refused(errno.EFBIG, os.pwrite, fd, page, LARGEST)
    refused(errno.EFBIG, os.posix_fallocate, fd, 0, LARGEST + 1)
    os.close(fd)
    assert path.stat().st_size == 1


@pytest.mark.parametrize("synced", [False, True])
def test_a_size_is_refused_at_close_or_fsync(synced: bool, place: MountPlace, mnt: Path, tmp_path: Path) -> None:
    """The kernel has answered the write itself. It shows the true size once the file is closed."""
    path = mnt / "x"
    fd = os.open(path, os.O_CREAT | os.O_RDWR)
    assert os.pwrite(fd, b"xyz", LARGEST) == 3
    refused(errno.EFBIG, os.fsync if synced else os.close, fd)
    if synced:
        os.close(fd)
    assert path.stat().st_size == 0
    assert path.read_bytes() == b""
    path.write_bytes(b"new")
    assert saved(place, mnt, tmp_path / "stored").joinpath("x").read_bytes() == b"new"

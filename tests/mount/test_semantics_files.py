"""One file: open, read, write, size, holes, and what happens to it while it is open."""

from __future__ import annotations

import errno
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.mount.place import Place, attempt, refused, saved, together

pytestmark = pytest.mark.fuse


@contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    fd = os.open(path, flags, 0o644)
    try:
        yield fd
    finally:
        os.close(fd)


def data_ranges(fd: int) -> list[tuple[int, int]]:
    """What SEEK_DATA and SEEK_HOLE call data."""
    found, size, at = [], os.fstat(fd).st_size, 0
    while at < size:
        if attempt(os.lseek, fd, at, os.SEEK_DATA) == "ENXIO":
            break
        start = os.lseek(fd, at, os.SEEK_DATA)
        at = os.lseek(fd, start, os.SEEK_HOLE)
        assert at > start
        found.append((start, at))
    return found


def test_reader_keeps_the_file_that_was_replaced_by_rename(place: Place, mnt: Path, tmp_path: Path) -> None:
    path, beside = mnt / "f", mnt / "new"
    old = os.urandom(500_000)
    path.write_bytes(old)
    place.pull(mnt, tmp_path / "first")
    with path.open("rb", buffering=0) as reader:
        assert reader.read(1000) == old[:1000]
        beside.write_bytes(b"new")
        beside.rename(path)
        assert os.fstat(reader.fileno()).st_size == len(old)
        reader.seek(0)
        assert reader.readall() == old
        assert path.read_bytes() == b"new"
        place.pull(mnt, tmp_path / "second")
        assert os.pread(reader.fileno(), 1000, 400_000) == old[400_000:401_000]
        assert os.fstat(reader.fileno()).st_nlink == 0
    assert (saved(place, mnt, tmp_path / "stored") / "f").read_bytes() == b"new"


def test_unlinked_while_open(place: Place, mnt: Path, tmp_path: Path) -> None:
    path = mnt / "f"
    path.write_bytes(b"first")
    place.pull(mnt, tmp_path / "before")
    with opened(path, os.O_RDWR) as fd:
        path.unlink()
        refused(errno.ENOENT, os.stat, path)
        assert os.fstat(fd).st_nlink == 0
        os.pwrite(fd, b"more", 5)
        os.fsync(fd)
        assert os.pread(fd, 100, 0) == b"firstmore"
        path.write_bytes(b"another file")
        os.ftruncate(fd, 3)
        os.fchmod(fd, 0o600)
        assert os.pread(fd, 100, 0) == b"fir"
    assert path.read_bytes() == b"another file"
    assert path.stat().st_mode & 0o777 != 0o600
    assert (saved(place, mnt, tmp_path / "stored") / "f").read_bytes() == b"another file"


def test_unlinked_while_open_is_gone_from_the_store(place: Place, mnt: Path, tmp_path: Path) -> None:
    with opened(mnt / "f", os.O_RDWR | os.O_CREAT) as fd:
        os.write(fd, b"x" * 100_000)
        (mnt / "f").unlink()
        os.write(fd, b"y")
    assert list(place.pull(mnt, tmp_path / "stored").iterdir()) == []


def test_renamed_while_open_for_writing(place: Place, mnt: Path, tmp_path: Path) -> None:
    (mnt / "d").mkdir()
    with opened(mnt / "f", os.O_WRONLY | os.O_CREAT) as fd:
        os.write(fd, b"before ")
        (mnt / "f").rename(mnt / "d/g")
        os.write(fd, b"after")
        os.fsync(fd)
        (mnt / "d").rename(mnt / "e")
        os.write(fd, b" and later")
    stored = saved(place, mnt, tmp_path / "stored")
    assert (stored / "e/g").read_bytes() == b"before after and later"
    assert sorted(os.listdir(stored)) == ["e"]


def test_exclusive_create_is_won_once(mnt: Path) -> None:
    code = """if True:
        import os, sys
        won = 0
        for number in range(40):
            try:
                os.close(os.open(f"{sys.argv[1]}/{number}", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
                won += 1
            except FileExistsError:
                pass
        print(won)
    """
    assert sum(int(text) for text in together(code, *([mnt] for _ in range(4)))) == 40


def test_open_flags(mnt: Path) -> None:
    path = mnt / "f"
    path.write_bytes(b"content")
    refused(errno.EEXIST, os.open, path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    refused(errno.ENOENT, os.open, mnt / "missing", os.O_RDWR)
    refused(errno.ENOTDIR, os.open, path / "below", os.O_RDONLY)
    refused(errno.ENOTDIR, os.open, path, os.O_RDONLY | os.O_DIRECTORY)
    refused(errno.EISDIR, os.open, mnt, os.O_WRONLY)
    (mnt / "link").symlink_to("f")
    refused(errno.ELOOP, os.open, mnt / "link", os.O_RDONLY | os.O_NOFOLLOW)
    refused(errno.EEXIST, os.open, mnt / "link", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    with opened(path, os.O_RDONLY) as fd:
        refused(errno.EBADF, os.write, fd, b"x")
    with opened(path, os.O_WRONLY) as fd:
        refused(errno.EBADF, os.read, fd, 1)
    with opened(path, os.O_RDWR | os.O_TRUNC) as fd:
        assert os.fstat(fd).st_size == 0


def test_append_goes_to_the_end_whatever_was_sought(place: Place, mnt: Path, tmp_path: Path) -> None:
    (mnt / "f").write_bytes(b"12345")
    place.remount()
    with opened(mnt / "f", os.O_RDWR | os.O_APPEND) as fd:
        os.lseek(fd, 0, os.SEEK_SET)
        os.write(fd, b"67")
        with opened(mnt / "f", os.O_WRONLY | os.O_APPEND) as other:
            os.write(other, b"8")
        os.write(fd, b"9")
    assert (mnt / "f").read_bytes() == b"123456789"
    assert (saved(place, mnt, tmp_path / "stored") / "f").read_bytes() == b"123456789"


def test_writes_by_two_handles_are_seen_by_a_third(mnt: Path) -> None:
    with (
        opened(mnt / "f", os.O_RDWR | os.O_CREAT) as one,
        opened(mnt / "f", os.O_WRONLY) as two,
        opened(mnt / "f", os.O_RDONLY) as three,
    ):
        os.pwrite(one, b"aaaa", 0)
        os.pwrite(two, b"bb", 2)
        assert os.pread(three, 10, 0) == b"aabb"
        os.ftruncate(two, 1)
        assert os.pread(three, 10, 0) == b"a"
        assert os.fstat(one).st_size == 1
        assert (mnt / "f").stat().st_size == 1


def test_truncate_of_an_open_file_and_hole_behind_it(place: Place, mnt: Path, tmp_path: Path) -> None:
    with opened(mnt / "f", os.O_RDWR | os.O_CREAT) as fd:
        os.write(fd, b"x" * 100_000)
        os.fsync(fd)
        os.ftruncate(fd, 10)
        os.pwrite(fd, b"end", 200_000)
        assert os.pread(fd, 300_000, 0) == b"x" * 10 + bytes(199_990) + b"end"
        refused(errno.EINVAL, os.ftruncate, fd, -1)
    assert (saved(place, mnt, tmp_path / "stored") / "f").stat().st_size == 200_003


def test_holes(place: Place, mnt: Path, tmp_path: Path) -> None:
    path = mnt / "f"
    content = bytearray(1 << 20)
    content[400_000:410_000] = os.urandom(10_000)
    with opened(path, os.O_RDWR | os.O_CREAT) as fd:
        os.ftruncate(fd, len(content))
        os.pwrite(fd, content[400_000:410_000], 400_000)
        for _ in range(2):  # dirty, then stored
            in_ranges = bytearray(len(content))
            for start, end in data_ranges(fd):
                in_ranges[start:end] = os.pread(fd, end - start, start)
            assert in_ranges == content, "bytes outside of what SEEK_DATA names"
            refused(errno.ENXIO, os.lseek, fd, len(content), os.SEEK_DATA)
            refused(errno.ENXIO, os.lseek, fd, len(content), os.SEEK_HOLE)
            os.fsync(fd)
    assert (saved(place, mnt, tmp_path / "stored") / "f").read_bytes() == content


def test_no_hole_in_a_full_file(mnt: Path) -> None:
    (mnt / "f").write_bytes(b"x" * 100_000)
    with opened(mnt / "f", os.O_RDONLY) as fd:
        assert os.lseek(fd, 0, os.SEEK_DATA) == 0
        assert os.lseek(fd, 0, os.SEEK_HOLE) == 100_000
        assert os.lseek(fd, 50_000, os.SEEK_DATA) == 50_000


def test_posix_fallocate(place: Place, mnt: Path, tmp_path: Path) -> None:
    """The C library falls back to writing where the file system cannot allocate."""
    with opened(mnt / "f", os.O_RDWR | os.O_CREAT) as fd:
        os.write(fd, b"kept")
        os.posix_fallocate(fd, 0, 1 << 20)
        assert os.fstat(fd).st_size == 1 << 20
        assert os.pread(fd, 10, 0) == b"kept" + bytes(6)
    assert (saved(place, mnt, tmp_path / "stored") / "f").read_bytes() == b"kept" + bytes((1 << 20) - 4)


@pytest.mark.parametrize("how", [["-l", "1M"], ["-p", "-o", "0", "-l", "4096"], ["-z", "-o", "0", "-l", "4096"]])
def test_fallocate_program_works_or_says_not_supported(mnt: Path, how: list[str]) -> None:
    (mnt / "f").write_bytes(b"x" * 8192)
    done = subprocess.run(
        ["fallocate", *how, mnt / "f"], capture_output=True, text=True, timeout=30, env={"LC_ALL": "C"}
    )
    if done.returncode:
        assert re.search("not supported|unsupported", done.stderr)
        assert (mnt / "f").read_bytes() == b"x" * 8192
    else:
        assert (mnt / "f").read_bytes()[4096:8192] == b"x" * 4096


def test_large_offsets(mnt: Path) -> None:
    with opened(mnt / "f", os.O_RDWR | os.O_CREAT) as fd:
        os.pwrite(fd, b"far", 5 << 30)
        assert os.fstat(fd).st_size == (5 << 30) + 3
        assert os.pread(fd, 10, (5 << 30) - 2) == b"\0\0far"
        os.ftruncate(fd, 0)


def test_reads_at_and_past_the_end(place: Place, mnt: Path) -> None:
    (mnt / "f").write_bytes(b"x" * 5000)
    for _ in range(2):
        with opened(mnt / "f", os.O_RDONLY) as fd:
            assert os.pread(fd, 100, 4990) == b"x" * 10
            assert os.pread(fd, 100, 5000) == b""
            assert os.pread(fd, 100, 1 << 40) == b""
        place.remount()


def test_random_reads_and_writes_of_a_stored_file(place: Place, mnt: Path, tmp_path: Path) -> None:
    content = bytearray(os.urandom(1_500_000))
    (mnt / "f").write_bytes(content)
    for offset in range(7, len(content), 211_111):
        place.remount()
        with opened(mnt / "f", os.O_RDWR) as fd:
            assert os.pread(fd, 3000, offset) == content[offset : offset + 3000]
            content[offset : offset + 777] = os.urandom(777)
            os.pwrite(fd, content[offset : offset + 777], offset)
            assert os.pread(fd, 3000, offset - 7) == content[offset - 7 : offset + 2993]
    assert (saved(place, mnt, tmp_path / "stored") / "f").read_bytes() == content


def test_fsync_and_sync_programs(mnt: Path) -> None:
    (mnt / "f").write_bytes(b"x")
    subprocess.run(["sync", mnt / "f"], check=True, timeout=60)
    subprocess.run(["sync", "-f", mnt / "f"], check=True, timeout=60)
    with opened(mnt, os.O_RDONLY | os.O_DIRECTORY) as fd:
        os.fsync(fd)


def test_copy_file_range_and_sendfile(place: Place, mnt: Path, tmp_path: Path) -> None:
    content = os.urandom(300_000)
    (mnt / "from").write_bytes(content)
    with opened(mnt / "from", os.O_RDONLY) as source, opened(mnt / "to", os.O_RDWR | os.O_CREAT) as target:
        copied = 0
        while copied < len(content):
            copied += os.copy_file_range(source, target, len(content), copied, copied)
    with (
        opened(mnt / "from", os.O_RDONLY) as source,
        opened(mnt / "sent", os.O_WRONLY | os.O_CREAT) as target,
    ):
        sent = 0
        while sent < len(content):
            sent += os.sendfile(target, source, sent, len(content))
    stored = saved(place, mnt, tmp_path / "stored")
    assert (stored / "to").read_bytes() == (stored / "sent").read_bytes() == content

"""Modes, owners, times, special files, links, extended attributes, statfs."""

from __future__ import annotations

import errno
import os
import socket
import stat
import subprocess
from pathlib import Path

import pytest

from tests.mount.place import LOCAL_ROOT, Place, attempt, refused, saved
from tests.mount.trees import entry, tree

pytestmark = pytest.mark.fuse
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def test_modes_are_kept(place: Place, mnt: Path, tmp_path: Path) -> None:
    for mode in (0o644, 0o755, 0o400, 0o000, 0o777, 0o4755, 0o2755, 0o1777):
        (mnt / f"f{mode:o}").write_text("x")
        (mnt / f"f{mode:o}").chmod(mode)
        (mnt / f"d{mode:o}").mkdir()
        (mnt / f"d{mode:o}").chmod(mode)
    before = tree(mnt)
    assert {name: f"{e.mode & 0o7777:o}" for name, e in before.items()} == {name: name[1:] for name in before}
    place.remount()
    assert tree(mnt) == before
    saved(place, mnt, tmp_path / "stored")


def test_mode_of_new_files_follows_umask(mnt: Path) -> None:
    before = os.umask(0o027)
    try:
        os.close(os.open(mnt / "f", os.O_CREAT | os.O_WRONLY, 0o666))
        os.mkdir(mnt / "d", 0o777)
    finally:
        os.umask(before)
    assert [(mnt / name).stat().st_mode & 0o7777 for name in "fd"] == [0o640, 0o750]


def test_chmod_before_and_after_upload(place: Place, mnt: Path, tmp_path: Path) -> None:
    path = mnt / "f"
    path.write_text("content")
    path.chmod(0o600)
    assert (saved(place, mnt, tmp_path / "one") / "f").stat().st_mode & 0o7777 == 0o600
    path.chmod(0o711)
    stored = saved(place, mnt, tmp_path / "two") / "f"
    assert (stored.stat().st_mode & 0o7777, stored.read_text()) == (0o711, "content")


@needs_root
def test_owners_are_kept(place: Place, mnt: Path, tmp_path: Path) -> None:
    (mnt / "f").write_text("x")
    (mnt / "d").mkdir()
    (mnt / "d/below").write_text("x")
    (mnt / "l").symlink_to("f")
    for number, name in enumerate(("f", "d", "l")):
        os.chown(mnt / name, 1000 + number, 2000 + number, follow_symlinks=False)
    os.chown(mnt / "f", -1, 100)
    wanted = {"f": (1000, 100), "d": (1001, 2001), "l": (1002, 2002), "d/below": (0, 0)}
    for _ in range(2):
        assert {name: (e.uid, e.gid) for name, e in tree(mnt).items()} == wanted
        place.remount()
    saved(place, mnt, tmp_path / "stored")


@needs_root
def test_permissions_hold_for_other_users(mnt: Path) -> None:
    mnt.parent.chmod(0o755)
    mnt.chmod(0o755)
    for mode in (0o600, 0o644):
        (mnt / f"{mode:o}").write_text("secret")
        (mnt / f"{mode:o}").chmod(mode)

    def as_nobody(*argv: str) -> str:
        done = subprocess.run(
            argv,
            cwd=mnt,
            user=65534,
            group=65534,
            extra_groups=[],
            env={"LC_ALL": "C", "PATH": os.environ["PATH"]},
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.stdout + done.stderr

    assert as_nobody("cat", "644") == "secret"
    assert "Permission denied" in as_nobody("cat", "600")
    assert "Permission denied" in as_nobody("touch", "new")
    assert "Permission denied" in as_nobody("rm", "-f", "644")
    mnt.chmod(0o1777)
    assert as_nobody("touch", "own") == ""
    assert (mnt / "own").stat().st_uid == 65534
    assert "not permitted" in as_nobody("rm", "-f", "644")


def test_times_are_kept_to_the_nanosecond(place: Place, mnt: Path, tmp_path: Path) -> None:
    stamps = {
        "f": 1_234_567_890_123_456_789,
        "old": 1,
        "before": -1_500_000_000,
        "late": (1 << 32) * 10**9 + 7,
    }
    for name, stamp in stamps.items():
        (mnt / name).write_text("x")
        os.utime(mnt / name, ns=(stamp, stamp))
    (mnt / "d").mkdir()
    (mnt / "d/f").touch()
    os.utime(mnt / "d", ns=(stamps["f"], stamps["f"]))
    (mnt / "l").symlink_to("f")
    os.utime(mnt / "l", ns=(stamps["f"], stamps["f"]), follow_symlinks=False)
    wanted = {**stamps, "d": stamps["f"], "l": stamps["f"]}
    for _ in range(2):
        assert {name: os.lstat(mnt / name).st_mtime_ns for name in wanted} == wanted
        place.pull(mnt, tmp_path / f"stored{_}")
        place.remount()


def test_times_from_the_year_1_to_9999(place: Place, mnt: Path, tmp_path: Path) -> None:
    """Of some a file system keeps the nearest that it can; none is refused, none holds up what comes after it."""
    (mnt / "d").mkdir()
    for seconds in (-62_135_596_800, -11_644_473_600, 10_413_792_000, 99_999_999_999, 253_402_300_799):
        for path in (mnt / f"d/{seconds}", mnt / "d"):
            if path != mnt / "d":
                path.write_text("x")
            os.utime(path, (seconds, seconds))
    (mnt / "d").rename(mnt / "e")
    place.pull(mnt, tmp_path / "stored")
    found = []
    for _ in range(2):  # until then the kernel may show what it was told
        place.remount()
        found.append({name: entry.mtime_ns for name, entry in tree(mnt).items()})
    assert found[0] == found[1]
    assert len(found[0]) == 6
    assert found[0]["e/-62135596800"] < 0 < found[0]["e/10413792000"] <= found[0]["e/253402300799"]


def test_utime_of_a_file_that_is_open_and_written(place: Place, mnt: Path, tmp_path: Path) -> None:
    """As tar and cp -p do: the time that was set last wins over the writes before it."""
    stamp = 1_111_111_111_000_000_000
    with (mnt / "f").open("wb") as file:
        file.write(b"x" * 100_000)
        file.flush()
        os.utime(file.fileno(), ns=(stamp, stamp))
    assert (mnt / "f").stat().st_mtime_ns == stamp
    assert (saved(place, mnt, tmp_path / "stored") / "f").stat().st_mtime_ns == stamp


def test_write_after_utime_moves_the_time(mnt: Path) -> None:
    with (mnt / "f").open("wb", buffering=0) as file:
        os.utime(file.fileno(), ns=(0, 0))
        file.write(b"x")
    assert (mnt / "f").stat().st_mtime_ns > 0


def test_fifos_and_sockets_are_kept(place: Place, mnt: Path, tmp_path: Path) -> None:
    os.mkfifo(mnt / "fifo", 0o640)
    with socket.socket(socket.AF_UNIX) as listening:
        directory = os.open(mnt, os.O_RDONLY)
        try:
            listening.bind(f"/proc/self/fd/{directory}/socket")
        finally:
            os.close(directory)
    place.remount()
    assert stat.S_ISFIFO(os.lstat(mnt / "fifo").st_mode)
    assert stat.S_ISSOCK(os.lstat(mnt / "socket").st_mode)
    assert os.lstat(mnt / "fifo").st_mode & 0o7777 == 0o640
    saved(place, mnt, tmp_path / "stored")


def test_fifo_carries_bytes(mnt: Path) -> None:
    os.mkfifo(mnt / "fifo")
    with subprocess.Popen(["cat", mnt / "fifo"], stdout=subprocess.PIPE) as reader:
        try:
            subprocess.run(["sh", "-c", 'echo through > "$0"', mnt / "fifo"], timeout=30, check=True)
            assert reader.communicate(timeout=30)[0] == b"through\n"
        finally:
            reader.kill()


@needs_root
def test_device_nodes_are_kept(place: Place, mnt: Path, tmp_path: Path) -> None:
    os.mknod(mnt / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(mnt / "disk", stat.S_IFBLK | 0o600, os.makedev(7, 300))
    for _ in range(2):
        assert stat.S_ISCHR(os.lstat(mnt / "null").st_mode)
        assert stat.S_ISBLK(os.lstat(mnt / "disk").st_mode)
        assert os.lstat(mnt / "null").st_rdev == os.makedev(1, 3)
        assert os.lstat(mnt / "disk").st_rdev == os.makedev(7, 300)
        place.remount()
    saved(place, mnt, tmp_path / "stored")


def test_hard_link_works_or_is_refused(place: Place, mnt: Path, tmp_path: Path) -> None:
    (mnt / "f").write_text("x")
    reason = attempt(os.link, mnt / "f", mnt / "g")
    assert reason in ("", "EPERM", "EOPNOTSUPP")
    assert (mnt / "f").stat().st_nlink == (1 if reason else 2)
    assert (mnt / "g").exists() is not bool(reason)
    assert (mnt / "f").read_text() == "x"
    saved(place, mnt, tmp_path / "stored")


@pytest.mark.skipif(bool(LOCAL_ROOT), reason="a local disk has them")
def test_extended_attributes_are_off(mnt: Path) -> None:
    (mnt / "f").write_text("x")
    refused(errno.ENOTSUP, os.setxattr, mnt / "f", "user.a", b"1")
    refused(errno.ENOTSUP, os.getxattr, mnt / "f", "user.a")
    assert (mnt / "f").read_text() == "x"


def test_statfs(mnt: Path) -> None:
    found = os.statvfs(mnt)
    assert found.f_namemax == 255
    assert found.f_blocks * found.f_frsize > 1 << 20
    assert found.f_bavail <= found.f_bfree <= found.f_blocks
    assert subprocess.run(["df", mnt], capture_output=True, timeout=30, check=True).stdout.count(b"\n") == 2


def test_block_counts(mnt: Path) -> None:
    (mnt / "f").write_bytes(b"x" * 100_000)
    with (mnt / "f").open("rb") as file:
        os.fsync(file.fileno())
    found = (mnt / "f").stat()
    assert found.st_blocks * 512 >= 100_000
    assert found.st_blksize >= 512


@needs_root
def test_chown_of_the_root_of_the_mount(place: Place, tmp_path: Path) -> None:
    """The notebook start does this each time."""
    before = place.path.stat()
    os.chown(place.path, 1000, 100)
    place.remount()
    found = entry(os.fsencode(place.path), times=False)
    assert (found.uid, found.gid) == (1000, 100)
    os.chown(place.path, before.st_uid, before.st_gid)

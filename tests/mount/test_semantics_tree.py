"""Directories: rename, removal, link counts, times of parents, listings."""

from __future__ import annotations

import ctypes
import errno
import os
import time
from pathlib import Path

import pytest

from tests.mount.place import Place, attempt, refused, run, saved, script
from tests.mount.trees import tree

pytestmark = pytest.mark.fuse
LONG_AGO_NS = 1_000_000_000 * 10**9
AT_FDCWD, RENAME_NOREPLACE, RENAME_EXCHANGE = -100, 1, 2
LIBC = ctypes.CDLL(None, use_errno=True)


def renameat2(source: Path, target: Path, flags: int) -> None:
    if LIBC.renameat2(AT_FDCWD, os.fsencode(source), AT_FDCWD, os.fsencode(target), flags):
        raise OSError(ctypes.get_errno(), "renameat2")


def test_rename_over_a_folder_that_is_not_empty_is_refused(place: Place, mnt: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (mnt / name).mkdir()
        (mnt / name / name).write_text(name)
    before = tree(mnt)
    for _ in range(2):
        refused(errno.ENOTEMPTY, os.rename, mnt / "a", mnt / "b")
        assert tree(mnt) == before
        place.remount()
    assert tree(saved(place, mnt, tmp_path / "stored")) == before


def test_rename_between_kinds(place: Place, mnt: Path, tmp_path: Path) -> None:
    (mnt / "file").write_text("file")
    (mnt / "full/sub").mkdir(parents=True)
    (mnt / "full/f").write_text("f")
    (mnt / "empty").mkdir()
    refused(errno.ENOTDIR, os.rename, mnt / "full", mnt / "file")
    refused(errno.EISDIR, os.rename, mnt / "file", mnt / "empty")
    refused(errno.EINVAL, os.rename, mnt / "full", mnt / "full/sub/x")
    refused(errno.EINVAL, os.rename, mnt / "full", mnt / "full/sub")
    refused(errno.ENOTEMPTY, os.rename, mnt / "full/sub", mnt / "full")
    refused(errno.ENOENT, os.rename, mnt / "none", mnt / "x")
    refused(errno.ENOENT, os.rename, mnt / "file", mnt / "none/x")
    refused(errno.ENOTDIR, os.rename, mnt / "file", mnt / "file/x")
    os.rename(mnt / "file", mnt / "file")
    os.rename(mnt / "full", mnt / "empty")
    assert sorted(tree(saved(place, mnt, tmp_path / "stored"))) == ["empty", "empty/f", "empty/sub", "file"]


def test_rename_of_a_folder_with_a_thousand_files(place: Place, mnt: Path, tmp_path: Path) -> None:
    for number in range(1000):
        folder = mnt / f"old/{number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"f{number}").write_text(str(number))
    place.pull(mnt, tmp_path / "first")
    (mnt / "old/0/unsaved").write_text("not uploaded yet")
    before = tree(mnt / "old")
    (mnt / "old").rename(mnt / "new")
    refused(errno.ENOENT, os.stat, mnt / "old")
    (mnt / "old").mkdir()  # the name is free at once
    (mnt / "old/f").write_text("another")
    assert tree(mnt / "new") == before
    assert tree(saved(place, mnt, tmp_path / "stored") / "new") == before
    place.remount()
    assert tree(mnt / "new") == before
    assert list(tree(mnt / "old")) == ["f"]


def test_folders_renamed_back_and_forth(place: Place, mnt: Path, tmp_path: Path) -> None:
    (mnt / "a/b/c").mkdir(parents=True)
    (mnt / "a/b/f").write_text("f")
    for _ in range(5):
        (mnt / "a/b").rename(mnt / "x")
        (mnt / "a").rename(mnt / "y")
        (mnt / "x").rename(mnt / "y/b")
        (mnt / "y").rename(mnt / "a")
    assert sorted(tree(saved(place, mnt, tmp_path / "stored"))) == ["a", "a/b", "a/b/c", "a/b/f"]


def test_swapped_by_three_renames(place: Place, mnt: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (mnt / name).mkdir()
        (mnt / name / "f").write_text(name)
    place.pull(mnt, tmp_path / "first")
    for source, target in (("a", "t"), ("b", "a"), ("t", "b")):
        (mnt / source).rename(mnt / target)
    stored = saved(place, mnt, tmp_path / "stored")
    assert ((stored / "a/f").read_text(), (stored / "b/f").read_text()) == ("b", "a")


def test_rename_noreplace(mnt: Path) -> None:
    (mnt / "a").write_text("a")
    (mnt / "b").write_text("b")
    with pytest.raises(FileExistsError):
        renameat2(mnt / "a", mnt / "b", RENAME_NOREPLACE)
    renameat2(mnt / "a", mnt / "c", RENAME_NOREPLACE)
    assert {path.name: path.read_text() for path in mnt.iterdir()} == {"b": "b", "c": "a"}


def test_rename_exchange_works_or_is_refused(place: Place, mnt: Path, tmp_path: Path) -> None:
    (mnt / "a").write_text("a")
    (mnt / "b").mkdir()
    (mnt / "b/f").write_text("f")
    before = tree(mnt)
    if reason := attempt(renameat2, mnt / "a", mnt / "b", RENAME_EXCHANGE):
        assert reason == "EINVAL"
        assert tree(mnt) == before
    else:
        assert (mnt / "b").read_text() == "a"
        assert (mnt / "a/f").read_text() == "f"
    saved(place, mnt, tmp_path / "stored")


def test_empty_folders_are_kept(place: Place, mnt: Path, tmp_path: Path) -> None:
    (mnt / "a/b/c").mkdir(parents=True)
    (mnt / "emptied").mkdir()
    (mnt / "emptied/f").write_text("x")
    place.remount()
    (mnt / "emptied/f").unlink()
    place.remount()
    (mnt / "a/b/c").rmdir()
    assert sorted(tree(saved(place, mnt, tmp_path / "stored"))) == ["a", "a/b", "emptied"]
    place.remount()
    assert sorted(tree(mnt)) == ["a", "a/b", "emptied"]


def test_removal_errors(mnt: Path) -> None:
    (mnt / "d/sub").mkdir(parents=True)
    (mnt / "f").write_text("x")
    refused(errno.ENOTEMPTY, os.rmdir, mnt / "d")
    refused(errno.ENOTDIR, os.rmdir, mnt / "f")
    refused(errno.EISDIR, os.unlink, mnt / "d")
    refused(errno.ENOENT, os.rmdir, mnt / "none")
    refused(errno.ENOENT, os.unlink, mnt / "none")
    refused(errno.EEXIST, os.mkdir, mnt / "f")
    refused(errno.EEXIST, os.mkdir, mnt / "d")
    refused(errno.ENOENT, os.mkdir, mnt / "none/x")
    refused(errno.EINVAL, os.rmdir, f"{mnt}/d/sub/.")
    os.rmdir(mnt / "d/sub")
    os.rmdir(mnt / "d")


def test_rm_of_a_tree(place: Place, mnt: Path, tmp_path: Path) -> None:
    for number in range(300):
        folder = mnt / f"d/{number % 7}/{number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"f{number}").write_text("x")
    place.pull(mnt, tmp_path / "first")
    (mnt / "d/1/more").write_text("x")
    run("rm", "-r", mnt / "d")
    assert os.listdir(mnt) == []
    assert os.listdir(saved(place, mnt, tmp_path / "stored")) == []


def test_removal_while_listing(mnt: Path) -> None:
    for number in range(500):
        (mnt / f"f{number}").touch()
    seen = []
    with os.scandir(mnt) as found:
        for item in found:
            seen.append(item.name)
            os.unlink(item.path)
    assert len(seen) == len(set(seen)) == 500
    assert os.listdir(mnt) == []


def test_link_counts(place: Place, mnt: Path) -> None:
    (mnt / "f").touch()
    assert mnt.stat().st_nlink == 2
    for name in ("a", "b", "a/c"):
        (mnt / name).mkdir()
    for _ in range(2):
        list(os.walk(mnt))  # the subdirectories of one that was not listed are not counted, its link count is 1
        assert mnt.stat().st_nlink == 4
        assert (mnt / "a").stat().st_nlink == 3
        assert (mnt / "f").stat().st_nlink == 1
        place.remount()
    list(os.walk(mnt))
    (mnt / "a/c").rename(mnt / "c")
    assert (mnt.stat().st_nlink, (mnt / "a").stat().st_nlink) == (5, 2)
    (mnt / "c").rename(mnt / "b")
    (mnt / "a").rmdir()
    assert mnt.stat().st_nlink == 3


def test_times_of_parents(mnt: Path) -> None:
    (mnt / "other").mkdir()
    (mnt / "f").touch()
    steps = {
        "create": lambda: (mnt / "new").touch(),
        "rename": lambda: (mnt / "new").rename(mnt / "newer"),
        "rename away": lambda: (mnt / "newer").rename(mnt / "other/newer"),
        "rename in": lambda: (mnt / "other/newer").rename(mnt / "newer"),
        "rename over": lambda: (mnt / "newer").rename(mnt / "f"),
        "unlink": lambda: (mnt / "f").unlink(),
        "mkdir": lambda: (mnt / "d").mkdir(),
        "rmdir": lambda: (mnt / "d").rmdir(),
        "symlink": lambda: (mnt / "link").symlink_to("x"),
        "mkfifo": lambda: os.mkfifo(mnt / "fifo"),
    }
    for name, step in steps.items():
        os.utime(mnt, ns=(LONG_AGO_NS, LONG_AGO_NS))
        before = mnt.stat()
        assert before.st_mtime_ns == LONG_AGO_NS
        time.sleep(0.01)  # a tick of the kernel's coarse clock
        step()
        after = mnt.stat()
        assert after.st_mtime_ns > LONG_AGO_NS, name
        assert after.st_ctime_ns > before.st_ctime_ns, name


def test_times_of_files(mnt: Path) -> None:
    path = mnt / "f"
    path.write_text("x")
    steps = {
        "write": (lambda: path.write_text("yy"), True),
        "truncate": (lambda: os.truncate(path, 1), True),
        "truncate to the same size by open": (
            lambda: os.close(os.open(path, os.O_WRONLY | os.O_TRUNC)),
            True,
        ),
        "chmod": (lambda: path.chmod(0o600), False),
        "chown": (lambda: os.chown(path, os.getuid(), os.getgid()), False),
        "rename": (lambda: path.rename(mnt / "g").rename(path), False),
    }
    for name, (step, changes_mtime) in steps.items():
        os.utime(path, ns=(LONG_AGO_NS, LONG_AGO_NS))
        before = path.stat()
        time.sleep(0.01)
        step()
        after = path.stat()
        assert (after.st_mtime_ns > LONG_AGO_NS) is changes_mtime, name
        if name != "rename":  # POSIX leaves it open
            assert after.st_ctime_ns > before.st_ctime_ns, name
    before = path.stat()
    path.read_text()
    assert path.stat().st_mtime_ns == before.st_mtime_ns


def test_inode_numbers_are_stable_and_distinct(mnt: Path) -> None:
    for name in ("a", "b"):
        (mnt / name).write_text(name)
    (mnt / "d").mkdir()
    before = {name: (mnt / name).stat().st_ino for name in os.listdir(mnt)}
    assert len(set(before.values())) == 3
    (mnt / "a").write_text("changed")
    (mnt / "b").rename(mnt / "c")
    assert (mnt / "a").stat().st_ino == before["a"]
    assert (mnt / "c").stat().st_ino == before["b"]
    listed = {item.name: item.inode() for item in os.scandir(mnt)}
    assert listed == {item.name: item.stat().st_ino for item in os.scandir(mnt)}


def test_listing_has_types(mnt: Path) -> None:
    (mnt / "d").mkdir()
    (mnt / "f").touch()
    (mnt / "l").symlink_to("d")
    kinds = {item.name: (item.is_dir(follow_symlinks=False), item.is_symlink()) for item in os.scandir(mnt)}
    assert kinds == {"d": (True, False), "f": (False, False), "l": (False, True)}
    assert run("ls", "-A", mnt).split() == ["d", "f", "l"]
    assert os.stat(mnt / "d/..").st_ino == mnt.stat().st_ino


def test_calls_relative_to_an_open_folder(place: Place, mnt: Path, tmp_path: Path) -> None:
    (mnt / "d").mkdir()
    fd = os.open(mnt / "d", os.O_RDONLY)
    try:
        (mnt / "d").rename(mnt / "e")
        os.close(os.open("f", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
        os.mkdir("sub", dir_fd=fd)
        os.rename("f", "sub/g", src_dir_fd=fd, dst_dir_fd=fd)
        assert os.listdir(fd) == ["sub"]
    finally:
        os.close(fd)
    assert sorted(tree(saved(place, mnt, tmp_path / "stored"))) == ["e", "e/sub", "e/sub/g"]


def test_removed_working_directory(mnt: Path) -> None:
    code = """if True:
        import os, sys
        os.chdir(sys.argv[1])
        os.rmdir(sys.argv[1])
        assert os.listdir(".") == []
        for call in (lambda: open("f", "w"), lambda: os.mkdir("d"), lambda: os.stat("../" + sys.argv[1][-1])):
            try:
                call()
            except FileNotFoundError:
                continue
            raise SystemExit("was not refused")
    """
    (mnt / "d").mkdir()
    script(code, mnt / "d")


def test_find_and_du(mnt: Path) -> None:
    for number in range(30):
        (mnt / f"d{number % 5}").mkdir(exist_ok=True)
        (mnt / f"d{number % 5}/f{number}").write_bytes(b"x" * 1000)
    assert len(run("find", mnt, "-type", "f").splitlines()) == 30
    assert len(run("find", mnt, "-mindepth", "1", "-type", "d", "-links", "2").splitlines()) == 5
    assert int(run("du", "-s", "-B1", mnt).split()[0]) >= 30_000

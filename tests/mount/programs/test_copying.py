"""Programs that copy whole trees and change files in place; what they leave is checked through the S3 API."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.mount.place import Place, run, saved
from tests.mount.trees import tree

pytestmark = pytest.mark.fuse
OLD_NS = 1_234_567_890_123_456_789


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A local tree with all that a copy can lose: modes, owners, times, links, empty folders, odd names."""
    root = tmp_path_factory.mktemp("sample")
    for folder in ("bin", "docs/deep/er", "empty", "private"):
        (root / folder).mkdir(parents=True)
    contents = {
        "bin/tool": b"#!/bin/sh\necho works\n",
        "docs/big": os.urandom(3_000_001),
        "docs/deep/er/nothing": b"",
        "docs/été — 文書.txt": "é".encode(),
        "docs/name with  spaces & 100%": b"x",
        "private/key": b"secret\n",
    }
    for name, data in contents.items():
        (root / name).write_bytes(data)
    (root / "bin/tool").chmod(0o755)
    (root / "docs/big").chmod(0o444)
    (root / "private/key").chmod(0o600)
    (root / "docs/link").symlink_to("deep/er/nothing")
    (root / "docs/dangling").symlink_to("/not/there")
    (root / "docs/up").symlink_to("..")
    if os.geteuid() == 0:
        os.chown(root / "private", 1234, 4321)
        os.chown(root / "private/key", 1234, 4321)
        os.chown(root / "docs/link", 1234, 4321, follow_symlinks=False)
    (root / "private").chmod(0o2750)
    for number, path in enumerate(sorted(root.rglob("*"), reverse=True)):
        os.utime(path, ns=(OLD_NS, OLD_NS + number * 1_000_000_001), follow_symlinks=False)
    return root


def test_cp(place: Place, mnt: Path, sample: Path, tmp_path: Path) -> None:
    run("cp", "-a", sample, mnt / "copy")
    assert tree(mnt / "copy") == tree(sample)
    assert tree(saved(place, mnt, tmp_path / "stored") / "copy") == tree(sample)


def test_cp_within_the_mount_and_back(place: Place, mnt: Path, sample: Path, tmp_path: Path) -> None:
    run("cp", "-a", sample, mnt / "a")
    run("cp", "-a", mnt / "a", mnt / "b")
    run("cp", "-a", mnt / "b", tmp_path / "back")
    assert tree(tmp_path / "back") == tree(sample)
    assert tree(saved(place, mnt, tmp_path / "stored") / "b") == tree(sample)


def test_mv_from_another_file_system(place: Place, mnt: Path, sample: Path, tmp_path: Path) -> None:
    run("cp", "-a", sample, tmp_path / "moving")
    run("mv", tmp_path / "moving", mnt / "moved")
    assert tree(saved(place, mnt, tmp_path / "stored") / "moved") == tree(sample)


def test_rsync_transfers_nothing_the_second_time(place: Place, mnt: Path, sample: Path, tmp_path: Path) -> None:
    def rsync() -> str:
        return run("rsync", "-a", "--itemize-changes", f"{sample}/", f"{mnt}/copy/")

    assert "docs/big" in rsync()
    assert rsync() == ""
    place.remount()
    assert rsync() == ""
    assert tree(saved(place, mnt, tmp_path / "stored") / "copy") == tree(sample)


def test_rsync_checksum_and_delete(place: Place, mnt: Path, sample: Path, tmp_path: Path) -> None:
    run("rsync", "-a", f"{sample}/", f"{mnt}/copy/")
    (mnt / "copy/docs/more").write_bytes(b"not in the source")
    (mnt / "copy/docs/big").unlink()
    run("rsync", "-a", "--checksum", "--delete", "--inplace", f"{sample}/", f"{mnt}/copy/")
    assert tree(saved(place, mnt, tmp_path / "stored") / "copy") == tree(sample)


def test_tar(place: Place, mnt: Path, sample: Path, tmp_path: Path) -> None:
    run("tar", "-C", sample, "--numeric-owner", "-cf", mnt / "sample.tar", ".")
    (mnt / "out").mkdir()
    run(
        "tar",
        "-C",
        mnt / "out",
        "--numeric-owner",
        "--same-owner",
        "-xpf",
        mnt / "sample.tar",
        "--no-overwrite-dir",
    )
    assert run("tar", "-C", mnt / "out", "--numeric-owner", "-df", mnt / "sample.tar", "--exclude=.") == ""
    names = tree(sample).keys()
    kept = {name: entry for name, entry in tree(mnt / "out").items() if name in names}
    # tar's default format keeps whole seconds only
    assert {n: e.mtime_ns // 10**9 for n, e in kept.items()} == {
        n: e.mtime_ns // 10**9 for n, e in tree(sample).items()
    }
    assert tree(mnt / "out", times=False) == tree(sample, times=False)
    saved(place, mnt, tmp_path / "stored")


def test_dd_in_place(place: Place, mnt: Path, tmp_path: Path) -> None:
    file = mnt / "disk.img"
    before = os.urandom(1 << 20)
    file.write_bytes(before)
    place.pull(mnt, tmp_path / "first")  # so that the change is one of a stored object
    run("dd", "if=/dev/zero", f"of={file}", "bs=4096", "seek=5", "count=3", "conv=notrunc")
    run("dd", "if=/dev/zero", f"of={file}", "bs=1", "seek=100", "count=7", "conv=notrunc,fsync")
    wanted = bytearray(before)
    wanted[5 * 4096 : 8 * 4096] = bytes(3 * 4096)
    wanted[100:107] = bytes(7)
    assert file.read_bytes() == wanted
    assert (saved(place, mnt, tmp_path / "stored") / "disk.img").read_bytes() == wanted


def test_dd_seek_truncates_without_notrunc(place: Place, mnt: Path, tmp_path: Path) -> None:
    file = mnt / "f"
    file.write_bytes(b"x" * 10_000)
    run("dd", "if=/dev/zero", f"of={file}", "bs=1000", "seek=2", "count=1")
    assert file.read_bytes() == b"x" * 2000 + bytes(1000)
    saved(place, mnt, tmp_path / "stored")


def test_truncate(place: Place, mnt: Path, tmp_path: Path) -> None:
    data = os.urandom(300_000)
    for name in ("shrunk", "grown", "emptied", "both"):
        (mnt / name).write_bytes(data)
    place.pull(mnt, tmp_path / "first")
    run("truncate", "-s", "100001", mnt / "shrunk")
    run("truncate", "-s", "400000", mnt / "grown")
    run("truncate", "-s", "0", mnt / "emptied")
    run("truncate", "-s", "10", mnt / "both")
    run("truncate", "-s", "300000", mnt / "both")
    run("truncate", "-s", "5M", mnt / "new")
    stored = saved(place, mnt, tmp_path / "stored")
    assert (stored / "shrunk").read_bytes() == data[:100_001]
    assert (stored / "grown").read_bytes() == data + bytes(100_000)
    assert (stored / "emptied").read_bytes() == b""
    assert (stored / "both").read_bytes() == data[:10] + bytes(299_990), "old bytes came back"
    assert (stored / "new").read_bytes() == bytes(5 << 20)


def test_sparse_copy(place: Place, mnt: Path, tmp_path: Path) -> None:
    source = tmp_path / "sparse"
    with source.open("wb") as file:
        file.truncate(2 << 20)
        file.seek(1 << 20)
        file.write(b"in the middle")
    run("cp", "--sparse=always", source, mnt / "copy")
    run("cp", "--sparse=always", mnt / "copy", mnt / "again")
    stored = saved(place, mnt, tmp_path / "stored")
    assert (stored / "again").read_bytes() == source.read_bytes()


def test_sed_and_install(place: Place, mnt: Path, tmp_path: Path) -> None:
    (mnt / "conf").write_text("a=1\nb=2\n")
    (mnt / "conf").chmod(0o640)
    run("sed", "-i.bak", "s/b=2/b=3/", mnt / "conf")
    run("install", "-m", "0711", "-D", mnt / "conf", mnt / "etc/app/conf")
    stored = saved(place, mnt, tmp_path / "stored")
    assert (stored / "conf").read_text() == (stored / "etc/app/conf").read_text() == "a=1\nb=3\n"
    assert (stored / "conf.bak").read_text() == "a=1\nb=2\n"
    assert (stored / "conf").stat().st_mode & 0o7777 == 0o640
    assert (stored / "etc/app/conf").stat().st_mode & 0o7777 == 0o711

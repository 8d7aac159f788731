"""Which mount a path lies in, by the table of mounts alone."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from phfs_fuse.errors import MountpointError
from phfs_fuse.host.mount_table import covering, locate, mount_table, probe, require_free

TABLE = r"""
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 22 0:50 / /mnt/with\040space rw,nosuid - fuse.phfs s3://b/p\040q/ rw
31 22 0:51 / /mnt/top rw - tmpfs tmpfs rw
32 31 0:52 / /mnt/top rw shared:2 master:1 - fuse.phfs phfs rw
33 32 0:53 / /mnt/top/inner rw - ext4 /dev/sdb1 rw
""".strip()


def test_the_table_knows_the_top_mount_of_each_place() -> None:
    table = mount_table(TABLE)
    assert table.keys() == {"/", "/mnt/with space", "/mnt/top", "/mnt/top/inner"}
    assert (table["/mnt/with space"].source, table["/mnt/with space"].kind) == ("s3://b/p q/", "fuse.phfs")
    assert table["/mnt/top"].kind == "fuse.phfs"


@pytest.mark.parametrize(
    ("path", "mountpoint"),
    [
        ("/mnt/top", "/mnt/top"),
        ("/mnt/top/a/b", "/mnt/top"),
        ("/mnt/topper", None),
        ("/mnt", None),
        ("/mnt/top/inner/a", None),
        ("/mnt/with space/a", "/mnt/with space"),
    ],
)
def test_the_fuse_mount_that_covers_a_path(path: str, mountpoint: str | None) -> None:
    entry = covering(path, mount_table(TABLE))
    assert (entry and entry.mountpoint) == mountpoint


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("link/a", "{0}/mount/a"),
        ("./mount//a/.", "{0}/mount/a"),
        ("mount/a/../b", "{0}/mount/b"),
        ("mount/../mount", "{0}/mount"),
        ("link/../x", "{0}/x"),
        ("deep/up/a", "{0}/mount/a"),
        ("absent/a", "{0}/absent/a"),
    ],
)
def test_symlinks_are_followed_up_to_the_mount(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, place: str
) -> None:
    mount = tmp_path / "mount"
    (tmp_path / "deep").mkdir()
    mount.mkdir()
    (mount / "a").symlink_to("/elsewhere")  # inside a FUSE mount nothing is asked for
    (tmp_path / "link").symlink_to(mount)
    (tmp_path / "deep/up").symlink_to("../link")
    monkeypatch.chdir(tmp_path)
    table = mount_table(f"1 0 0:1 / {mount} rw - fuse.phfs s rw")
    found, entry = locate(path, table)
    assert found == place.format(tmp_path)
    assert (entry is not None) == found.startswith(str(mount))


def test_a_loop_of_symlinks(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(MountpointError, match="too many symbolic links"):
        locate(str(tmp_path / "loop/x"), {})


def test_the_answer_of_stat_comes_from_another_process(tmp_path: Path) -> None:
    assert probe(str(tmp_path)) == 0
    assert probe(str(tmp_path / "absent")) == errno.ENOENT


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        (errno.ENOTCONN, "a dead mount is left here; phfs umount"),
        (0, "s is mounted here"),
        (None, "s is mounted here"),
    ],
)
def test_a_mount_point_that_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: int | None, line: str
) -> None:
    monkeypatch.setattr("phfs_fuse.host.mount_table.probe", lambda path: answer)
    with pytest.raises(MountpointError, match=line):
        require_free(tmp_path, mount_table(f"1 0 0:1 / {tmp_path} rw - fuse.phfs s rw"))


def test_the_real_table_has_the_root() -> None:
    assert "/" in mount_table()
    assert os.path.isabs(next(iter(mount_table())))

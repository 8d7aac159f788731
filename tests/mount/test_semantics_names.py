"""Names: what a file may be called, and that the same name comes back."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tests.mount.place import Place, refused, saved

pytestmark = pytest.mark.fuse

ODD = [
    b" leading and trailing ",
    b"-rf",
    b".hidden",
    b"..twodots",
    b"trailing.",
    b"50%41+plus&amp;#hash?query=1",
    b"back\\slash",
    b"quote'\"`$(x)",
    b"colon:semi;comma,",
    b"star*[a-z]{b}|<>^~!@",
    "日本語 emoji 🦊 ﷽".encode(),
    "quote ‛FF ‛‛ ‛".encode(),  # noqa: RUF001  the mark that escapes bytes in keys
    b"README",
    b"readme",
    b"tab\tin it",
    b"x.rclonelink.not",
]
NOT_UTF8 = [b"\xff\xfe", b"caf\xe9", b"ok-\xc3\xa9-then-\xc3", b"\xed\xa0\x80"]
CONTROLS = [b"new\nline", b"\x01\x02", b"del\x7f", b"cr\r"]


def fill(folder: Path, names: list[bytes]) -> None:
    for number, name in enumerate(names):
        with open(os.path.join(os.fsencode(folder), name), "xb") as file:
            file.write(b"%d" % number)


def check(folder: Path, names: list[bytes]) -> None:
    assert sorted(os.listdir(os.fsencode(folder))) == sorted(names)
    for number, name in enumerate(names):
        with open(os.path.join(os.fsencode(folder), name), "rb") as file:
            assert file.read() == b"%d" % number


@pytest.mark.parametrize("names", [ODD, NOT_UTF8, CONTROLS], ids=["odd", "not-utf8", "controls"])
def test_names_come_back(place: Place, mnt: Path, tmp_path: Path, names: list[bytes]) -> None:
    fill(mnt, names)
    check(mnt, names)
    check(saved(place, mnt, tmp_path / "stored"), names)
    place.remount()
    check(mnt, names)


@pytest.mark.parametrize("names", [ODD, NOT_UTF8, CONTROLS], ids=["odd", "not-utf8", "controls"])
def test_folders_and_links_with_such_names(place: Place, mnt: Path, tmp_path: Path, names: list[bytes]) -> None:
    for name in names:
        folder = os.path.join(os.fsencode(mnt), name)
        os.mkdir(folder)
        os.symlink(name, os.path.join(folder, b"link"))
    saved(place, mnt, tmp_path / "stored")
    place.remount()
    assert sorted(os.listdir(os.fsencode(mnt))) == sorted(names)
    for name in names:
        assert os.readlink(os.path.join(os.fsencode(mnt), name, b"link")) == name


def test_composed_and_decomposed_are_two_names(place: Place, mnt: Path, tmp_path: Path) -> None:
    composed, decomposed = "\u00e9", "e\u0301"
    (mnt / composed).write_text("composed")
    refused(errno.ENOENT, os.stat, mnt / decomposed)
    (mnt / decomposed).write_text("decomposed")
    place.remount()
    assert sorted(os.listdir(mnt)) == sorted([composed, decomposed])
    assert ((mnt / composed).read_text(), (mnt / decomposed).read_text()) == ("composed", "decomposed")
    (mnt / composed).unlink()
    assert os.listdir(saved(place, mnt, tmp_path / "stored")) == [decomposed]


def test_255_bytes_and_no_more(place: Place, mnt: Path, tmp_path: Path) -> None:
    names = [b"a" * 255, "é".encode() * 127 + b"x", b"b" * 254]
    fill(mnt, names)
    (mnt / ("d" * 246)).mkdir()  # MinIO takes no longer name for a directory's marker
    (mnt / ("d" * 246)).rmdir()
    place.remount()
    check(mnt, names)
    saved(place, mnt, tmp_path / "stored")
    for long in ("a" * 256, "é" * 128):
        refused(errno.ENAMETOOLONG, os.stat, mnt / long)
        refused(errno.ENAMETOOLONG, os.open, mnt / long, os.O_CREAT | os.O_WRONLY)
        refused(errno.ENAMETOOLONG, os.mkdir, mnt / long)
        refused(errno.ENAMETOOLONG, os.symlink, "x", mnt / long)
        refused(errno.ENAMETOOLONG, os.rename, os.fsencode(mnt) + b"/" + names[0], mnt / long)


def test_link_targets_are_kept_as_they_are(place: Place, mnt: Path, tmp_path: Path) -> None:
    targets = [b"x", b"../../up//and/./down/", b"/absolute", b" ", b"\xff\n", b"t" * 1000, b"t" * 4095]
    for number, target in enumerate(targets):
        os.symlink(target, os.fsencode(mnt / str(number)))
    saved(place, mnt, tmp_path / "stored")
    place.remount()
    for number, target in enumerate(targets):
        assert os.readlink(os.fsencode(mnt / str(number))) == target
        assert os.lstat(mnt / str(number)).st_size == len(target)
    refused(errno.ENAMETOOLONG, os.symlink, b"t" * 4096, os.fsencode(mnt / "long"))
    refused(errno.EEXIST, os.symlink, b"y", os.fsencode(mnt / "0"))
    refused(errno.EINVAL, os.readlink, mnt)

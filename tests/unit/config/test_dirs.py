"""Directories for their owner alone."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from phfs_fuse.config.dirs import make_private
from phfs_fuse.errors import LocalStateError
from phfs_fuse.host.locks import StateLock


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o7777


@pytest.fixture(params=[0o000, 0o022, 0o277, 0o777])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_they_are_made_0700_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    make_private(tmp_path / "a" / "b")
    make_private(tmp_path / "a" / "b")
    assert [mode(tmp_path / "a"), mode(tmp_path / "a" / "b")] == [0o700, 0o700]


@pytest.mark.parametrize("bits", [0o755, 0o770, 0o777, 0o707])
def test_one_of_ours_is_narrowed_with_a_line_in_the_log(
    tmp_path: Path, bits: int, caplog: pytest.LogCaptureFixture
) -> None:
    (found := tmp_path / "a").mkdir()
    found.chmod(bits)
    caplog.set_level(logging.INFO)
    make_private(found)
    make_private(found)
    assert mode(found) == 0o700
    (record,) = caplog.records
    assert (record.levelno, str(found) in record.getMessage()) == (logging.INFO, True)


def test_a_link_is_refused(tmp_path: Path) -> None:
    (real := tmp_path / "real").mkdir(0o755)
    (tmp_path / "link").symlink_to(real)
    with pytest.raises(PermissionError, match="link"):
        make_private(tmp_path / "link")
    assert mode(real) == 0o755


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives directories away")
def test_another_owner_is_refused(tmp_path: Path) -> None:
    (found := tmp_path / "a").mkdir(0o700)
    os.chown(found, 12345, -1)
    with pytest.raises(PermissionError, match="12345"):
        make_private(found)


@pytest.mark.parametrize(("bits", "is_refused"), [(0o777, True), (0o1777, False), (0o775, False), (0o755, False)])
def test_a_parent_that_all_may_write(tmp_path: Path, bits: int, is_refused: bool) -> None:
    (parent := tmp_path / "p").mkdir()
    parent.chmod(bits)
    if is_refused:
        with pytest.raises(PermissionError, match="all users may write"):
            make_private(parent / "a")
    else:
        make_private(parent / "a")


def test_a_mount_says_why(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(LocalStateError, match="link"):
        StateLock(tmp_path / "link", "")

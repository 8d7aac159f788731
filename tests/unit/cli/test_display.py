"""The tables of the commands: whatever a name holds, nothing steers the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from phfs_fuse.cli import display, program
from phfs_fuse.host.registry import MountRecord
from phfs_fuse.host.saved_files import Entry
from phfs_fuse.launch import client

EVIL = "a\nb\x1b]0;t\x07[red]\x9b2J\udcff"


def printed(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines; none steers a terminal."""
    out, err = capsys.readouterr()
    lines = (out + err).splitlines()
    assert all(line.isprintable() for line in lines)
    assert any(r"a\nb\x1b]0;t\x07[red]\x9b2J\udcff" in line for line in lines)
    return lines


def test_conflicts(capsys: pytest.CaptureFixture[str]) -> None:
    record = MountRecord(mountpoint="/m", control_socket="/s", keeper_pid=0, url="s3://b/")
    one: Any = client.Conflict(record=record, path=EVIL, kept_as=EVIL, at=0, outside=False)
    display.conflicts([one])
    assert len(printed(capsys)) == 2


def test_saved(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    data = tmp_path / "x.data"
    data.touch()
    display.saved([Entry("x", data, 0, {"path": EVIL, "reason": EVIL, "at": 0})])
    assert len(printed(capsys)) == 2


def test_status(capsys: pytest.CaptureFixture[str]) -> None:
    quota = {"path": EVIL, "counted": True, "refused": 0, "used": 0, "limit": 0, "free": 0}
    answer: dict[str, Any] = {
        "mountpoint": "/m" + EVIL, "url": "s3://b/" + EVIL, "state": EVIL,
        "errors": [{"path": EVIL, "reason": EVIL, "count": 1}], "quotas": [quota], "refused": [{"line": EVIL}],
        "left_uploads": {"kept": [{"key": EVIL, "upload_id": EVIL, "begun": 0}]},
    }  # fmt: skip
    display.mounts([answer])
    assert len(printed(capsys)) == 6


def test_an_error_of_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    program.say(EVIL)
    assert len(printed(capsys)) == 1

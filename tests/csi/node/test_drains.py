"""The uploads of what volumes have left: whatever stands against one, it is tried again."""

from __future__ import annotations

import subprocess
import threading
from pathlib import Path
from typing import Any, NoReturn

import pytest

from phfs_csi.errors import FailedPrecondition
from phfs_csi.node import drains
from phfs_csi.node.drains import Drains
from phfs_csi.node.records import Records, VolumeRecord
from phfs_fuse.errors import LocalStateError

SECONDS = 30.0


class Refusing:
    """Something is left, and no process can be started for it."""

    def __init__(self, error: Exception) -> None:
        self._error = error
        self._tries = 0
        self.asked_again = threading.Event()

    def has_leftovers(self, record: VolumeRecord) -> bool:
        return True

    def drain_config(self, record: VolumeRecord) -> NoReturn:
        self._tries += 1
        if self._tries > 1:
            self.asked_again.set()
        raise self._error


@pytest.mark.parametrize(
    "error", [OSError("no memory"), LocalStateError("config: no space left"), FailedPrecondition("vol: no bucket")]
)
def test_a_process_that_cannot_be_started_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(drains, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(drains, "RETRY_SECONDS", (0.0,))
    records, configs = Records(tmp_path), Refusing(error)
    records.save(VolumeRecord(volume_id="vol", source="s3://b-1/", path=tmp_path / "mnt", is_ended=True))
    found = Drains(records, configs)
    found.start()
    try:
        assert configs.asked_again.wait(SECONDS)
    finally:
        found.stop()


class Endless:
    """Something is left, and its upload takes for ever."""

    def has_leftovers(self, record: VolumeRecord) -> bool:
        return True

    def drain_config(self, record: VolumeRecord) -> Any:
        raise AssertionError("no process of phfs is started here")


def test_uploads_that_take_for_ever_keep_no_other_volume_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    names = {"a", "b", "c"}
    started: set[str] = set()
    all_started = threading.Event()

    def endless(_drains: Drains, record: VolumeRecord) -> subprocess.Popen[bytes]:
        started.add(record.volume_id)
        if started == names:
            all_started.set()
        return subprocess.Popen(["sleep", "1000"])

    for name, value in (("LOOK_SECONDS", 0.01), ("TURN_SECONDS", 0.0), ("AT_A_TIME", 1)):
        monkeypatch.setattr(drains, name, value)
    monkeypatch.setattr(Drains, "_spawn", endless)
    records = Records(tmp_path)
    for name in names:
        records.save(VolumeRecord(volume_id=name, source="s3://b-1/", path=tmp_path / name, is_ended=True))
    found = Drains(records, Endless())
    found.start()
    try:
        assert all_started.wait(SECONDS)
    finally:
        found.stop()
    assert "others wait" in caplog.text

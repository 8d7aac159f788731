"""The uploads of what volumes have left: whatever stands against one, it is tried again."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import NoReturn

import pytest

from phfs_csi import drains
from phfs_csi.drains import Drains
from phfs_csi.errors import FailedPrecondition
from phfs_csi.records import Records, VolumeRecord
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

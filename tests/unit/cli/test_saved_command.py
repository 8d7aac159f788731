"""`phfs saved` over state directories without a mount."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from phfs_fuse.cli.saved import drop, export, show
from phfs_fuse.errors import UsageError
from phfs_fuse.host import registry
from phfs_fuse.host.saved_files import Saved


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state directory of two volumes; the second has two entries."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(registry, "records", list)
    monkeypatch.setattr("phfs_fuse.cli.saved.state_home", lambda: tmp_path / "state")
    (tmp_path / "state/one").mkdir(parents=True)
    volume = tmp_path / "state/two"
    (volume / "staging").mkdir(parents=True)
    for number, name in enumerate(("a\x1b[31m", "b")):
        data = volume / f"staging/{number}.data"
        data.write_bytes(b"bytes")
        note = {"path": name, "reason": "refused", "ranges": [[1, 3]] if number else None, "at": 0}
        Saved(volume / "saved").keep(data, note)
    return tmp_path / "state"


def listed(capsys: pytest.CaptureFixture[str], place: Path | None = None) -> list[dict[str, object]]:
    assert show(None if place is None else str(place), as_json=True) == 0
    found = json.loads(capsys.readouterr().out)
    assert isinstance(found, list)
    return found


@pytest.mark.parametrize("place", [None, ".", "two", "two/saved"])
def test_the_entries_are_found_from_each_place(
    state: Path, capsys: pytest.CaptureFixture[str], place: str | None
) -> None:
    found = listed(capsys, None if place is None else state / place)
    assert [(one["path"], one["whole"]) for one in found] == [("a\x1b[31m", True), ("b", False)]


def test_a_table_shows_them(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert show(None) == 0
    out = capsys.readouterr().out
    assert "of some ranges" in out
    assert show(str(state / "one")) == 0
    assert "nothing was saved" in capsys.readouterr().out


def test_one_is_exported_and_dropped(state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = listed(capsys)
    assert export(str(second["id"]), tmp_path / "copy") == 0
    assert "bytes 1 to 2" in capsys.readouterr().out
    assert (tmp_path / "copy").read_bytes() == b"bytes"
    assert drop([str(second["id"])]) == 0
    assert [one["id"] for one in listed(capsys)] == [first["id"]]
    assert drop(everything=True) == 0
    assert listed(capsys) == []
    assert list((state / "two/saved").iterdir()) == []


def test_what_is_not_there_is_named(state: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nonsense: is not listed"):
        drop(["nonsense"])
    with pytest.raises(UsageError, match="say which"):
        drop()
    with pytest.raises(UsageError, match="no mount point and no state directory"):
        show(str(tmp_path / "missing"))

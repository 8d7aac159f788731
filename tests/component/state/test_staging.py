"""Layers against a model in memory, and what is found again after a restart, whatever was torn."""

from __future__ import annotations

import os
import sqlite3
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phfs_fuse.errors import LocalStateError
from phfs_fuse.state.journal import Journal
from phfs_fuse.state.schema import LayerRow, PresentRow
from phfs_fuse.state.staging import Layer, Staged, StagingArea
from phfs_fuse.types import ETag, Ino, ObjectKey

BASE = bytes(range(1, 201))
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(0, 250), st.binary(min_size=1, max_size=60)),
        st.tuples(st.just("truncate"), st.integers(0, 250), st.just(b"")),
        st.tuples(st.just("freeze"), st.just(0), st.just(b"")),
    ),
    max_size=12,
)


def read(staged: Staged, base: bytes) -> bytes:
    out = b""
    for piece in staged.pieces(0, staged.size):
        length = piece.end - piece.start
        if piece.zero:
            out += bytes(length)
        elif piece.layer is None:
            out += base[piece.start : piece.end]
        else:
            out += os.pread(piece.layer.fd, length, piece.start)
    return out


@settings(max_examples=150, deadline=None)
@given(steps=STEPS, over_base=st.booleans())
def test_layers_are_one_file_and_are_found_again(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int, bytes]], over_base: bool
) -> None:
    directory = tmp_path_factory.mktemp("area")
    area = StagingArea(directory, first_id=1)
    base = BASE if over_base else b""
    model = bytearray(base)
    rows: list[tuple[int, int]] = []

    def layer(seen: int, size: int) -> Layer:
        made = area.new(seen=seen, size=size)
        rows.append((made.id, seen))
        return made

    staged = Staged([layer(len(base), len(base))])
    for kind, number, data in steps:
        if kind == "freeze":
            staged.frozen = True
            continue
        if staged.needs_layer:
            staged.layers.append(layer(staged.size, staged.size))
        if kind == "write":
            staged.top.write(number, data)
            model.extend(bytes(max(0, number + len(data) - len(model))))
            model[number : number + len(data)] = data
        else:
            staged.top.truncate(number)
            del model[number:]
            model.extend(bytes(number - len(model)))
    assert read(staged, base) == bytes(model)
    held = area.held_bytes
    area.close()
    again = StagingArea(directory, first_id=1)
    found = Staged([again.reopen(layer_id, seen) for layer_id, seen in rows])
    assert read(found, base) == bytes(model)
    assert again.held_bytes >= held
    for one in list(found.layers):
        again.discard(one)
    assert again.held_bytes == 0
    assert not list(directory.iterdir())
    again.close()


def test_an_emptied_layer_is_a_new_file_and_a_half_made_one_is_an_orphan(tmp_path: Path) -> None:
    area = StagingArea(tmp_path, first_id=1)
    layer = area.new(seen=0, size=0)
    layer.write(0, b"x" * 100)
    old = layer.path.stat().st_ino
    layer.truncate(0)
    layer.write(0, b"y")
    assert layer.path.stat().st_ino != old
    assert layer.path.read_bytes() == b"y"
    area.close()
    (half := tmp_path / "1.data.new").touch()
    assert area.orphans({1}.__contains__) == [half]


@pytest.mark.parametrize("cut", range(1, 41))
def test_torn_extent_log_loses_only_what_was_not_answered(tmp_path: Path, cut: int) -> None:
    area = StagingArea(tmp_path, first_id=1)
    layer = area.new(seen=200, size=200)
    layer.write(0, b"first")
    layer.write(100, b"second")
    area.close()
    log = tmp_path / "1.ext"
    os.truncate(log, log.stat().st_size - cut)
    found = Staged([StagingArea(tmp_path, first_id=1).reopen(1, 200)])
    expected = bytearray(BASE)
    if cut <= 20:  # bytes in one record
        expected[0:5] = b"first"
    assert read(found, BASE) == bytes(expected)
    found.top._area.close()


def row(ino: int, key: str) -> PresentRow:
    return PresentRow(
        ino=Ino(ino),
        key=ObjectKey(key),
        name=b"n",
        detached=False,
        mode=0o100644,
        uid=0,
        gid=0,
        rdev=0,
        mtime_ns=5,
        ctime_ns=6,
        xattrs=None,
        link=b"t",
        own_attrs=False,
        base_key=ObjectKey(key),
        base_etag=ETag("e"),
        base_size=7,
        over=ETag("e"),
        attrs=False,
    )


def test_journal_comes_back(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "v")
    journal.put(row(2, "a"))
    journal.put_layer(LayerRow(1, 2, 7))
    journal.put_gone(ObjectKey("b"), None)
    journal.put_upload("u", ObjectKey("a"))
    journal.set_number("epoch", 4)
    journal.close()
    again = Journal(tmp_path, "v")
    assert [(r.ino, r.key) for r in again.present()] == [(2, "a")]
    assert again.layers() == [LayerRow(1, 2, 7)]
    assert again.gone() == [("b", None)]
    assert again.uploads() == [("u", "a")]
    assert again.number("epoch", 0) == 4
    assert (tmp_path / "journal.db").stat().st_mode & 0o777 == 0o600
    again.close()


def test_batch_is_all_or_nothing(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "v")

    def put_and_fail() -> None:
        with journal.batch():
            journal.put(row(2, "a"))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        put_and_fail()
    assert journal.present() == []
    journal.close()


def test_journal_of_another_volume_is_refused(tmp_path: Path) -> None:
    Journal(tmp_path, "v").close()
    with pytest.raises(LocalStateError, match="belongs to v"):
        Journal(tmp_path, "w")


def test_journal_of_a_newer_format_is_refused(tmp_path: Path) -> None:
    Journal(tmp_path, "v").close()
    with sqlite3.connect(tmp_path / "journal.db") as db:
        db.execute("PRAGMA user_version=99")
    db.close()
    with pytest.raises(LocalStateError, match="newer phfs"):
        Journal(tmp_path, "v")


@pytest.mark.parametrize("damage", ["middle", "head"])
def test_damaged_journal_is_saved_aside_and_what_is_readable_goes_on(tmp_path: Path, damage: str) -> None:
    journal = Journal(tmp_path, "v")
    with journal.batch():
        for number in range(2, 2000):
            journal.put(row(number, f"key-{number:06d}"))
    journal.checkpoint()
    journal.close()
    path = tmp_path / "journal.db"
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size // 2 if damage == "middle" else 0)
        file.write(b"\xff" * 5000)
    again = Journal(tmp_path, "v")
    assert again.saved_aside is not None
    assert again.saved_aside.stat().st_size == size
    if damage == "middle":
        assert len(again.present()) > 100
    again.close()


def test_an_idle_journal(tmp_path: Path) -> None:
    """What tells, without a process, whether anything is left to upload. Not sure counts as something."""
    assert Journal.is_idle(tmp_path)
    journal = Journal(tmp_path, "here")
    journal.put_layer(LayerRow(1, Ino(2), 0))
    journal.end_layer(1)  # its files are of no use any more
    journal.close()
    assert Journal.is_idle(tmp_path)
    for note in (
        lambda journal: journal.put_layer(LayerRow(3, Ino(2), 0)),
        lambda journal: journal.put_gone(ObjectKey("gone"), None),
        lambda journal: journal.put_upload("id", ObjectKey("key")),
    ):
        (tmp_path / "journal.db").unlink()
        journal = Journal(tmp_path, "here")
        note(journal)
        journal.close()
        assert not Journal.is_idle(tmp_path)
    (tmp_path / "journal.db").write_bytes(b"no database" * 100)
    assert not Journal.is_idle(tmp_path)


@pytest.fixture
def standing_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wall clock as it is when it is set back again and again."""
    monkeypatch.setattr(time, "gmtime", lambda: time.struct_time((2026, 3, 29, 1, 59, 59, 6, 88, 0)))


@pytest.mark.usefixtures("standing_clock")
def test_what_is_put_aside_replaces_nothing_whatever_the_clock_says(tmp_path: Path) -> None:
    directory = tmp_path / "staging"
    for data in (b"first", b"second", b"third"):  # each after a restart: numbers of layers come again
        area = StagingArea(directory, first_id=1)
        layer = area.new(seen=0, size=0)
        os.pwrite(layer.fd, data, 0)
        area.save_aside(layer.path, {})
        area.close()
    kept = {path.read_bytes() for path in (tmp_path / "saved").glob("*.data")}
    assert kept == {b"first", b"second", b"third"}


@pytest.mark.usefixtures("standing_clock")
def test_damaged_journals_are_all_kept(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    for number in range(3):
        path.write_bytes(b"damage %d" % number * 1000)
        Journal(tmp_path, "v").close()
    kept = {found.read_bytes()[:8] for found in tmp_path.glob("journal.db.corrupt-*")}
    assert kept == {b"damage 0", b"damage 1", b"damage 2"}

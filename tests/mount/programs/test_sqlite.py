"""sqlite with four processes in every journal mode: right, never corrupt."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from tests.mount.place import Place, saved, together

pytestmark = pytest.mark.fuse
PROCESSES, TRANSACTIONS, TOTAL = 4, 8, 1000
WRITER = f"""
import sqlite3, sys
path, mode, name = sys.argv[1:]
db = sqlite3.connect(path, timeout=60, isolation_level=None)
db.execute("pragma journal_mode=" + mode)
for number in range({TRANSACTIONS}):
    db.execute("begin immediate")
    db.execute("update account set amount = amount - 1 where id = 1")
    db.execute("update account set amount = amount + 1 where id = 2")
    db.execute("insert into log values (?, ?, ?)", (name, number, "x" * 3000))
    db.execute("commit")
    (total,) = db.execute("select sum(amount) from account").fetchone()
    assert total == {TOTAL}, total
db.close()
"""


def check(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("pragma integrity_check").fetchall() == [("ok",)]
        assert db.execute("select count(*), count(distinct who || '/' || number) from log").fetchall() == [
            (PROCESSES * TRANSACTIONS, PROCESSES * TRANSACTIONS)
        ]
        moved = PROCESSES * TRANSACTIONS
        assert db.execute("select amount from account order by id").fetchall() == [(TOTAL - moved,), (moved,)]


@pytest.mark.parametrize("mode", ["delete", "truncate", "persist", "wal"])
def test_four_processes(place: Place, mnt: Path, tmp_path: Path, mode: str) -> None:
    path = mnt / "db.sqlite"
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute(f"pragma journal_mode={mode}")  # where WAL is refused the mode stays "delete", which is fine
        db.execute("create table account (id integer primary key, amount integer)")
        db.execute("create table log (who, number, filler)")
        db.execute(f"insert into account values (1, {TOTAL}), (2, 0)")
    together(WRITER, *([path, mode, f"p{number}"] for number in range(PROCESSES)))
    check(path)
    check(saved(place, mnt, tmp_path / "stored") / "db.sqlite")
    place.remount()
    check(path)


def test_rollback(mnt: Path) -> None:
    path = mnt / "db.sqlite"
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("pragma cache_size=5")  # so that the change is in the file before it is rolled back
        db.execute("create table t (x)")
        db.execute("begin")
        db.executemany("insert into t values (?)", (("x" * 1000,) for _ in range(200)))
        db.execute("rollback")
        assert db.execute("select count(*) from t").fetchone() == (0,)
        assert db.execute("pragma integrity_check").fetchall() == [("ok",)]


def test_vacuum(place: Place, mnt: Path, tmp_path: Path) -> None:
    path = mnt / "db.sqlite"
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("create table t (x)")
        db.executemany("insert into t values (?)", (("x" * 1000,) for _ in range(300)))
        db.execute("delete from t where rowid % 10")
        db.execute("vacuum")
    stored = saved(place, mnt, tmp_path / "stored") / "db.sqlite"
    with closing(sqlite3.connect(stored)) as db:
        assert db.execute("select count(*) from t").fetchone() == (30,)
        assert db.execute("pragma integrity_check").fetchall() == [("ok",)]

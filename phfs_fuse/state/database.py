"""The journal as one SQLite file (WAL): its format, its damage, its transactions and their room. Owns `journal.db`.

A commit is in the kernel's page cache before the call returns, so it survives the death of the process; it is
synced to the disk at checkpoints (`checkpoint`, called off the event loop), so after a power cut the newest
commits may be missing, but never half a commit.

A disk without room is met before a transaction begins (`log_space`). What else fails within one undoes what its
caller has changed so far (`transaction`).
"""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final

from phfs_fuse import metrics
from phfs_fuse.errors import LocalStateError
from phfs_fuse.host.locks import unused_stamp
from phfs_fuse.state.disk_reserve import Reserve
from phfs_fuse.state.log_space import CHANGE_BYTES, NOTE_BYTES, LogSpace
from phfs_fuse.state.schema import FORMAT, SCHEMA, TABLES
from phfs_fuse.state.transaction import Transaction

DAMAGE: Final = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
WAITING_MAX: Final = 1000  # rows of one transaction that wait for its end


class Database:
    """The open `journal.db` of one volume. Every call is one transaction, unless made inside `batch()`."""

    def __init__(self, directory: Path, volume: str) -> None:
        """Opens or makes it. Raises: LocalStateError if it is of a newer format, of another volume, or cannot be
        opened; a damaged one is moved aside first (`saved_aside` names it) and what is readable is carried over."""
        self.path = directory / "journal.db"
        self.reserve = Reserve(directory)
        self.saved_aside: Path | None = None
        self.transaction = Transaction()
        self.on_damage: Callable[[str], object] = lambda _reason: (
            None
        )  # the process has to end: the next one mends it
        self._depth = 0
        self._has_failed = False  # a part of the transaction under way
        self._waiting: list[tuple[str, Sequence[object]]] = []  # statements of it
        fresh = not self.path.exists()
        try:
            self._db = self._open(volume)
        except sqlite3.OperationalError as exc:
            raise LocalStateError(f"journal {self.path} cannot be opened ({exc}); check the disk") from exc
        except sqlite3.DatabaseError:
            self._db = self._salvage(volume)
        self._no_rows = self._db.cursor()
        self._log = LogSpace(self.path)
        if fresh:
            os.chmod(self.path, 0o600)

    @staticmethod
    def check(directory: Path) -> None:
        """Raises: LocalStateError if the journal there, which another process may have open, is of a newer format."""
        path = directory / "journal.db"
        try:
            with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as db:
                _require_known(path, db)
        except sqlite3.Error as exc:
            raise LocalStateError(f"journal {path} cannot be read ({exc}); check the disk") from exc

    def _open(self, volume: str) -> sqlite3.Connection:
        db = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
        try:
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=NORMAL")
            db.execute("PRAGMA wal_autocheckpoint=0")
            if db.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
                raise sqlite3.DatabaseError("quick_check")
            self._check_format(db, volume)
            return db
        except BaseException:
            db.close()
            raise

    def _check_format(self, db: sqlite3.Connection, volume: str) -> None:
        _require_known(self.path, db)
        db.executescript(SCHEMA)
        db.execute(f"PRAGMA user_version={FORMAT}")
        db.execute("INSERT OR IGNORE INTO meta VALUES ('volume', ?)", (volume,))
        (owner,) = db.execute("SELECT value FROM meta WHERE name='volume'").fetchone()
        if owner != volume:
            raise LocalStateError(
                f"state {self.path.parent} belongs to {owner}, not to {volume}; choose another --state-dir"
            )

    def _salvage(self, volume: str) -> sqlite3.Connection:
        """Move a damaged journal aside and carry the rows that can be read over into a new one."""
        aside = self.path.with_name(f"journal.db.corrupt-{unused_stamp(self.path.parent)}")
        for suffix in ("-wal", "-shm", ""):
            source = Path(str(self.path) + suffix)
            if source.exists():
                source.rename(str(aside) + suffix)
        self.saved_aside = aside
        db = self._open(volume)
        copy = sqlite3.connect(aside)
        try:
            for table in TABLES:
                for row in _readable_rows(copy, table):
                    marks = ",".join("?" * len(row))
                    try:
                        db.execute(f"INSERT OR IGNORE INTO {table} VALUES ({marks})", row)
                    except sqlite3.Error:
                        continue  # a row that makes no sense stays in the copy that was saved
        finally:
            copy.close()
        return db

    def close(self) -> None:
        self._db.close()
        self._log.close()

    def require(self, size: int = 0) -> None:
        """Before a change that makes the local state grow by `size`. Raises: OSError (ENOSPC)."""
        self.reserve.require(size)
        self._require_log(CHANGE_BYTES)

    def require_some(self) -> None:
        """Before one that will give space back. Raises: OSError (ENOSPC)."""
        self.reserve.require_some()
        self._require_log(CHANGE_BYTES)

    def require_note(self) -> None:
        """Before one that follows from what was done in the store. Raises: OSError (ENOSPC)."""
        self.reserve.require_some()
        self._require_log(NOTE_BYTES)

    async def room_to_note(self) -> None:
        """Before what is noted of the store: returns at once, but for a disk that is full. What is noted then, before
        the next await, is not refused."""
        await self.reserve.wait(self.require_note)

    def can_note(self) -> bool:
        """Whether there is room for one thing more."""
        try:
            self.require_note()
        except OSError:
            return False
        return True

    def _require_log(self, size: int) -> None:
        try:
            self._log.require(size)
        except OSError:
            if not self.reserve.is_held:
                raise
            self.reserve.give_up()
            self._log.require(size)

    def _run(self, sql: str, values: Sequence[object] = ()) -> sqlite3.Cursor:
        """A row that is written within a transaction waits for its end, so that one row alone costs one statement.
        Raises: OSError (ENOSPC if the disk is full, else EIO)."""
        if sql.startswith("SELECT"):
            self._write_waiting()
        elif self._depth:
            self._waiting.append((sql, values))
            if len(self._waiting) == WAITING_MAX:
                self._write_waiting()
            return self._no_rows
        elif not self._db.in_transaction:
            self._require_log(NOTE_BYTES)
            metrics.JOURNAL.add()
        return self._begin_by(sql, values)

    def _begin_by(self, sql: str, values: Sequence[object] = ()) -> sqlite3.Cursor:
        """A statement that may be the first of a transaction, on the last room there is."""
        try:
            return self._execute(sql, values)
        except OSError as exc:
            if self._db.in_transaction or exc.errno != errno.ENOSPC or not self.reserve.is_held:
                raise
        self.reserve.give_up()
        return self._execute(sql, values)

    def _write_waiting(self) -> None:
        """Write the rows that wait."""
        if self._waiting and not self._db.in_transaction:
            metrics.JOURNAL.add()
            self._begin_by("BEGIN IMMEDIATE")
        for sql, values in self._waiting:
            self._execute(sql, values)
        self._waiting.clear()

    def _commit(self) -> None:
        if len(self._waiting) == 1 and not self._db.in_transaction:
            metrics.JOURNAL.add()
            self._begin_by(*self._waiting.pop())
        else:
            self._write_waiting()
        if self._db.in_transaction:
            self._execute("COMMIT", ())

    def _execute(self, sql: str, values: Sequence[object]) -> sqlite3.Cursor:
        try:
            return self._db.execute(sql, values)
        except sqlite3.DatabaseError as exc:
            code = getattr(exc, "sqlite_errorcode", None)
            if code is None:
                raise  # a value that is none of SQLite's
            if code & 0xFF in DAMAGE:
                self.on_damage(str(exc))
            raise OSError(errno.ENOSPC if code == sqlite3.SQLITE_FULL else errno.EIO, f"journal: {exc}") from exc

    def batch(self, log_bytes: int = NOTE_BYTES) -> AbstractContextManager[None]:
        """One transaction for all calls inside, with so much room in the log. Must not be held over an await.
        Raises: OSError (ENOSPC), before anything inside has run."""
        return _Batch(self, log_bytes)

    def _begin(self, log_bytes: int) -> None:
        if self._depth == 0:
            self.reserve.review()
            self._require_log(log_bytes)
            self.transaction.begin()
        self._depth += 1

    def _end(self, log_bytes: int, *, failed: bool) -> None:
        self._depth -= 1
        self._has_failed = self._has_failed or failed
        if self._depth:
            return
        try:
            if self._has_failed and not failed:
                raise OSError(errno.EIO, "journal: a part of the transaction has failed")
            if not failed:
                self._commit()
        except BaseException:
            failed = True
            raise
        finally:
            self._has_failed = False
            if failed:
                self._roll_back()
        if failed:
            return
        if log_bytes > CHANGE_BYTES:
            self._log.give_back()
        self.transaction.commit()

    def _roll_back(self) -> None:
        """The transaction under way has failed: neither the journal nor what it speaks of has changed."""
        self._undone()
        self._waiting.clear()
        self.transaction.roll_back()
        if self._db.in_transaction:  # SQLite ends it itself when the disk is full
            try:
                self._execute("ROLLBACK", ())
            except OSError as exc:
                self.on_damage(str(exc))

    def _undone(self) -> None:
        """The rows of the transaction under way are not in the journal."""

    def after(self, call: Callable[[], object]) -> None:
        """Call it once the transaction under way is done; now, if there is none."""
        self.transaction.after(call)

    def checkpoint(self) -> None:
        """Bring the log into the database file and sync it. Blocks; call it on a thread of its own.
        Raises: OSError (the disk is full): the log stays, nothing is lost."""
        with contextlib.closing(sqlite3.connect(self.path, isolation_level=None)) as db:
            try:
                db.execute("PRAGMA busy_timeout=10000")
                db.execute("PRAGMA wal_checkpoint(PASSIVE)")
            except sqlite3.OperationalError as exc:
                raise OSError(errno.EIO, f"journal: {exc}") from exc

    @property
    def log_bytes(self) -> int:
        try:
            return os.stat(str(self.path) + "-wal").st_size
        except FileNotFoundError:
            return 0


class _Batch(AbstractContextManager[None]):
    """See `Database.batch`. A class, since each change of a program has some: a generator costs twice as much."""

    __slots__ = ("_db", "_log_bytes")

    def __init__(self, db: Database, log_bytes: int) -> None:
        self._db, self._log_bytes = db, log_bytes

    def __enter__(self) -> None:
        self._db._begin(self._log_bytes)

    def __exit__(self, kind: object, exc: object, trace: object) -> None:
        self._db._end(self._log_bytes, failed=kind is not None)


def _readable_rows(db: sqlite3.Connection, table: str) -> Iterator[tuple[object, ...]]:
    try:
        yield from db.execute(f"SELECT * FROM {table}")
    except sqlite3.Error:
        return  # the rest is in pages that cannot be read


def _require_known(path: Path, db: sqlite3.Connection) -> None:
    found = db.execute("PRAGMA user_version").fetchone()[0]
    if found > FORMAT:
        raise LocalStateError(
            f"state {path.parent} was written by a newer phfs (format {found}, this one knows {FORMAT}); "
            "mount with that version, or with another --state-dir"
        )

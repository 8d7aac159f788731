"""The journal as one SQLite file (WAL): its format, its damage, its transactions and their room. Owns `journal.db`.

A commit is in the kernel's page cache before the call returns, so it survives the death of the process; it is
synced to the disk at checkpoints (`checkpoint`, called off the event loop), so after a power cut the newest
commits may be missing, but never half a commit.

A disk without room is met before a transaction begins (`logspace`), so that its caller may change the tree within it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from phfs_fuse import metrics
from phfs_fuse.errors import LocalStateError
from phfs_fuse.journalrows import FORMAT, SCHEMA, TABLES
from phfs_fuse.localstate import unused_stamp
from phfs_fuse.logspace import CHANGE_BYTES, NOTE_BYTES, LogSpace
from phfs_fuse.reserve import Reserve


class Database:
    """The open `journal.db` of one volume. Every call is one transaction, unless made inside `batch()`."""

    def __init__(self, directory: Path, volume: str) -> None:
        """Opens or makes it. Raises: LocalStateError if it is of a newer format, of another volume, or cannot be
        opened; a damaged one is moved aside first (`saved_aside` names it) and what is readable is carried over."""
        self.path = directory / "journal.db"
        self.reserve = Reserve(directory)
        self.saved_aside: Path | None = None
        self._depth = 0
        self._after: list[Callable[[], None]] = []
        fresh = not self.path.exists()
        try:
            self._db = self._open(volume)
        except sqlite3.OperationalError as exc:
            raise LocalStateError(f"journal {self.path} cannot be opened ({exc}); check the disk") from exc
        except sqlite3.DatabaseError:
            self._db = self._salvage(volume)
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

    def _run(self, sql: str, values: Sequence[object] = (), log_bytes: int = NOTE_BYTES) -> sqlite3.Cursor:
        """`log_bytes`: the room for a transaction that begins with this. Raises: OSError (ENOSPC if the disk is full,
        else EIO)."""
        if not self._db.in_transaction and not sql.startswith("SELECT"):
            self._require_log(log_bytes)
            metrics.JOURNAL.add()
        try:
            return self._execute(sql, values)
        except OSError as exc:
            if self._db.in_transaction or sql == "COMMIT" or exc.errno != errno.ENOSPC or not self.reserve.is_held:
                raise
        self.reserve.give_up()
        return self._execute(sql, values)

    def _execute(self, sql: str, values: Sequence[object]) -> sqlite3.Cursor:
        try:
            return self._db.execute(sql, values)
        except sqlite3.OperationalError as exc:
            code = errno.ENOSPC if exc.sqlite_errorcode == sqlite3.SQLITE_FULL else errno.EIO
            raise OSError(code, f"journal: {exc}") from exc

    def batch(self, log_bytes: int = NOTE_BYTES) -> AbstractContextManager[None]:
        """One transaction for all calls inside, with so much room in the log. Must not be held over an await.
        Raises: OSError (ENOSPC), before anything inside has run."""
        return _Batch(self, log_bytes)

    def _begin(self, log_bytes: int) -> None:
        if self._depth == 0:
            self.reserve.review()
            self._run("BEGIN IMMEDIATE", log_bytes=log_bytes)
        self._depth += 1

    def _end(self, log_bytes: int, *, failed: bool) -> None:
        self._depth -= 1
        if self._depth:
            return
        if failed:
            self._roll_back()
            return
        try:
            self._run("COMMIT")
        except OSError:
            self._roll_back()
            raise
        if log_bytes > CHANGE_BYTES:
            self._log.give_back()
        after, self._after = self._after, []
        for call in after:
            call()

    def _roll_back(self) -> None:
        self._undone()
        if self._db.in_transaction:  # SQLite ends it itself when the disk is full
            self._run("ROLLBACK")

    def _undone(self) -> None:
        """The transaction under way has failed."""
        self._after.clear()

    def after(self, call: Callable[[], None]) -> None:
        """Call it once the transaction under way is done; now, if there is none."""
        if self._depth:
            self._after.append(call)
        else:
            call()

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

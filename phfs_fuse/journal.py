"""The journal: what exists only on this machine, kept across restarts in SQLite (WAL). Owns `journal.db`.

A commit is in the kernel's page cache before the call returns, so it survives the death of the process; it is
synced to the disk at checkpoints (`checkpoint`, called off the event loop), so after a power cut the newest
commits may be missing, but never half a commit. Rows: `present` (a file, symlink or directory marker that the
store lacks in this form), `layer` (its staging files, bottom first), `gone` (a key that has to be deleted),
`upload` (multipart uploads under way, so that only our own are ever aborted), `attempt` (what was sent and not
answered: the store may have it), `act` (the last change of names by
each thread, since the kernel may ask again for one that was done and not answered), `conflict`, `meta`.

A disk without room is met before a transaction begins (`logspace`), so that its caller may change the tree within it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from phfs_fuse import metrics
from phfs_fuse.errors import LocalStateError
from phfs_fuse.localstate import unused_stamp
from phfs_fuse.logspace import CHANGE_BYTES, NOTE_BYTES, LogSpace
from phfs_fuse.reserve import Reserve
from phfs_fuse.types import ETag, Ino, ObjectKey

FORMAT: Final = 1
ENDED: Final = Ino(0)  # in place of the file that a layer was of

SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS present (
    ino INTEGER PRIMARY KEY, key TEXT NOT NULL, name BLOB NOT NULL, detached INTEGER NOT NULL,
    mode INTEGER NOT NULL, uid INTEGER NOT NULL, gid INTEGER NOT NULL, rdev INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL, ctime_ns INTEGER NOT NULL, xattrs BLOB, link BLOB, own_attrs INTEGER NOT NULL,
    base_key TEXT, base_etag TEXT, base_size INTEGER, over TEXT,
    attrs INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS layer (id INTEGER PRIMARY KEY, ino INTEGER NOT NULL, seen INTEGER NOT NULL);
CREATE INDEX IF NOT EXISTS layer_ino ON layer (ino, id);
CREATE TABLE IF NOT EXISTS gone (key TEXT PRIMARY KEY, etag TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS upload (upload_id TEXT PRIMARY KEY, key TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS attempt (key TEXT NOT NULL, size INTEGER NOT NULL, metadata TEXT NOT NULL,
    PRIMARY KEY (key, size, metadata)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS act (
    pid INTEGER PRIMARY KEY, op TEXT NOT NULL, parent INTEGER NOT NULL, name BLOB NOT NULL,
    to_parent INTEGER NOT NULL, to_name BLOB NOT NULL, ino INTEGER NOT NULL, seq INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS conflict (
    path BLOB NOT NULL, kept_as BLOB NOT NULL, outside INTEGER NOT NULL, at_ns INTEGER NOT NULL,
    PRIMARY KEY (path, kept_as)) WITHOUT ROWID;
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class PresentRow:
    """One row of `present`, in the order of its columns. `xattrs` is opaque here."""

    ino: Ino
    key: ObjectKey
    name: bytes
    detached: bool
    mode: int
    uid: int
    gid: int
    rdev: int
    mtime_ns: int
    ctime_ns: int
    xattrs: bytes | None
    link: bytes | None
    own_attrs: bool
    base_key: ObjectKey | None
    base_etag: ETag | None
    base_size: int | None
    over: ETag | None
    attrs: bool


@dataclass(frozen=True, slots=True)
class LayerRow:
    """A staging file: `seen` bytes of what lies below it show through where it has none of its own."""

    id: int
    ino: Ino
    seen: int


@dataclass(frozen=True, slots=True)
class ConflictRow:
    """The bytes that lost `path` were kept as `kept_as`: beside it, both below the mount point, or `outside` as a
    file of this machine; empty if there were none to keep."""

    path: bytes
    kept_as: bytes
    outside: bool
    at_ns: int


@dataclass(frozen=True, slots=True)
class Act:
    """A change of names that the thread `pid` asks for; numbers and names as the kernel gave them."""

    pid: int
    op: str
    parent: int
    name: bytes
    to_parent: int = 0
    to_name: bytes = b""


class Journal:
    """The open journal of one volume. Every call is one transaction, unless made inside `batch()`."""

    def __init__(self, directory: Path, volume: str) -> None:
        """Opens or makes it. Raises: LocalStateError if it is of a newer format, of another volume, or cannot be
        opened; a damaged one is moved aside first (`saved_aside` names it) and what is readable is carried over."""
        self.path = directory / "journal.db"
        self.reserve = Reserve(directory)
        self.saved_aside: Path | None = None
        self._depth = 0
        self._rows: dict[Ino, PresentRow] = {}  # as they were written; empty after a transaction that failed
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

    @staticmethod
    def is_idle(directory: Path) -> bool:
        """Whether the journal there, which nobody has open, has nothing to bring into the store. Not sure: False."""
        path = directory / "journal.db"
        if not path.exists():
            return True
        rows = ("present", f"layer WHERE ino!={ENDED}", "gone", "upload")
        with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(path)) as db:
            return not any(db.execute(f"SELECT 1 FROM {some} LIMIT 1").fetchone() for some in rows)
        return False

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
            for table in ("present", "layer", "gone", "upload", "attempt", "conflict"):
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

    @contextmanager
    def batch(self, log_bytes: int = NOTE_BYTES) -> Iterator[None]:
        """One transaction for all calls inside, with so much room in the log. Must not be held over an await.
        Raises: OSError (ENOSPC), before anything inside has run."""
        if self._depth == 0:
            self.reserve.review()
            self._run("BEGIN IMMEDIATE", log_bytes=log_bytes)
        self._depth += 1
        try:
            yield
        except BaseException:
            self._depth -= 1
            if self._depth == 0:
                self._after.clear()
                self._rows.clear()
                if self._db.in_transaction:  # SQLite ends it itself when the disk is full
                    self._run("ROLLBACK")
            raise
        self._depth -= 1
        if self._depth == 0:
            self._commit()
            if log_bytes > CHANGE_BYTES:
                self._log.give_back()
            after, self._after = self._after, []
            for call in after:
                call()

    def _commit(self) -> None:
        try:
            self._run("COMMIT")
        except OSError:
            self._after.clear()
            self._rows.clear()
            if self._db.in_transaction:
                self._run("ROLLBACK")
            raise

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

    # what is to be stored

    def put(self, row: PresentRow) -> None:
        """Costs nothing if the row is as it was."""
        if self._rows.get(row.ino) == row:
            return
        self._run(
            "INSERT OR REPLACE INTO present VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)",
            (
                row.ino, row.key, row.name, row.detached, row.mode, row.uid, row.gid, row.rdev, row.mtime_ns,
                row.ctime_ns, row.xattrs, row.link, row.own_attrs, row.base_key, row.base_etag, row.base_size,
                row.over, row.attrs,
            ),
        )  # fmt: skip
        self._rows[row.ino] = row

    def drop(self, ino: Ino) -> None:
        """The file `ino` is as the store has it (or gone), so are its layers."""
        self._rows.pop(ino, None)
        self._run("DELETE FROM present WHERE ino=?", (ino,))
        self._run("DELETE FROM layer WHERE ino=?", (ino,))

    def put_layer(self, row: LayerRow) -> None:
        self._run("INSERT OR REPLACE INTO layer VALUES (?,?,?)", (row.id, row.ino, row.seen))

    def end_layer(self, layer_id: int) -> None:
        """Its files are of no use once this is committed; they go `after` that. Until `forget_ended` a restart finds
        out here which files those are."""
        self._run("UPDATE layer SET ino=? WHERE id=?", (ENDED, layer_id))

    def forget_ended(self) -> None:
        """The files of all ended layers are gone."""
        self._run("DELETE FROM layer WHERE ino=?", (ENDED,))

    # what is to be deleted

    def put_gone(self, key: ObjectKey, etag: ETag | None) -> None:
        self._run("INSERT OR REPLACE INTO gone VALUES (?,?)", (key, etag))

    def drop_gone(self, keys: Iterable[ObjectKey]) -> None:
        for key in keys:
            self._run("DELETE FROM gone WHERE key=?", (key,))

    # what was asked for last

    def put_act(self, act: Act, ino: Ino, seq: int) -> None:
        """`act` is done, `ino` is the file that it made, moved or removed."""
        self._run(
            "INSERT OR REPLACE INTO act VALUES (?,?,?,?,?,?,?,?)",
            (act.pid, act.op, act.parent, act.name, act.to_parent, act.to_name, ino, seq),
        )

    def acts(self) -> list[tuple[Act, Ino, int]]:
        rows = self._run("SELECT * FROM act ORDER BY seq")
        return [(Act(*fields), ino, seq) for *fields, ino, seq in rows]

    def drop_acts(self) -> None:
        self._run("DELETE FROM act")

    # multipart uploads, conflicts, numbers

    def put_upload(self, upload_id: str, key: ObjectKey) -> None:
        self._run("INSERT OR REPLACE INTO upload VALUES (?,?)", (upload_id, key))

    def drop_upload(self, upload_id: str) -> None:
        self._run("DELETE FROM upload WHERE upload_id=?", (upload_id,))

    def put_attempt(self, key: ObjectKey, size: int, metadata: str) -> None:
        self._run("INSERT OR REPLACE INTO attempt VALUES (?,?,?)", (key, size, metadata))

    def drop_attempts(self, key: ObjectKey) -> None:
        self._run("DELETE FROM attempt WHERE key=?", (key,))

    def attempts(self) -> list[tuple[ObjectKey, int, str]]:
        return list(self._run("SELECT key, size, metadata FROM attempt"))

    def put_conflict(self, path: bytes, kept_as: bytes, *, outside: bool) -> None:
        self._run("INSERT OR REPLACE INTO conflict VALUES (?,?,?,?)", (path, kept_as, outside, time.time_ns()))

    def drop_conflict(self, path: bytes, kept_as: bytes) -> None:
        self._run("DELETE FROM conflict WHERE path=? AND kept_as=?", (path, kept_as))

    def conflicts(self) -> list[ConflictRow]:
        """Oldest first."""
        rows = self._run("SELECT path, kept_as, outside, at_ns FROM conflict ORDER BY at_ns")
        return [ConflictRow(path, kept_as, bool(outside), at_ns) for path, kept_as, outside, at_ns in rows]

    def set_number(self, name: str, value: int) -> None:
        self._run("INSERT OR REPLACE INTO meta VALUES (?,?)", (name, str(value)))

    def set_note(self, name: str, text: str | None) -> None:
        """Remember a text; None: forget it."""
        if text is None:
            self._run("DELETE FROM meta WHERE name=?", (name,))
        else:
            self._run("INSERT OR REPLACE INTO meta VALUES (?,?)", (name, text))

    def note(self, name: str) -> str | None:
        row = self._run("SELECT value FROM meta WHERE name=?", (name,)).fetchone()
        return None if row is None else str(row[0])

    def number(self, name: str, default: int) -> int:
        row = self._run("SELECT value FROM meta WHERE name=?", (name,)).fetchone()
        return int(row[0]) if row and str(row[0]).isdigit() else default

    # after a restart

    def present(self) -> list[PresentRow]:
        names = PresentRow.__slots__
        return [
            PresentRow(**dict(zip(names, row, strict=True)))
            for row in self._run("SELECT * FROM present ORDER BY key")
        ]

    def layers(self) -> list[LayerRow]:
        return [LayerRow(*row) for row in self._run("SELECT id, ino, seen FROM layer ORDER BY ino, id")]

    def gone(self) -> list[tuple[ObjectKey, ETag | None]]:
        return list(self._run("SELECT key, etag FROM gone"))

    def uploads(self) -> list[tuple[str, ObjectKey]]:
        return list(self._run("SELECT upload_id, key FROM upload"))


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

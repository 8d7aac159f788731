"""The journal: what exists only on this machine, kept across restarts. Owns its rows.

Rows: `present` (a file, symlink or directory marker that the store lacks in this form), `layer` (its staging files,
bottom first), `gone` (a key that has to be deleted), `intent` (a multipart upload that is asked for), `upload` (one
under way, so that only our own are ever aborted), `attempt` (what was sent and not answered: the store may have it),
`claim` (an attempt that makes a name, of which no program was told), `act` (the last change of names by each thread,
since the kernel may ask again for one that was done and not answered), `conflict`, `refusal` (a change that the store
refuses for good), `meta`.
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Iterable
from pathlib import Path

from phfs_fuse.state.database import Database
from phfs_fuse.state.refusal import Operation, Refusal
from phfs_fuse.state.schema import ENDED, ConflictRow, Intent, LayerRow, PresentRow
from phfs_fuse.types import Act, ETag, Ino, ObjectKey


class Journal(Database):
    """See `Database` for transactions, room and damage."""

    def __init__(self, directory: Path, volume: str) -> None:
        """Raises: LocalStateError."""
        self._rows: dict[Ino, PresentRow] = {}  # as they were written; empty after a transaction that failed
        super().__init__(directory, volume)

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

    @staticmethod
    def refused_in(directory: Path) -> int:
        """How many changes of the journal there, which another process may have open, the store has refused for good.
        0 also where it cannot be read."""
        path = directory / "journal.db"
        uri = f"{path.absolute().as_uri()}?mode=ro"
        with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(uri, uri=True)) as db:
            return int(db.execute("SELECT count(*) FROM refusal").fetchone()[0])
        return 0

    def _undone(self) -> None:
        super()._undone()
        self._rows.clear()

    # what is to be stored

    def put(self, row: PresentRow) -> None:
        """Costs nothing if the row is as it was."""
        if self._rows.get(row.ino) == row:
            return
        self._run("INSERT OR REPLACE INTO present VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)", row)
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

    def put_intent(self, key: ObjectKey, at_ns: int) -> int:
        """Returns the number of the row."""
        row_id = self._run("INSERT INTO intent (key, at_ns) VALUES (?,?)", (key, at_ns)).lastrowid
        assert row_id is not None
        return row_id

    def drop_intent(self, intent_id: int) -> None:
        self._run("DELETE FROM intent WHERE id=?", (intent_id,))

    def put_upload(self, upload_id: str, key: ObjectKey) -> None:
        self._run("INSERT OR REPLACE INTO upload VALUES (?,?)", (upload_id, key))

    def drop_upload(self, upload_id: str) -> None:
        self._run("DELETE FROM upload WHERE upload_id=?", (upload_id,))

    def put_attempt(self, key: ObjectKey, size: int, metadata: str) -> None:
        self._run("INSERT OR REPLACE INTO attempt VALUES (?,?,?)", (key, size, metadata))

    def drop_attempts(self, key: ObjectKey) -> None:
        self._run("DELETE FROM attempt WHERE key=?", (key,))

    def put_claim(self, key: ObjectKey) -> None:
        self._run("INSERT OR REPLACE INTO claim VALUES (?)", (key,))

    def drop_claim(self, key: ObjectKey) -> None:
        self._run("DELETE FROM claim WHERE key=?", (key,))

    def claims(self) -> list[ObjectKey]:
        return [key for (key,) in self._run("SELECT key FROM claim")]

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

    def put_refusal(self, refusal: Refusal) -> None:
        """One for each key and operation, the last."""
        values = (refusal.operation.value, refusal.key, refusal.path, refusal.reason, refusal.errno, refusal.at_ns)
        self._run("INSERT OR REPLACE INTO refusal VALUES (?,?,?,?,?,?)", values)

    def drop_refusal(self, refusal: Refusal) -> None:
        self._run("DELETE FROM refusal WHERE key=? AND operation=?", (refusal.key, refusal.operation.value))

    def refusals(self) -> list[Refusal]:
        """Oldest first."""
        rows = self._run("SELECT * FROM refusal ORDER BY at_ns")
        return [Refusal(Operation(operation), *fields) for operation, *fields in rows]

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
        return [PresentRow(*row) for row in self._run("SELECT * FROM present ORDER BY key")]

    def layers(self) -> list[LayerRow]:
        return [LayerRow(*row) for row in self._run("SELECT id, ino, seen FROM layer ORDER BY ino, id")]

    def gone(self) -> list[tuple[ObjectKey, ETag | None]]:
        return list(self._run("SELECT key, etag FROM gone"))

    def uploads(self) -> list[tuple[str, ObjectKey]]:
        return list(self._run("SELECT upload_id, key FROM upload"))

    def intents(self) -> list[Intent]:
        return [Intent(*row) for row in self._run("SELECT id, key, at_ns FROM intent")]

"""Bytes that could not be stored, kept where a person finds them: the directory `saved/` of one volume. Owns it.

An entry is `ID.data`, a sparse file with the bytes, and `ID.json`, a note of what they were; `ID.ext` is the log of
the ranges where the file holds only some. Nothing is ever dropped here but by `drop`, for its user. What has to wait
for the store while nothing is mounted lies here too, and is taken back by the next mount.

Standard library only: the commands read it without a mount.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from phfs_fuse.config import json_text
from phfs_fuse.config.dirs import make_private
from phfs_fuse.host.locks import unused_stamp

NAME: Final = "saved"
_SUFFIXES: Final = (".json", ".ext", ".data")  # in this order when they are put here: the note comes first
_BLOCK_BYTES: Final = 512  # Source: stat(2), st_blocks
NOTE_BYTES_MAX: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Entry:
    """`bytes` are those that it takes on the disk. The note of an entry of an older version is empty."""

    id: str
    data: Path
    bytes: int
    note: Mapping[str, Any]

    @property
    def size(self) -> int:
        """As a file."""
        return self.data.stat().st_size

    @property
    def is_whole(self) -> bool | None:
        """Whether it holds all bytes of the file; None: not known."""
        return None if "ranges" not in self.note else self.note["ranges"] is None

    @property
    def is_waiting(self) -> bool:
        """Whether the next mount tries to store it."""
        return "layer" in self.note


class Saved:
    def __init__(self, directory: Path, limit: int | None = None) -> None:
        """`limit`: bytes that may lie here, None: any number."""
        self.directory = directory
        self.limit = limit
        self._missing = 0  # bytes that found no room last
        self._seen = (-1, 0, 0)  # when the directory changed last; entries, and bytes, in it

    @property
    def usage(self) -> tuple[int, int]:
        """(entries, bytes that they take on the disk)."""
        try:
            changed = self.directory.stat().st_mtime_ns
        except FileNotFoundError:
            return 0, 0
        if changed != self._seen[0]:
            paths = list(self.directory.iterdir())
            count = sum(path.suffix == ".data" for path in paths)
            self._seen = changed, count, sum(map(_disk_bytes, paths))
        return self._seen[1:]

    @property
    def bytes(self) -> int:
        return self.usage[1]

    def has_room(self, size: int) -> bool:
        """Whether `size` more bytes may come here. What did not fit is remembered: see `is_full`."""
        fits = self.limit is None or self.bytes + size <= self.limit
        self._missing = 0 if fits else size
        return fits

    @property
    def is_full(self) -> bool:
        """Whether there was no room for what came last, and is none now."""
        return self._missing > 0 and self.limit is not None and self.bytes + self._missing > self.limit

    def keep(self, data: Path, note: Mapping[str, Any]) -> Path | None:
        """Move `data`, and the log of its ranges beside it, here; None: it is not there. Raises: OSError."""
        if not data.exists():
            return None
        make_private(self.directory)
        target = self.directory / f"{unused_stamp(self.directory)}-{data.name}"
        _write(target.with_suffix(".json"), note)
        for suffix in _SUFFIXES[1:]:
            with contextlib.suppress(FileNotFoundError):
                data.with_suffix(suffix).rename(target.with_suffix(suffix))
        return target

    def take_back(self, data: Path, layer_id: int, ino: int) -> None:
        """Move what waits here for that layer of that file back to `data`, if there is such an entry."""
        for path in self._notes():
            if _read(path).get("layer") == [layer_id, ino]:
                for suffix in _SUFFIXES[1:]:
                    with contextlib.suppress(FileNotFoundError):
                        path.with_suffix(suffix).rename(data.with_suffix(suffix))
                path.unlink()

    def _notes(self) -> list[Path]:
        return sorted(self.directory.glob("*.json"))

    def entries(self) -> list[Entry]:
        """Oldest first."""
        found = []
        for data in sorted(self.directory.glob("*.data")):
            size = sum(_disk_bytes(data.with_suffix(suffix)) for suffix in _SUFFIXES)
            found.append(Entry(data.stem, data, size, _read(data.with_suffix(".json"))))
        return found

    def export(self, entry: Entry, target: Path) -> None:
        """A copy, with holes where it holds no bytes. Raises: OSError (EEXIST)."""
        with entry.data.open("rb") as source, target.open("xb") as copy:
            shutil.copyfileobj(source, copy)

    def drop(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            for suffix in _SUFFIXES:
                entry.data.with_suffix(suffix).unlink(missing_ok=True)


def _disk_bytes(path: Path) -> int:
    try:
        return path.stat().st_blocks * _BLOCK_BYTES
    except FileNotFoundError:
        return 0


def _write(path: Path, note: Mapping[str, Any]) -> None:
    beside = path.with_suffix(".new")
    with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "w") as file:
        json.dump(note, file)
    beside.rename(path)


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            note = json_text.parse(file.read(NOTE_BYTES_MAX))
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}

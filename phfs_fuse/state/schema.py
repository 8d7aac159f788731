"""The tables of the journal and what a row of each is. Owns nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

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
CREATE TABLE IF NOT EXISTS intent (id INTEGER PRIMARY KEY, key TEXT NOT NULL, at_ns INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS claim (key TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS attempt (key TEXT NOT NULL, size INTEGER NOT NULL, metadata TEXT NOT NULL,
    PRIMARY KEY (key, size, metadata)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS act (
    pid INTEGER PRIMARY KEY, op TEXT NOT NULL, parent INTEGER NOT NULL, name BLOB NOT NULL,
    to_parent INTEGER NOT NULL, to_name BLOB NOT NULL, ino INTEGER NOT NULL, seq INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS conflict (
    path BLOB NOT NULL, kept_as BLOB NOT NULL, outside INTEGER NOT NULL, at_ns INTEGER NOT NULL,
    PRIMARY KEY (path, kept_as)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS refusal (
    operation TEXT NOT NULL, key TEXT NOT NULL, path BLOB NOT NULL, reason TEXT NOT NULL, errno INTEGER NOT NULL,
    at_ns INTEGER NOT NULL, PRIMARY KEY (key, operation)) WITHOUT ROWID;
"""

# What is carried over from a damaged file.
TABLES: Final = ("present", "layer", "gone", "upload", "intent", "attempt", "claim", "conflict", "refusal")


class PresentRow(NamedTuple):
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
class Intent:
    """A multipart upload of `key` that was asked for at `at_ns`, by the store's clock, and has no id yet."""

    id: int
    key: ObjectKey
    at_ns: int


@dataclass(frozen=True, slots=True)
class ConflictRow:
    """The bytes that lost `path` were kept as `kept_as`: beside it, both below the mount point, or `outside` as a
    file of this machine; empty if there were none to keep."""

    path: bytes
    kept_as: bytes
    outside: bool
    at_ns: int

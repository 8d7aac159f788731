"""What the kernel was told: inode numbers, references, places in open directories. Owns `kernel.log`, and the places.

A worker that resumes the connection of one that died has to know the same numbers. Each record is written before the
reply that hands something out, in one append, and holds absolute values: the last one counts. The page cache keeps
it over the death of the process; nothing here has to survive the end of the connection, so nothing is synced.

Records: first the format; `node` (an inode as it was told), `refs` (see `Refs`), `position` (a directory stream:
cookie and key of the last name that was given), `places` (of an open directory: names and cookies that a reader was
given, or that the last one is gone).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import marshal
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import trio

from phfs_fuse import __version__
from phfs_fuse.errors import LocalStateError
from phfs_fuse.tree.directory_cookies import DirectoryCookies, Told, restored
from phfs_fuse.tree.inodes import Inodes
from phfs_fuse.tree.node import Node, Pages
from phfs_fuse.types import ETag, Ino, ObjectKey

log = logging.getLogger(__name__)

_HEAD: Final = struct.Struct("<II")  # length and CRC-32 of the body
_MARSHAL: Final = 4  # the format of all Pythons since 3.4
FORMAT: Final = 1
_FORMAT, _NODE, _REFS, _POSITION, _PLACES = 0, 1, 2, 3, 4
PAGES, SIZE = 1, 2  # of `Refs.beliefs`
COMPACT_BYTES: Final = 16 << 20  # beyond twice what was needed last time
COMPACT_BATCH: Final = 500  # nodes between two looks at the event loop


class Refs(NamedTuple):
    """`writers` are those of `opens` that may write."""

    lookups: int
    opens: int
    writers: int
    beliefs: int = 0  # what the kernel may believe that is not so: PAGES, SIZE


class NodeRecord(NamedTuple):
    """An inode as it was told. `seq` is the number of the last local change to it."""

    ino: Ino
    parent: int  # 0: the root
    name: bytes
    segment: str
    detached: bool
    seq: int
    mode: int
    uid: int
    gid: int
    rdev: int
    mtime_ns: int
    ctime_ns: int
    xattrs: dict[bytes, bytes] | None
    link: bytes | None
    size: int
    base: tuple[ObjectKey, ETag, int] | None
    marker: ETag | None
    own_attrs: bool
    displaced: bool = False  # detached because others have taken the name


class LoggedState(NamedTuple):
    """What the log says at the time of a resume."""

    nodes: dict[int, NodeRecord]
    refs: dict[int, Refs]
    positions: dict[int, tuple[int, bytes]]  # by handle of the directory stream


def _record(node: Node, displaced: bool) -> NodeRecord:
    base = node.base
    return NodeRecord(
        ino=node.ino,
        parent=node.parent.ino if node.parent else 0,
        name=node.name,
        segment=node.segment,
        detached=node.detached,
        seq=node.seq,
        mode=node.mode,
        uid=node.uid,
        gid=node.gid,
        rdev=node.rdev,
        mtime_ns=node.mtime_ns,
        ctime_ns=node.ctime_ns,
        xattrs=dict(node.xattrs) if node.xattrs else None,
        link=node.link,
        size=node.size,
        base=(base.key, base.etag, base.size) if base else None,
        marker=node.marker,
        own_attrs=node.own_attrs,
        displaced=displaced,
    )


def _packed(kind: int, *fields: Any) -> bytes:
    body = marshal.dumps((kind, *fields), _MARSHAL)
    return _HEAD.pack(len(body), zlib.crc32(body)) + body


def _refs(node: Node) -> bytes:
    beliefs = PAGES * (node.pages is not Pages.TRUE) | SIZE * node.misjudged
    return _packed(_REFS, node.ino, node.lookups, node.opens, node.writers, *(beliefs,) * bool(beliefs))


class KernelLog:
    """The log of one connection. Every call that notes something is one append, atomic towards a crash."""

    def __init__(self, path: Path, inodes: Inodes, make_room: Callable[[], None] = lambda: None) -> None:
        """`make_room` is called when the disk is full."""
        self._path = path
        self._make_room = make_room
        self._inodes = inodes
        self._fd = -1
        self._next_fd = -1  # while the log is being made anew, it is written twice
        self._bytes = self._needed_bytes = 0
        self._is_torn = False
        self._positions: dict[int, tuple[int, bytes]] = {}
        self._places: dict[int, DirectoryCookies] = {}  # of directories that have readers

    def _node(self, node: Node) -> bytes:
        return _packed(_NODE, *_record(node, self._inodes.is_displaced(node)))

    @staticmethod
    def check(path: Path) -> None:
        """Raises: LocalStateError if a worker of this version cannot go on from the log at `path`."""
        _, found = next(_records(path), (0, ()))
        if found != (_FORMAT, FORMAT):
            raise LocalStateError(
                f"{path} is not of the format that phfs {__version__} reads: unmount, and mount anew"
            )

    def load(self) -> LoggedState:
        """What the process before noted; a torn record at the end belongs to a reply that was not given.
        Raises: LocalStateError."""
        self.check(self._path)
        known = LoggedState({}, {}, {})
        told: dict[int, list[Told]] = {}
        for at, (kind, *fields) in _records(self._path):
            self._bytes = at
            if kind == _NODE:
                record = NodeRecord(*fields)
                known.nodes[record.ino] = record
            elif kind == _REFS:
                known.refs[fields[0]] = Refs(*fields[1:])
            elif kind == _POSITION:
                fh, cookie, after = fields
                if cookie < 0:
                    known.positions.pop(fh, None)
                else:
                    known.positions[fh] = (cookie, after)
            elif kind == _PLACES:
                ino, *page = fields
                if page:
                    told.setdefault(ino, []).append(Told(*page))
                else:
                    told.pop(ino, None)
        self._positions = dict(known.positions)
        self._places = {ino: restored(pages) for ino, pages in told.items()}
        return known

    def go_on(self) -> None:
        """Append to the log that was loaded. Raises: OSError."""
        self._fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        os.ftruncate(self._fd, self._bytes)  # what follows a torn record would not be found
        self._needed_bytes = self._bytes

    def begin(self) -> None:
        """Start a log for a new connection. Raises: OSError."""
        self._bytes = 0
        self._fd = self._next_file()
        self._append(_packed(_FORMAT, FORMAT))
        for node in list(self._inodes.all()):
            self._append(self._snapshot(node))
        self._replace()

    def close(self) -> None:
        for fd in (self._fd, self._next_fd):
            if fd >= 0:
                os.close(fd)
        self._fd = self._next_fd = -1

    # ---- before a reply ----

    def told(self, node: Node) -> None:
        """A reply will hand out one more reference to `node`: counted and noted."""
        node.lookups += 1
        self.referred(node)

    def referred(self, node: Node) -> None:
        """References to `node` have changed."""
        if node.noted:
            self._append(_refs(node))
        else:
            self._append(self._node(node) + _refs(node))
            node.noted = True

    def told_all(self, nodes: Iterable[Node], fh: int, ino: int, told: Told) -> None:
        """A page of the stream `fh` of the directory `ino` hands out `nodes`, and the places `told`."""
        out = bytearray()
        for node in nodes:
            node.lookups += 1
            if not node.noted:
                out += self._node(node)
                node.noted = True
            out += _refs(node)
        self._positions[fh] = position = (told.cookies[-1], told.keys[-1])
        self._append(out + _packed(_POSITION, fh, *position) + _packed(_PLACES, ino, *told))

    def places(self, folder: Node) -> DirectoryCookies:
        """Those of a directory that gets one more reader."""
        places = self._places.setdefault(folder.ino, DirectoryCookies(folder.gaps))
        places.readers += 1
        return places

    def stream_closed(self, fh: int, folder: Node) -> None:
        """The reader `fh` of a directory is gone; with the last one go the places."""
        if self._positions.pop(fh, None) is not None:
            self._append(_packed(_POSITION, fh, -1, b""))
        places = self._places[folder.ino]
        places.readers -= 1
        if not places.readers:
            del self._places[folder.ino]
            self._append(_packed(_PLACES, folder.ino))

    def forgotten(self, nodes: Iterable[Node]) -> None:
        self._append(b"".join(map(_refs, nodes)))

    def changed(self, node: Node) -> None:
        """What the kernel may know of `node` (its name, its version) is otherwise now."""
        if node.noted:
            self._append(self._node(node))

    # ---- the file ----

    def _append(self, data: bytes | bytearray) -> None:
        if not data:
            return
        for fd in (self._fd, self._next_fd):
            if fd >= 0:
                self._write(fd, data)
        self._bytes += len(data)

    def _write(self, fd: int, data: bytes | bytearray) -> None:
        """A disk that is full must not stop who reads or closes: the log is then made anew when there is room."""
        try:
            try:
                _write_whole(fd, data)
            except OSError:
                self._make_room()
                _write_whole(fd, data)
        except OSError as exc:
            if not self._is_torn:
                log.error("%s cannot be written, a worker that died could not be replaced: %s", self._path, exc)
            self._is_torn = True

    @property
    def wants_compaction(self) -> bool:
        return self._is_torn or self._bytes > 2 * self._needed_bytes + COMPACT_BYTES

    async def compact(self) -> None:
        """Write the log anew with what counts, a few nodes at a time. Raises: OSError."""
        was_torn = self._is_torn
        self._next_fd = self._next_file()
        self._is_torn = False
        try:
            self._write(self._next_fd, _packed(_FORMAT, FORMAT))
            nodes = list(self._inodes.all())
            for at in range(0, len(nodes), COMPACT_BATCH):
                self._write(self._next_fd, b"".join(map(self._snapshot, nodes[at : at + COMPACT_BATCH])))
                await trio.lowlevel.checkpoint()
            for fh, position in self._positions.items():
                self._write(self._next_fd, _packed(_POSITION, fh, *position))
            for ino, places in list(self._places.items()):
                for told in places.told():
                    self._write(self._next_fd, _packed(_PLACES, ino, *told))
                    await trio.lowlevel.checkpoint()
            if self._is_torn:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except BaseException:
            self._is_torn = self._is_torn or was_torn
            os.close(self._next_fd)
            self._next_fd = -1
            raise
        os.close(self._fd)
        self._fd, self._next_fd = self._next_fd, -1
        self._replace()

    def _snapshot(self, node: Node) -> bytes:
        if not (node.noted or node.lookups or node.opens):
            return b""
        node.noted = True
        return self._node(node) + _refs(node)

    def _next_file(self) -> int:
        path = self._path.with_suffix(".new")
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def _replace(self) -> None:
        os.replace(self._path.with_suffix(".new"), self._path)
        self._bytes = self._needed_bytes = os.fstat(self._fd).st_size


def _write_whole(fd: int, data: bytes | bytearray) -> None:
    """Raises: OSError; then nothing is there of `data`, which would hide what follows."""
    if (count := os.write(fd, data)) != len(data):
        os.ftruncate(fd, os.fstat(fd).st_size - count)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _records(path: Path) -> Iterator[tuple[int, Any]]:
    """Each whole record, with the offset of its end."""
    raw = b""
    with contextlib.suppress(FileNotFoundError):
        raw = path.read_bytes()
    at = 0
    while at + _HEAD.size <= len(raw):
        length, crc = _HEAD.unpack_from(raw, at)
        body = raw[at + _HEAD.size : at + _HEAD.size + length]
        if len(body) < length or zlib.crc32(body) != crc:
            return
        at += _HEAD.size + length
        yield at, marshal.loads(body)

"""Brings back after a restart what was dirty: journal rows and staging files become nodes, layers and deletes."""

from __future__ import annotations

import errno
import logging
import os
import stat
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from phfs_fuse import keys
from phfs_fuse.attrs import Attrs
from phfs_fuse.config import json_text
from phfs_fuse.errors import IllegalName
from phfs_fuse.state.journal import Journal
from phfs_fuse.state.schema import ENDED, LayerRow, PresentRow
from phfs_fuse.state.staging import Layer, Staged, StagingArea
from phfs_fuse.tree.inodes import Inodes
from phfs_fuse.tree.node import Base, Node
from phfs_fuse.types import Ino, ObjectKey

log = logging.getLogger(__name__)


def _attrs(row: PresentRow) -> Attrs:
    xattrs = json_text.parse(row.xattrs) if row.xattrs else {}
    return Attrs(
        mode=row.mode,
        uid=row.uid,
        gid=row.gid,
        mtime_ns=row.mtime_ns,
        rdev=row.rdev,
        xattrs={bytes.fromhex(k): bytes.fromhex(v) for k, v in xattrs.items()} or None,
        link=row.link,
    )


class Recovery:
    """One pass over the journal, before the first request is served. `directory` makes an unknown folder."""

    def __init__(self, journal: Journal, area: StagingArea, inodes: Inodes, directory: Callable[[], Attrs]) -> None:
        self._journal = journal
        self._area = area
        self._inodes = inodes
        self._directory = directory
        self._prefix = inodes.key(inodes.root)
        self.saved: list[Path] = []  # what could not be placed

    def nodes(self) -> list[tuple[Node, PresentRow]]:
        """Every file and marker that the store lacks, in the tree again. Bytes that cannot be placed are saved
        aside; nothing is deleted but what was known to be unreachable (unlinked files)."""
        layers: dict[Ino, list[LayerRow]] = defaultdict(list)
        for layer in self._journal.layers():
            layers[layer.ino].append(layer)
        for layer in layers.pop(ENDED, []):
            self._area.unlink(layer.id)
        self._journal.forget_ended()
        for rows in layers.values():
            for layer in rows:
                self._area.saved.take_back(self._area.path(layer.id), layer.id, layer.ino)
        known = {layer.id for rows in layers.values() for layer in rows}
        found = []
        for row in self._journal.present():
            rows = layers.pop(row.ino, [])
            place = self._open_still if row.detached else self._place
            if (node := place(row, rows)) is not None:
                found.append((node, row))
        for rows in layers.values():
            for layer in rows:
                self._save_aside(self._area.path(layer.id))
        for path in self._area.orphans(known.__contains__):
            if path.suffix == ".data" and _has_bytes(path):
                self._save_aside(path)
            else:
                path.unlink(missing_ok=True)  # no byte was written, or its log went with the data
        return found

    def _open_still(self, row: PresentRow, rows: list[LayerRow]) -> Node | None:
        """An unlinked file goes on if it is open (after a resume); else nobody can read it again."""
        node = self._inodes.find(row.ino)
        if node is None or not node.opens:
            self._drop(row, rows)
            return None
        node.set_attrs(_attrs(row))
        self._content(node, row, self._layers(rows))
        return node

    def _layers(self, rows: list[LayerRow]) -> list[Layer]:
        return [self._area.reopen(layer.id, layer.seen) for layer in rows]

    def _drop(self, row: PresentRow, layers: list[LayerRow]) -> None:
        for layer in layers:
            self._area.unlink(layer.id)
        self._journal.drop(row.ino)

    def _place(self, row: PresentRow, rows: list[LayerRow]) -> Node | None:
        if row.ino == self._inodes.root.ino:
            node = self._inodes.root
            node.set_attrs(_attrs(row))
            if node.is_dir:
                node.own_attrs = row.own_attrs
            return node
        try:
            layers = self._layers(rows)
            parent, name = self._parent(row)
        except (OSError, IllegalName, ValueError) as exc:
            log.error("dirty file key=%s cannot be placed, its bytes are saved aside: %s", row.key, exc)
            for layer in rows:
                self._save_aside(self._area.path(layer.id), key=row.key, reason=str(exc))
            self._journal.drop(row.ino)
            return None
        node = self._node(row, parent, name)
        node.set_attrs(_attrs(row))
        if node.is_dir:
            node.own_attrs = row.own_attrs
        self._content(node, row, layers)
        return node

    def _node(self, row: PresentRow, parent: Node, name: bytes) -> Node:
        """The node of `row`, at its place in the tree: a known one, or a new one."""
        assert parent.kids is not None
        there = parent.kids.get(name)
        known = self._inodes.find(row.ino)
        if there is not None and there is not known:
            if known is None and there.is_dir and stat.S_ISDIR(row.mode):
                self._journal.drop(row.ino)  # a folder that another row needed was made without its attributes
                return there
            self._inodes.detach(there)  # clean, and replaced
            there = None
        if known is None:
            known = self._inodes.new(_attrs(row), ctime_ns=row.ctime_ns, ino=row.ino)
        if there is None:
            if known.parent is not None and not known.detached:
                self._inodes.move(known, parent, name)
            else:
                self._inodes.attach(parent, name, known, self._segment(row))
        return known

    def _content(self, node: Node, row: PresentRow, layers: list[Layer]) -> None:
        if row.base_key is not None and row.base_etag is not None and row.base_size is not None:
            node.base = Base(row.base_key, row.base_etag, row.base_size)
            node.size = row.base_size if row.link is None else len(row.link)
        if layers:
            node.staged = Staged(layers)
            node.size = node.staged.size

    def _segment(self, row: PresentRow) -> str:
        return _placed(row).rpartition("/")[2]

    def _parent(self, row: PresentRow) -> tuple[Node, bytes]:
        if not row.key.startswith(self._prefix):
            raise ValueError(f"key is not below {self._prefix}")
        at = self._inodes.root
        *folders, _ = _placed(row).removeprefix(self._prefix).split("/")
        for segment in folders:
            name = keys.name_of(segment)
            assert at.kids is not None
            if name not in at.kids:
                folder = self._inodes.new(self._directory(), ctime_ns=time.time_ns())
                self._inodes.attach(at, name, folder)
            at = at.kids[name]
            if not at.is_dir:
                raise ValueError(f"{name!r} is a file")
        return at, row.name

    def _save_aside(self, path: Path, *, key: str = "", reason: str = "the journal knows no file of it") -> None:
        note = {"path": "", "key": key, "reason": reason, "at": time.time()}
        if (target := self._area.save_aside(path, note)) is not None:
            self.saved.append(target)

    def gone(self) -> list[tuple[ObjectKey, str | None]]:
        return list(self._journal.gone())


def _placed(row: PresentRow) -> str:
    """The key, without the slash of a directory; the bytes of a marker are a file whose segment is empty."""
    return row.key.removesuffix("/") if stat.S_ISDIR(row.mode) else row.key


def _has_bytes(path: Path) -> bool:
    """Whether anything was written to a sparse file; where its file system does not tell, yes."""
    with path.open("rb") as file:
        try:
            os.lseek(file.fileno(), 0, os.SEEK_DATA)
        except OSError as exc:
            return exc.errno != errno.ENXIO  # Source: lseek(2)
    return True

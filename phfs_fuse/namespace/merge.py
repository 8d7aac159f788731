"""Merges answers of the store into the tree. Owns no state; no I/O, no await: each call is atomic.

It brings nodes into the tree, refreshes them, and replaces a node by a new one when another client has stored a new
version (the old one stays with those who have it open). An answer never displaces what is newer than its `Question`,
nor does it bring back what is deleted here. The caller has looked that the folder is still the one that was asked
about.
"""

from __future__ import annotations

import stat
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from phfs_fuse import keys
from phfs_fuse.attrs import STORED, Attrs, others
from phfs_fuse.namespace.name_cache import NameCache
from phfs_fuse.pending.changes import Changes
from phfs_fuse.store.base import ObjectInfo, metadata_bytes
from phfs_fuse.tree.default_attrs import DefaultAttrs
from phfs_fuse.tree.inodes import Inodes
from phfs_fuse.tree.node import Base, Node
from phfs_fuse.tree.questions import Question


def _others_bytes(info: ObjectInfo) -> int:
    """The size of the user metadata that is no attribute of ours."""
    if not info.metadata or info.metadata.keys() <= STORED:
        return 0
    return metadata_bytes(others(info.metadata, same_bytes=True))


class Merge:
    def __init__(self, inodes: Inodes, changes: Changes, known: NameCache, defaults: DefaultAttrs) -> None:
        self._inodes = inodes
        self._changes = changes
        self._known = known
        self._defaults = defaults

    def asking(self, parent: Node) -> AbstractContextManager[Question]:
        """While the store is asked about names in `parent`, until the answer is merged. May be held over an await."""
        return self._inodes.asking(parent, self._changes.seq)

    @contextmanager
    def walking(self, parent: Node) -> Iterator[Question]:
        """The same for all pages of a listing. What was kept because of them is let go of then."""
        try:
            with self.asking(parent) as question:
                yield question
        finally:
            for node in question.kept:
                self._inodes.drop_unused(node)

    def ask_anew(self, question: Question) -> None:
        """What `question` is told from now on is as old as this moment."""
        question.put(self._changes.seq, self._inodes.questions.moment())

    def absent(self, parent: Node, name: bytes, question: Question) -> None:
        """The store has nothing of that name."""
        node = (parent.kids or {}).get(name)
        if node is None or question.predates(node) or self._holds_local(node):
            return
        self._inodes.displace(node)
        if name in question.heard:
            self._inodes.incomplete(parent)

    def local_only(self, parent: Node) -> list[Node]:
        """Children that a listing of the store may lack."""
        return [kid for kid in (parent.kids or {}).values() if kid.dirty is not None or self._holds_local(kid)]

    def _holds_local(self, node: Node) -> bool:
        """Whether a directory has something in it that exists only here."""
        return node.is_dir and any(n.dirty is not None for n in self._inodes.descendants(node))

    def _is_newer(self, parent: Node, name: bytes, node: Node | None, question: Question) -> bool:
        """Whether the tree, which shows `node` under `name`, knows better than the answer that there is something."""
        if node is not None:
            return question.predates(node)
        return name not in question.heard and self._known.missing_at(parent, name) > question.at

    # ---- files ----

    def file(self, parent: Node, segment: str, name: bytes, info: ObjectInfo, question: Question) -> Node | None:
        """The store has object `info` for `name`; returns the node that shows it now, or what we have instead."""
        assert parent.kids is not None
        node = parent.kids.get(name)
        if self._is_newer(parent, name, node, question) or self._changes.hides(info, question.seq):
            return node
        if node is not None:
            if self._shows(node, segment, name, info):
                node.checked_at = max(node.checked_at, question.at)
                return node
            if node.is_dir and self._holds_local(node):
                if not self._changes.shadowed(node):
                    return node
            else:
                self._inodes.displace(node)
        return self._new_file(parent, segment, name, info, question)

    def _shows(self, node: Node, segment: str, name: bytes, info: ObjectInfo) -> bool:
        """Whether `node` is that version; takes on attributes that somebody else has given to it."""
        if node.is_dir or (base := node.base) is None or (base.key, base.etag) != (info.key, info.etag):
            return False
        if info.metadata is None:
            return True
        attrs = self._attrs(segment, name, info)
        if stat.S_IFMT(attrs.mode) != stat.S_IFMT(node.mode):
            return False
        node.others_bytes, node.is_sealed = _others_bytes(info), info.is_sealed
        if attrs != node.attrs:
            node.set_attrs(attrs)
            node.ctime_ns = info.modified_ns
            self._changes.refreshed(node)
        return True

    def _attrs(self, segment: str, name: bytes, info: ObjectInfo) -> Attrs:
        attrs = self._defaults.stored(info, self._defaults.file(info.modified_ns))
        if segment.endswith(keys.RCLONE_LINK) and not name.endswith(keys.RCLONE_LINK.encode()):
            return Attrs(mode=stat.S_IFLNK | 0o777, uid=attrs.uid, gid=attrs.gid, mtime_ns=attrs.mtime_ns)
        return attrs

    def _new_file(self, parent: Node, segment: str, name: bytes, info: ObjectInfo, question: Question) -> Node:
        attrs = self._attrs(segment, name, info)
        node = self._inodes.new(attrs, ctime_ns=info.modified_ns)
        node.size = info.size if attrs.link is None else len(attrs.link)
        node.others_bytes, node.is_sealed = _others_bytes(info), info.is_sealed
        self._attach(parent, name, node, segment, question)
        node.base = Base(info.key, info.etag, info.size)
        return node

    def _attach(self, parent: Node, name: bytes, node: Node, segment: str, question: Question) -> None:
        node.checked_at = question.at
        if name in question.heard:
            node.doubted_at = self._inodes.questions.moment()
        self._inodes.attach(parent, name, node, segment)

    # ---- folders ----

    def folder(self, parent: Node, segment: str, marker: ObjectInfo | None, question: Question) -> Node | None:
        """The store has keys below `segment/` that are not deleted here, and `marker` among them if that is not
        None."""
        assert parent.kids is not None
        name = keys.name_of(segment)
        node = parent.kids.get(name)
        if (node is None or not node.is_dir) and self._is_newer(parent, name, node, question):
            return node
        if node is not None and not node.is_dir:
            self._inodes.displace(node)  # from now on shown as name + OBJECT_BESIDE
            node = None
        if node is None:
            node = self._inodes.new(self._defaults.directory(), ctime_ns=time.time_ns())
            self._attach(parent, name, node, segment, question)
            if self._inodes.key(node) in self._changes.gone:
                self._changes.reappears(node)
        if self.marker(node, marker, question) or node.checked_at > node.doubted_at:
            node.checked_at = max(node.checked_at, question.at)
        return node

    def marker(self, folder: Node, marker: ObjectInfo | None, question: Question) -> bool:
        """The store has this marker of `folder`, or none. Returns whether that tells its attributes."""
        is_news = not question.predates(folder)
        if is_news:
            self.set_marker(folder, marker)
        if marker is None or not marker.size:
            if folder.body is not None:
                self.absent(folder, keys.BODY, question)
        elif marker.etag != folder.marker:  # else its bytes were removed here
            self.file(folder, "", keys.BODY, marker, question)
        return is_news

    def set_marker(self, folder: Node, marker: ObjectInfo | None) -> None:
        """As `marker`, when nothing was changed here yet."""
        if marker is None:
            folder.marker = None
            return
        if folder.marker == marker.etag and marker.metadata is None:
            return
        folder.marker = marker.etag if not marker.size else None  # bytes are a file's
        folder.others_bytes = _others_bytes(marker)
        folder.set_attrs(self._defaults.stored(marker, self._defaults.directory(marker.modified_ns)))
        folder.own_attrs = self._defaults.differs(folder.attrs)

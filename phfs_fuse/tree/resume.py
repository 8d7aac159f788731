"""Puts the tree back as the kernel knows it, for a worker that resumes the connection of one that died.

Pure over what `KernelLog.load` and the journal found: every inode that the kernel refers to gets its number, its
references and its place again. What is clean is believed no longer than it takes to ask the store.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence

from phfs_fuse.attrs import Attrs
from phfs_fuse.keys import segment_of
from phfs_fuse.tree.inodes import Inodes
from phfs_fuse.tree.kernel_log import PAGES, SIZE, LoggedState, NodeRecord, Refs
from phfs_fuse.tree.node import Base, Node, Pages
from phfs_fuse.types import ROOT_INO, Act, Ino

log = logging.getLogger(__name__)

NO_REFS = Refs(0, 0, 0)
Done = Sequence[tuple[Act, Ino, int]]
"""What was done last by each thread, with the file and the number of the change, oldest first."""


def _newest(known: LoggedState, done: Done) -> dict[int, NodeRecord]:
    """The records, with what was committed after them."""
    nodes = dict(known.nodes)
    for act, ino, seq in done:
        record = nodes.get(ino)
        if record is None or record.seq >= seq:
            continue
        if act.op == "rename":
            segment = segment_of(act.to_name)
            nodes[ino] = record._replace(parent=act.to_parent, name=act.to_name, segment=segment, seq=seq)
        elif act.op in ("unlink", "rmdir"):
            nodes[ino] = record._replace(detached=True, seq=seq)
    return nodes


def _needed(nodes: Mapping[int, NodeRecord], refs: Mapping[int, Refs]) -> Iterable[NodeRecord]:
    """What is referred to, and the directories above it."""
    wanted: dict[int, NodeRecord] = {}
    for ino in nodes:
        counts = refs.get(ino, NO_REFS)
        if counts.lookups or counts.opens:
            at = nodes.get(ino)
            while at is not None and at.ino not in wanted:
                wanted[at.ino] = at
                at = nodes.get(at.parent)
    return wanted.values()


def _attrs(record: NodeRecord) -> Attrs:
    return Attrs(
        mode=record.mode,
        uid=record.uid,
        gid=record.gid,
        mtime_ns=record.mtime_ns,
        rdev=record.rdev,
        xattrs=record.xattrs,
        link=record.link,
    )


def _fill(node: Node, record: NodeRecord, refs: Refs) -> None:
    node.noted = True
    node.set_name(record.name, record.segment)  # before `base`, which shares it
    node.seq = record.seq
    node.size = record.size
    node.base = Base(*record.base) if record.base else None
    if node.is_dir:
        node.marker, node.own_attrs = record.marker, record.own_attrs
    node.lookups, node.opens, node.writers = refs.lookups, refs.opens, refs.writers
    node.pages = Pages.DOUBTED if refs.beliefs & PAGES else Pages.TRUE
    node.misjudged = bool(refs.beliefs & SIZE)


def last_change(known: LoggedState, done: Done) -> int:
    """The number of the last local change that was noted: new ones come after it."""
    noted = [record.seq for record in known.nodes.values()]
    return max([*noted, *(seq for _, _, seq in done)], default=0)


def restore(inodes: Inodes, known: LoggedState, done: Done) -> None:
    """Fill the empty tree of `inodes`."""
    records = list(_needed(_newest(known, done), known.refs))
    nodes: dict[int, Node] = {ROOT_INO: inodes.root}
    for record in records:
        counts = known.refs.get(record.ino, NO_REFS)
        if record.ino == ROOT_INO:
            inodes.root.set_attrs(_attrs(record))
            _fill(inodes.root, record, counts._replace(lookups=max(1, counts.lookups)))
            continue
        node = inodes.new(_attrs(record), ctime_ns=record.ctime_ns, ino=record.ino)
        _fill(node, record, counts)
        nodes[record.ino] = node
    for record in sorted(records, key=lambda record: -record.seq):  # the newest owner of a name has it
        if record.ino != ROOT_INO:
            _place(inodes, nodes.get(record.parent, inodes.root), nodes[record.ino], record)
    log.info("resumed with inodes=%d", len(inodes))


def _place(inodes: Inodes, parent: Node, node: Node, record: NodeRecord) -> None:
    if record.detached or parent.kids is None or record.name in parent.kids:
        node.parent, node.detached = parent, True
        if record.displaced:
            inodes.mark_displaced(node)
    else:
        inodes.attach(parent, record.name, node, record.segment)

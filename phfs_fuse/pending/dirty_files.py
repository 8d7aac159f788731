"""The dirty files: those of which something is not in the store yet. Owns the set of them and their journal rows.

No I/O but the journal's, and no await.
"""

from __future__ import annotations

import json

import trio

from phfs_fuse.errors import PhfsError
from phfs_fuse.pending.refusals import Refusals
from phfs_fuse.pending.waiters import Waiters
from phfs_fuse.state.journal import Journal
from phfs_fuse.state.refusal import Operation, Refusal
from phfs_fuse.state.schema import PresentRow
from phfs_fuse.tree.dirty import DirtyFile
from phfs_fuse.tree.inodes import Inodes
from phfs_fuse.tree.kernel_log import KernelLog
from phfs_fuse.tree.node import Node
from phfs_fuse.types import ETag, Ino


class DirtyFiles:
    def __init__(
        self, inodes: Inodes, journal: Journal, kernel: KernelLog, endings: Waiters, refusals: Refusals
    ) -> None:
        self._refusals = refusals
        self._inodes = inodes
        self._journal = journal
        self._kernel = kernel
        self._endings = endings
        self._nodes: dict[Ino, Node] = {}

    def waiting(self) -> list[Node]:
        """Those that have a name."""
        return [node for node in self._nodes.values() if not node.detached]

    def begin(self, node: Node, over: ETag | None) -> DirtyFile:
        """`node` is one from now on; the caller notes it by `save`."""
        self._keep(node)
        dirty = node.dirty = DirtyFile(over=over, since=trio.current_time())
        self._nodes[node.ino] = node
        return dirty

    def take_back(self, node: Node) -> None:
        """It is none after all. Notes nothing."""
        self._keep(node)
        node.dirty = None
        self._nodes.pop(node.ino, None)

    def _keep(self, node: Node) -> None:
        transaction = self._journal.transaction
        transaction.keep(node)
        transaction.item(self._nodes, node.ino)

    def save(self, node: Node) -> None:
        """Write the row of a dirty node."""
        dirty = node.dirty
        assert dirty is not None
        base = node.base
        xattrs = node.xattrs
        self._journal.put(
            PresentRow(
                ino=node.ino,
                key=self._inodes.key(node),
                name=node.name,
                detached=node.detached,
                mode=node.mode,
                uid=node.uid,
                gid=node.gid,
                rdev=node.rdev,
                mtime_ns=node.mtime_ns,
                ctime_ns=node.ctime_ns,
                xattrs=json.dumps({k.hex(): v.hex() for k, v in xattrs.items()}).encode() if xattrs else None,
                link=node.link,
                own_attrs=node.own_attrs,
                base_key=base.key if base else None,
                base_etag=base.etag if base else None,
                base_size=base.size if base else None,
                over=dirty.over,
                attrs=dirty.attrs or dirty.uploading,  # what an upload took is not stored yet
            )
        )

    def refuse(self, node: Node, operation: Operation, exc: PhfsError) -> None:
        """The store takes no upload of `node`, for all that is known. Notes it once."""
        dirty = node.dirty
        assert dirty is not None
        refusal = Refusal.of(operation, self._inodes.key(node), self._inodes.raw_path(node), exc)
        if dirty.refusal is None or (dirty.refusal.key, dirty.refusal.reason) != (refusal.key, refusal.reason):
            with self._journal.batch():
                self._keep(node)
                self.accepted(node)
                dirty.refusal = refusal
                self._refusals.note(refusal)

    def accepted(self, node: Node) -> None:
        """The upload of `node` is not known to be refused."""
        if node.dirty is not None and (refusal := node.dirty.refusal) is not None:
            self._journal.transaction.keep(node)
            node.dirty.refusal = None
            self._refusals.accepted(refusal)

    def clean(self, node: Node) -> None:
        """Nothing of `node` waits any more."""
        with self._journal.batch():
            self.accepted(node)
            self.take_back(node)
            self._kernel.changed(node)  # before the row goes, so that one of both says what it is
            self._journal.drop(node.ino)
        self._endings.announce(node)
        self._inodes.drop_unused(node)

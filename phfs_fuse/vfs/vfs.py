"""POSIX semantics: names, attributes, open files and directory streams of one mount, as the kernel asks for them.

Puts the four together that do it, and hands out references to nodes. Every method takes and returns inode numbers,
nodes and bytes; errors are `PhfsError` and `OSError` of the local disk. Owns no state of its own.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from phfs_fuse.cache.block_cache import BlockCache
from phfs_fuse.config.model import TreeConfig
from phfs_fuse.errors import PhfsError, StaleVersion
from phfs_fuse.host.saved_files import Saved
from phfs_fuse.namespace.namespace import Namespace
from phfs_fuse.pending.changes import Changes
from phfs_fuse.quota.limits import Quotas, Room
from phfs_fuse.tree.default_attrs import DefaultAttrs
from phfs_fuse.tree.inodes import Inodes
from phfs_fuse.tree.kernel_log import KernelLog
from phfs_fuse.tree.node import Node
from phfs_fuse.types import Act, Ino
from phfs_fuse.vfs.admission import Admission
from phfs_fuse.vfs.attributes import Change, FileAttrs
from phfs_fuse.vfs.directories import Directories
from phfs_fuse.vfs.exclusive_create import ExclusiveCreates
from phfs_fuse.vfs.files import OpenFiles
from phfs_fuse.vfs.readdir import DirStreams
from phfs_fuse.vfs.store_limits import StoreLimits
from phfs_fuse.writeback.sync import Sync


class Vfs:
    def __init__(
        self,
        *,
        inodes: Inodes,
        namespace: Namespace,
        blocks: BlockCache,
        changes: Changes,
        settling: Sync,
        kernel: KernelLog,
        quotas: Quotas,
        claims: ExclusiveCreates,
        defaults: DefaultAttrs,
        storable: StoreLimits,
        writable: Admission,
        saved: Saved,
        config: TreeConfig,
        write_through: bool,
    ) -> None:
        self._inodes = inodes
        self._namespace = namespace
        self._settling = settling
        self._storable = storable
        self._kernel = kernel
        self._quotas = quotas
        self._files = files = OpenFiles(
            inodes=inodes,
            blocks=blocks,
            changes=changes,
            settling=settling,
            kernel=kernel,
            quotas=quotas,
            storable=storable,
            writable=writable,
            saved=saved,
            write_through=write_through,
        )
        self._names = names = Directories(
            inodes=inodes,
            namespace=namespace,
            changes=changes,
            files=files,
            quotas=quotas,
            claims=claims,
            defaults=defaults,
            storable=storable,
            writable=writable,
            config=config,
        )
        self._streams = streams = DirStreams(inodes=inodes, namespace=namespace, kernel=kernel, settling=settling)
        attrs = FileAttrs(
            inodes=inodes,
            changes=changes,
            files=files,
            defaults=defaults,
            storable=storable,
            writable=writable,
            config=config,
        )
        # what the kernel asks for, each by the one that does it
        self.lookup, self.readlink, self.rename = names.lookup, names.readlink, names.rename
        self.create, self.mkdir, self.mknod, self.symlink = names.create, names.mkdir, names.mknod, names.symlink
        self.unlink, self.rmdir = names.unlink, names.rmdir
        self.setattr, self.getxattr, self.listxattr = attrs.setattr, attrs.getxattr, attrs.listxattr
        self.setxattr, self.removexattr = attrs.setxattr, attrs.removexattr
        self.open, self.read, self.write = files.open, files.read, files.write
        self.keeps_pages = files.keeps_pages
        self.flush, self.fsync, self.release = files.flush, files.fsync, files.release
        self.misjudged = files.misjudged
        self.opendir, self.readdir, self.told_page = streams.opendir, streams.readdir, streams.told_page
        self.list_ahead = streams.ahead.run
        self.fsyncdir, self.releasedir = streams.fsyncdir, streams.releasedir

    def resume(
        self, positions: dict[int, tuple[int, bytes]], acts: dict[int, tuple[Act, Ino]], *, damaged: bool
    ) -> None:
        """Go on for a process that died: its nodes are in the tree, with the references that it had noted.
        Its journal may have been `damaged`."""
        self._streams.resume(positions)
        self._names.resume(acts)
        self._files.resume(damaged=damaged)

    def end_resume(self) -> None:
        """What is asked for from now on is no repetition."""
        self._names.end_resume()

    @property
    def open_files(self) -> int:
        return self._files.count

    @property
    def open_writers(self) -> int:
        return self._files.writers

    # ---- references to nodes ----

    @property
    def size_max(self) -> int:
        """The largest file that the store takes."""
        return self._storable.size_max

    def getattr(self, ino: int) -> Node:
        return self._inodes.get(ino)

    def lifetime(self, node: Node) -> float:
        """For how many seconds the kernel may believe what it is told of `node`."""
        return self._namespace.lifetime(node)

    def told(self, node: Node) -> None:
        """A reply hands out one more reference to `node`."""
        self._kernel.told(node)

    def forget(self, counts: Sequence[tuple[int, int]]) -> None:
        """The kernel gives references back: (inode number, how many)."""
        nodes = [node for ino, _ in counts if (node := self._inodes.find(ino)) is not None]
        for ino, count in counts:
            self._inodes.forget(ino, count)
        self._kernel.forgotten(nodes)

    def statfs(self, ino: int) -> Room | None:
        """What a file system of which `ino` is a part would have; None: the store sets no limit."""
        node = self._inodes.find(ino)
        return self._quotas.room(self._inodes.key(node)) if self._quotas and node and not node.detached else None

    # ---- for the control socket ----

    async def settle_path(self, path: str) -> None:
        """Return when the store has the file, or all below the directory, at `path` below the mount point."""
        node = self._inodes.root
        for part in os.fsencode(path).split(b"/"):
            if part not in (b"", b"."):
                node = await self._namespace.child(node, part)
        if node.is_dir:
            await self._settling.settle_below(node)
        else:
            await self._settling.settle(node)


__all__ = ["Change", "Ino", "PhfsError", "StaleVersion", "Vfs"]

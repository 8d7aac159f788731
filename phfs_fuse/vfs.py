"""POSIX semantics over names, clean blocks and dirty bytes: the only module that combines them. Owns open files.

A file handle is the inode number and whether it may write, so it means the same after a restart. Every method takes
and returns inode numbers, nodes and bytes; errors are `PhfsError` and `OSError` of the local disk. Between the last
await and the change of the tree nothing else runs, so no locks are needed.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Sequence
from dataclasses import dataclass

import trio

from phfs_fuse import keys
from phfs_fuse.attrs import Attrs
from phfs_fuse.blocks import BlockCache, Version
from phfs_fuse.changes import Changes
from phfs_fuse.config import PosixAttrs, TreeConfig
from phfs_fuse.dirstream import DirStream, sort_key
from phfs_fuse.errors import (
    Exists,
    InvalidArgument,
    IsADirectory,
    NameTooLong,
    NoAttribute,
    NoSpace,
    NotADirectory,
    NotEmpty,
    NotFound,
    NotSupported,
    PhfsError,
    ReadOnly,
    StaleVersion,
    TooLarge,
)
from phfs_fuse.inodes import Inodes, Node
from phfs_fuse.journal import Act
from phfs_fuse.kernelstate import KernelState
from phfs_fuse.namespace import Namespace
from phfs_fuse.types import S3_OBJECT_BYTES_MAX, Fh, Ino
from phfs_fuse.writeback import Writeback

ROWS_BYTES = 4096  # of the journal, for one change
STREAM_BITS = 20  # of the handle of a directory stream: which one of its directory
STREAM_MASK = (1 << STREAM_BITS) - 1
RENAME_NOREPLACE = 1  # Source: renameat2(2)
XATTR_BYTES_MAX = 2048  # Source: S3 user guide, user metadata is limited to 2 KB


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What setattr shall set; None: leave as it is. Times in nanoseconds."""

    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    size: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None
    ctime_ns: int | None = None


class Vfs:
    def __init__(
        self,
        *,
        inodes: Inodes,
        namespace: Namespace,
        blocks: BlockCache,
        changes: Changes,
        writeback: Writeback,
        kernel: KernelState,
        config: TreeConfig,
        write_through: bool,
    ) -> None:
        self._inodes = inodes
        self._namespace = namespace
        self._blocks = blocks
        self._changes = changes
        self._writeback = writeback
        self._kernel = kernel
        self._config = config
        self._write_through = write_through
        self._streams: dict[int, DirStream] = {}
        self._stream_no = 0
        self._positions: dict[int, tuple[int, bytes]] = {}  # of streams that the process before had open
        self._acts: dict[int, tuple[Act, Ino]] = {}  # what it did last and maybe did not answer
        self.open_files = 0
        self.open_writers = 0

    def resume(self, positions: dict[int, tuple[int, bytes]], acts: dict[int, tuple[Act, Ino]]) -> None:
        """Go on for a process that died: its nodes are in the tree, with the references that it had noted."""
        self._positions = positions
        self._acts = acts
        self._stream_no = max((fh & STREAM_MASK for fh in positions), default=0)
        for node in self._inodes.all():
            if not node.is_dir:
                self.open_files += node.opens
                self.open_writers += node.writers

    def end_resume(self) -> None:
        """What is asked for from now on is no repetition."""
        self._acts.clear()

    # ---- helpers ----

    def _repeated(self, act: Act | None) -> Ino | None:
        """The file concerned, if the process before had done just this already when it died."""
        if not self._acts or act is None or (done := self._acts.pop(act.pid, None)) is None:
            return None
        return done[1] if done[0] == act else None

    def told(self, node: Node) -> None:
        """A reply hands out one more reference to `node`."""
        self._kernel.told(node)

    def told_page(self, fh: int, page: Sequence[tuple[int, Node]]) -> None:
        """A reply hands out these entries of a directory stream."""
        if page:
            cookie, last = page[-1]
            self._kernel.told_all([node for _, node in page], fh, cookie, sort_key(last))

    def _writable(self) -> None:
        """Raises: ReadOnly, OSError (ENOSPC)."""
        if self._config.read_only:
            raise ReadOnly("write", "mount", "is read-only")
        self._changes.require_some_space()

    def _may_grow(self, size: int = ROWS_BYTES) -> None:
        """Raises: ReadOnly, OSError (ENOSPC)."""
        if self._config.read_only:
            raise ReadOnly("write", "mount", "is read-only")
        self._changes.require_space(size)

    def _folder(self, ino: int) -> Node:
        node = self._inodes.get(ino)
        if not node.is_dir:
            raise NotADirectory("lookup", self._inodes.path(node))
        if node.detached:
            raise NotFound("lookup", self._inodes.path(node), "was removed")
        return node

    def _attrs(self, mode: int, uid: int, gid: int, parent: Node, rdev: int = 0) -> Attrs:
        now = time.time_ns()
        if parent.mode & stat.S_ISGID:  # Source: inode(7), set-group-ID on a directory
            gid = parent.gid
            mode |= stat.S_ISGID if stat.S_ISDIR(mode) else 0
        if self._config.posix_attrs is PosixAttrs.IGNORE:
            default = self._namespace.default_directory if stat.S_ISDIR(mode) else self._namespace.default_file
            like = default(now)
            mode, uid, gid = stat.S_IFMT(mode) | stat.S_IMODE(like.mode), like.uid, like.gid
        return Attrs(mode=mode, uid=uid, gid=gid, mtime_ns=now, rdev=rdev)

    def _child_changed(self, parent: Node) -> None:
        """`parent` has got or lost a name."""
        parent.mtime_ns = parent.ctime_ns = time.time_ns()
        parent.own_attrs = self._namespace.differs(parent.attrs)
        parent.unseen = False  # to be asked again, should `kids` be empty
        self._changes.review_marker(parent)

    async def _make(
        self,
        parent_ino: int,
        name: bytes,
        attrs_mode: int,
        uid: int,
        gid: int,
        rdev: int = 0,
        *,
        act: Act | None,
        content: bytes = b"",
    ) -> Node:
        self._may_grow()
        if (ino := self._repeated(act)) is not None:
            return self._inodes.get(ino)
        parent = self._folder(parent_ino)
        if await self._namespace.exists(parent, name) is not None:
            raise Exists("create", name.decode(errors="replace"))
        if parent.detached:
            raise NotFound("create", name.decode(errors="replace"), "its directory was removed")
        with self._changes.batch():
            node = self._add(parent, name, self._attrs(attrs_mode, uid, gid, parent, rdev), act)
            if content:
                self._write(node, 0, content)
        return node

    def _add(self, parent: Node, name: bytes, attrs: Attrs, act: Act | None) -> Node:
        key = keys.join(self._inodes.key(parent), keys.new_segment(name))
        if stat.S_ISDIR(attrs.mode):
            keys.join(key, "/")
        node = self._inodes.new(attrs, ctime_ns=attrs.mtime_ns)
        node.checked_at = trio.current_time()
        if node.is_dir:
            node.complete_at = node.checked_at
            node.own_attrs = self._namespace.differs(attrs)
        self._inodes.attach(parent, name, node)
        try:
            self._changes.created(node)
        except OSError:
            self._inodes.detach(node)
            raise
        self._namespace.appeared(parent, name)
        self._child_changed(parent)
        self._changes.did(act, node)
        return node

    # ---- names ----

    async def lookup(self, parent_ino: int, name: bytes) -> Node:
        """Raises: NotFound. The caller counts the reference that it passes on."""
        return await self._namespace.child(self._folder(parent_ino), name)

    def lifetime(self, node: Node) -> float:
        """For how many seconds the kernel may believe what it is told of `node`."""
        return self._namespace.lifetime(node)

    def getattr(self, ino: int) -> Node:
        return self._inodes.get(ino)

    def forget(self, counts: Sequence[tuple[int, int]]) -> None:
        """The kernel gives references back: (inode number, how many)."""
        nodes = [node for ino, _ in counts if (node := self._inodes.find(ino)) is not None]
        for ino, count in counts:
            self._inodes.forget(ino, count)
        self._kernel.forgotten(nodes)

    async def mkdir(self, parent: int, name: bytes, mode: int, uid: int, gid: int, *, act: Act | None = None) -> Node:
        return await self._make(parent, name, stat.S_IFDIR | stat.S_IMODE(mode), uid, gid, act=act)

    async def mknod(
        self, parent: int, name: bytes, mode: int, rdev: int, uid: int, gid: int, *, act: Act | None = None
    ) -> Node:
        """A regular file, or a FIFO, socket or device node (kept as an empty object with its type in `mode`)."""
        return await self._make(parent, name, mode, uid, gid, rdev, act=act)

    async def symlink(
        self, parent: int, name: bytes, target: bytes, uid: int, gid: int, *, act: Act | None = None
    ) -> Node:
        return await self._make(parent, name, stat.S_IFLNK | 0o777, uid, gid, act=act, content=target)

    async def readlink(self, ino: int) -> bytes:
        node = self._inodes.get(ino)
        if not node.is_symlink:
            raise InvalidArgument("readlink", self._inodes.path(node), "is no symbolic link")
        return node.link if node.link is not None else bytes(await self._read(node, 0, node.size))

    async def unlink(self, parent_ino: int, name: bytes, *, act: Act | None = None) -> None:
        self._writable()
        if self._repeated(act) is not None:
            return
        parent = self._folder(parent_ino)
        node = await self._namespace.child(parent, name)
        if node.is_dir:
            raise IsADirectory("unlink", self._inodes.path(node))
        self._remove(parent, node, act)

    async def rmdir(self, parent_ino: int, name: bytes, *, act: Act | None = None) -> None:
        self._writable()
        if self._repeated(act) is not None:
            return
        parent = self._folder(parent_ino)
        node = await self._namespace.child(parent, name)
        if not node.is_dir:
            raise NotADirectory("rmdir", self._inodes.path(node))
        if not await self._namespace.is_empty(node):
            raise NotEmpty("rmdir", self._inodes.path(node))
        if node.detached:
            raise NotFound("rmdir", self._inodes.path(node))
        self._remove(parent, node, act)

    def _remove(self, parent: Node, node: Node, act: Act | None) -> None:
        key = self._inodes.key(node)
        node.ctime_ns = time.time_ns()
        with self._changes.batch():
            self._inodes.detach(node)
            self._changes.unlinked(node, key)
            self._child_changed(parent)
            self._changes.did(act, node)

    async def rename(
        self, parent_ino: int, name: bytes, to_ino: int, to_name: bytes, flags: int, *, act: Act | None = None
    ) -> None:
        """Atomic in the tree; the store follows. Raises: Exists (RENAME_NOREPLACE), NotEmpty, InvalidArgument
        (RENAME_EXCHANGE and unknown flags), IsADirectory, NotADirectory, NameTooLong."""
        self._writable()
        if flags & ~RENAME_NOREPLACE:
            raise InvalidArgument("rename", name.decode(errors="replace"), "flags are not supported")
        if self._repeated(act) is not None:
            return
        source_dir, target_dir = self._folder(parent_ino), self._folder(to_ino)
        while True:
            source = await self._namespace.child(source_dir, name)
            if source.is_dir:
                await self._namespace.load_below(source)
            target = await self._namespace.exists(target_dir, to_name)
            if target is source:
                return
            if target is not None:
                await self._may_replace(source, target, flags)
            still = self._still(source_dir, name, source) and self._still(target_dir, to_name, target)
            if still and self._namespace.is_loaded(source):
                break
        self._rename(source, source_dir, target_dir, to_name, target, act)

    @staticmethod
    def _still(parent: Node, name: bytes, node: Node | None) -> bool:
        return not parent.detached and (parent.kids or {}).get(name) is node

    async def _may_replace(self, source: Node, target: Node, flags: int) -> None:
        path = self._inodes.path(target)
        if flags & RENAME_NOREPLACE:
            raise Exists("rename", path)
        if target.is_dir and not source.is_dir:
            raise IsADirectory("rename", path)
        if source.is_dir and not target.is_dir:
            raise NotADirectory("rename", path)
        if target.is_dir and not await self._namespace.is_empty(target):
            raise NotEmpty("rename", path)

    def _rename(
        self,
        source: Node,
        source_dir: Node,
        target_dir: Node,
        to_name: bytes,
        target: Node | None,
        act: Act | None,
    ) -> None:
        moved = [source, *self._inodes.descendants(source)]
        self._may_grow(len(moved) * ROWS_BYTES)
        old = [self._inodes.key(node) for node in moved]
        new_prefix = keys.join(self._inodes.key(target_dir), keys.new_segment(to_name))
        longest = max(len(key.encode()) for key in old) - len(old[0].encode()) + len(new_prefix.encode()) + 1
        if longest > 1024:
            raise NameTooLong("rename", self._inodes.path(source), "a key would be longer than 1024 bytes")
        over = None
        with self._changes.batch():
            if target is not None:
                target_key = self._inodes.key(target)
                target.ctime_ns = time.time_ns()
                self._inodes.detach(target)
                over = self._changes.replaced(target, target_key)
            self._inodes.move(source, target_dir, to_name)
            source.ctime_ns = time.time_ns()
            for node, key in zip(moved, old, strict=True):
                self._changes.renamed(node, key, over if node is source else None)
            self._namespace.appeared(target_dir, to_name)
            self._child_changed(source_dir)
            if target_dir is not source_dir:
                self._child_changed(target_dir)
            self._changes.did(act, source)

    # ---- attributes ----

    async def setattr(self, ino: int, change: Change) -> Node:
        """Raises: ReadOnly, TooLarge, NoSpace, OSError."""
        self._writable()
        node = self._inodes.get(ino)
        if change.size is not None and change.size != node.size:
            if change.size > node.size:
                self._may_grow()
            await self._truncate(node, change.size)
        changed = self._set_owner(node, change)
        if change.mtime_ns is not None and change.mtime_ns != node.mtime_ns:
            node.mtime_ns = change.mtime_ns
            changed = True
            if node.is_dir:
                node.own_attrs = True
        if change.atime_ns is not None:
            node.atime_ns = change.atime_ns
        node.ctime_ns = change.ctime_ns if change.ctime_ns is not None else time.time_ns()
        if changed:
            if node.is_dir and not node.own_attrs:
                node.own_attrs = self._namespace.differs(node.attrs)
            self._changes.attrs_changed(node)
        return node

    def _set_owner(self, node: Node, change: Change) -> bool:
        if self._config.posix_attrs is PosixAttrs.IGNORE:
            return False
        before = node.mode, node.uid, node.gid
        if change.mode is not None:
            node.mode = stat.S_IFMT(node.mode) | stat.S_IMODE(change.mode)
        node.uid = node.uid if change.uid is None else change.uid
        node.gid = node.gid if change.gid is None else change.gid
        return before != (node.mode, node.uid, node.gid)

    async def _truncate(self, node: Node, size: int) -> None:
        if node.is_dir:
            raise IsADirectory("truncate", self._inodes.path(node))
        if size > S3_OBJECT_BYTES_MAX:
            raise TooLarge("truncate", self._inodes.path(node), "an object holds at most 5 TiB")
        layer = self._changes.stage(node)
        layer.truncate(size)
        node.size = size
        node.mtime_ns = time.time_ns()
        self._changes.written(node)
        if not node.writers:
            self._changes.closed(node)

    # ---- open files ----

    def open(self, ino: int, flags: int) -> Fh:
        """The times that O_TRUNC moves are the kernel's, as with `write`.
        Raises: ReadOnly, IsADirectory, StaleVersion, OSError (O_TRUNC needs the local disk)."""
        node = self._inodes.get(ino)
        if node.is_dir:
            raise IsADirectory("open", self._inodes.path(node))
        if node.detached and not node.opens:  # the kernel looks the name up again
            raise StaleVersion("open", self._inodes.path(node))
        writable = flags & os.O_ACCMODE != os.O_RDONLY
        if writable or flags & os.O_TRUNC:
            self._writable()
        if flags & os.O_TRUNC and node.size:
            self._changes.stage(node).truncate(0)
            node.size = 0
            self._changes.written(node)
        node.opens += 1
        self.open_files += 1
        if writable:
            node.writers += 1
            self.open_writers += 1
        self._kernel.referred(node)
        return Fh(node.ino << 1 | writable)

    async def create(
        self, parent_ino: int, name: bytes, mode: int, flags: int, uid: int, gid: int, *, act: Act | None = None
    ) -> tuple[Node, Fh]:
        if (ino := self._repeated(act)) is not None:
            return self._created_before(self._inodes.get(ino), flags)
        parent = self._folder(parent_ino)
        node = await self._namespace.exists(parent, name)
        if node is None:
            self._may_grow()
            if parent.detached:
                raise NotFound("create", name.decode(errors="replace"), "its directory was removed")
            attrs = self._attrs(stat.S_IFREG | stat.S_IMODE(mode), uid, gid, parent)
            with self._changes.batch():
                node = self._add(parent, name, attrs, act)
        elif flags & os.O_EXCL:
            raise Exists("create", self._inodes.path(node))
        return node, self.open(node.ino, flags)

    def _created_before(self, node: Node, flags: int) -> tuple[Node, Fh]:
        """The references of an answer that was not given may have been noted already."""
        if node.opens:
            node.lookups -= 1  # the caller counts it
            return node, Fh(node.ino << 1 | (flags & os.O_ACCMODE != os.O_RDONLY))
        return node, self.open(node.ino, flags)

    async def read(self, fh: int, offset: int, length: int) -> bytes | bytearray:
        node = self._inodes.get(fh >> 1)
        return await self._read(node, offset, offset + length)

    async def _read(self, node: Node, start: int, end: int) -> bytes | bytearray:
        end = min(end, node.size)
        if start >= end:
            return b""
        if node.staged is not None:
            return await self._read_staged(node, start, end)
        version = node.version or self._open_version(node)
        data = version.read_now(start, end)
        return data if data is not None else await version.read(start, end)

    def _open_version(self, node: Node) -> Version:
        base = node.base
        assert base is not None
        node.version = self._blocks.open(base.key, base.etag, base.size)
        return node.version

    async def _read_staged(self, node: Node, start: int, end: int) -> bytes | bytearray:
        """Layers first, in one go: after an await they may be gone, uploaded; the base's version stays open."""
        staged = node.staged
        assert staged is not None
        pieces = staged.pieces(start, end)
        if len(pieces) == 1 and (only := pieces[0]).layer is not None:
            return os.pread(only.layer.fd, end - start, start)
        out = bytearray(end - start)
        missing = []
        for piece in pieces:
            if piece.layer is not None:
                data = os.pread(piece.layer.fd, piece.end - piece.start, piece.start)
                out[piece.start - start : piece.start - start + len(data)] = data
            elif not piece.zero:
                missing.append(piece)
        if missing and node.base is not None:
            version = self._blocks.open(node.base.key, node.base.etag, node.base.size)
            try:
                for piece in missing:
                    out[piece.start - start : piece.end - start] = await version.read(piece.start, piece.end)
            finally:
                version.close()
        return out

    async def write(self, fh: int, offset: int, data: bytes) -> int:
        """Returns len(data); what was answered is found again after a crash of this process. Times do not move:
        with its writeback cache the kernel keeps them, and sends them by setattr at the latest when it closes.
        Raises: NoSpace (dirty limit), OSError (ENOSPC, EDQUOT of the local disk)."""
        node = self._inodes.get(fh >> 1)
        if offset + len(data) > S3_OBJECT_BYTES_MAX:
            raise TooLarge("write", self._inodes.path(node), "an object holds at most 5 TiB")
        self._changes.require_space(len(data))
        if not self._writeback.has_room(len(data)):
            await self._writeback.room(len(data))
        self._write(node, offset, data)
        return len(data)

    def _write(self, node: Node, offset: int, data: bytes) -> None:
        layer = self._changes.stage(node)
        layer.write(offset, data)
        node.size = layer.size
        self._changes.written(node)

    async def flush(self, fh: int) -> None:
        """At each close(2). Raises: the failure of an upload that was not reported yet."""
        node = self._inodes.get(fh >> 1)
        if (error := self._writeback.take_error(node)) is not None:
            raise error
        if self._write_through and fh & 1:
            await self._writeback.settle(node)

    async def fsync(self, fh: int) -> None:
        """Return when the store has the bytes. Raises: PhfsError, StoreTimeout (ETIMEDOUT)."""
        await self._writeback.settle(self._inodes.get(fh >> 1))

    def release(self, fh: int) -> None:
        node = self._inodes.get(fh >> 1)
        node.opens -= 1
        self.open_files -= 1
        if fh & 1:
            node.writers -= 1
            self.open_writers -= 1
            if not node.writers:
                self._changes.closed(node)
        self._kernel.referred(node)
        if not node.opens:
            if node.version is not None:
                node.version.close()
                node.version = None
            self._changes.released(node)
            self._inodes.drop_unused(node)

    # ---- directories ----

    def opendir(self, ino: int) -> Fh:
        node = self._inodes.get(ino)
        node.opens += 1
        self._kernel.referred(node)
        self._stream_no = (self._stream_no + 1) & STREAM_MASK
        return Fh(node.ino << STREAM_BITS | self._stream_no)

    async def readdir(self, fh: int, offset: int) -> list[tuple[int, Node]]:
        """Some entries after the cookie `offset`, each with its cookie; empty at the end."""
        stream = self._streams.get(fh)
        if stream is None:
            node, position = self._inodes.get(fh >> STREAM_BITS), self._positions.pop(fh, (0, b""))
            stream = self._streams[fh] = DirStream(self._namespace, self._inodes, node, *position)
        return await stream.read(offset)

    async def releasedir(self, fh: int) -> None:
        if (stream := self._streams.pop(fh, None)) is not None:
            await stream.aclose()
        self._positions.pop(fh, None)
        self._kernel.stream_closed(fh)
        node = self._inodes.get(fh >> STREAM_BITS)
        node.opens -= 1
        self._kernel.referred(node)
        self._inodes.drop_unused(node)

    async def fsyncdir(self, fh: int) -> None:
        """Return when the store has what was changed at the names in the directory."""
        await self._writeback.settle_names(self._inodes.get(fh >> STREAM_BITS))

    # ---- extended attributes (only with --xattrs) ----

    def getxattr(self, ino: int, name: bytes) -> bytes:
        node = self._inodes.get(ino)
        try:
            return (node.xattrs or {})[name]
        except KeyError:
            raise NoAttribute("getxattr", name.decode(errors="replace")) from None

    def listxattr(self, ino: int) -> list[bytes]:
        return list(self._inodes.get(ino).xattrs or {})

    def setxattr(self, ino: int, name: bytes, value: bytes) -> None:
        self._writable()
        node = self._inodes.get(ino)
        if not name.startswith(b"user."):
            raise NotSupported("setxattr", name.decode(errors="replace"), "only user.* is kept")
        found = {**(node.xattrs or {}), name: value}
        if sum(2 * len(k) + 2 * len(v) for k, v in found.items()) > XATTR_BYTES_MAX:
            raise NoSpace("setxattr", name.decode(errors="replace"), "object metadata holds at most 2 KB")
        self._set_xattrs(node, found)

    def removexattr(self, ino: int, name: bytes) -> None:
        self._writable()
        node = self._inodes.get(ino)
        self.getxattr(ino, name)
        self._set_xattrs(node, {k: v for k, v in (node.xattrs or {}).items() if k != name})

    def _set_xattrs(self, node: Node, found: dict[bytes, bytes]) -> None:
        node.xattrs = found or None
        node.ctime_ns = time.time_ns()
        if node.is_dir:
            node.own_attrs = True
        self._changes.attrs_changed(node)

    # ---- for the control socket ----

    async def settle_path(self, path: str) -> None:
        """Return when the store has the file, or all below the directory, at `path` below the mount point."""
        node = self._inodes.root
        for part in os.fsencode(path).split(b"/"):
            if part not in (b"", b"."):
                node = await self._namespace.child(node, part)
        if node.is_dir:
            await self._writeback.settle_below(node)
        else:
            await self._writeback.settle(node)


__all__ = ["Change", "Ino", "PhfsError", "StaleVersion", "Vfs"]

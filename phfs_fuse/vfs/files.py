"""Open files and their bytes: layers that exist only here over clean blocks. Owns the count of open files.

A file handle is the inode number, whether it may write, and whether past the kernel's cache (`DIRECT`, `UNCACHED`),
so it means the same after a restart. With its write-back cache the kernel answers write(2) itself and asks us later,
when the program cannot be told any more but by close and fsync. So near a quota files are opened for writing past it.

Pages that the kernel has of a file may be kept over an open as long as they have its bytes. They do, since a foreign
version is an inode of its own, unless bytes have gone past them (`keeps_pages`).
"""

from __future__ import annotations

import os
import time

from phfs_fuse.cache.block_cache import BlockCache, Version
from phfs_fuse.errors import IsADirectory, NoSpace, PhfsError, QuotaExceeded, StaleVersion, TooLarge
from phfs_fuse.host.saved_files import Saved
from phfs_fuse.pending.changes import Changes
from phfs_fuse.quota.limits import Quotas
from phfs_fuse.state.staging import Layer
from phfs_fuse.tree.inodes import Inodes
from phfs_fuse.tree.kernel_log import KernelLog
from phfs_fuse.tree.node import Node, Pages
from phfs_fuse.types import Buffer, Fh
from phfs_fuse.vfs.admission import Admission
from phfs_fuse.vfs.store_limits import StoreLimits
from phfs_fuse.writeback.sync import Sync

DIRECT = 1 << 62  # in a handle: past the kernel's cache, as we said at its open
UNCACHED = 1 << 61  # opened with O_DIRECT: what we answer to a write is what the program gets


def _ino(fh: int) -> int:
    return (fh & ~(DIRECT | UNCACHED)) >> 1


def _writes_past_pages(fh: int) -> bool:
    return bool(fh & 1 and fh & (DIRECT | UNCACHED))


class OpenFiles:
    def __init__(
        self,
        *,
        inodes: Inodes,
        blocks: BlockCache,
        changes: Changes,
        settling: Sync,
        kernel: KernelLog,
        quotas: Quotas,
        storable: StoreLimits,
        writable: Admission,
        saved: Saved,
        write_through: bool,
    ) -> None:
        self._saved = saved
        self._inodes = inodes
        self._blocks = blocks
        self._changes = changes
        self._settling = settling
        self._kernel = kernel
        self._quotas = quotas
        self._storable = storable
        self._writable = writable
        self._write_through = write_through
        self.count = 0
        self.writers = 0

    def resume(self, *, damaged: bool) -> None:
        """The nodes that a process before had open are in the tree, with the references that it had noted; if the
        journal was `damaged`, maybe with other bytes. Not known: a handle with O_DIRECT of an older version."""
        for node in self._inodes.all():
            if not node.is_dir:
                self.count += node.opens
                self.writers += node.writers
                if node.writers or damaged:
                    node.pages = Pages.DOUBTED

    def open(self, ino: int, flags: int) -> Fh:
        """The times that O_TRUNC moves are the kernel's, as with `write`.
        Raises: ReadOnly, IsADirectory, StaleVersion, OSError (O_TRUNC needs the local disk)."""
        node = self._inodes.get(ino)
        if node.is_dir:
            raise IsADirectory("open", self._inodes.path(node))
        if node.detached and not node.opens:  # the kernel looks the name up again
            raise StaleVersion("open", self._inodes.path(node))
        if flags & os.O_ACCMODE != os.O_RDONLY or flags & os.O_TRUNC:
            self._writable.require()
            self._inodes.require_no_record(node)
            self._require_attrs(node, anew=bool(flags & os.O_TRUNC))
        if flags & os.O_TRUNC and node.size:
            self._changes.stage(node).truncate(0)
            self._changes.written(node, 0)
        return self.opened(node, flags)

    def opened(self, node: Node, flags: int) -> Fh:
        """`node` may be opened like that: also as one that was made just now, on the last room there was."""
        writable = flags & os.O_ACCMODE != os.O_RDONLY
        direct = self._is_direct(node, flags)
        node.opens += 1
        self.count += 1
        if writable:
            node.writers += 1
            self.writers += 1
            node.direct_writers += direct
        fh = Fh(node.ino << 1 | writable | DIRECT * direct | UNCACHED * bool(flags & os.O_DIRECT))
        if _writes_past_pages(fh):
            node.pages = Pages.DOUBTED
        self._kernel.referred(node)
        return fh

    def keeps_pages(self, fh: int) -> bool:
        """Whether the kernel may keep the pages that it has of the file, as asked once at each open.

        While a handle writes past them, what others read meanwhile may stay in them, so each open has them dropped.
        So has the first open after the last of these handles went, and after a write was refused that the kernel had
        taken into them, or a change was given up. When that open is through, is not known before its file has been
        closed by all: until then the next ones do likewise.
        """
        node = self._inodes.get(_ino(fh))
        if node.pages is Pages.TRUE:
            return True
        node.pages = Pages.DROPPED
        return False

    def _is_direct(self, node: Node, flags: int) -> bool:
        """Near a quota a file that can only be written (and so not be mapped) goes past the kernel's cache; while it
        does, whoever else opens it goes there too: older kernels would show them pages of before."""
        if node.direct_writers or not self._quotas:
            return bool(node.direct_writers)
        alone = not node.opens and flags & os.O_ACCMODE == os.O_WRONLY
        return alone and self._quotas.is_tight(self._inodes.key(node))

    async def read(self, fh: int, offset: int, length: int) -> Buffer:
        """To be answered before the next await: the next read may come into the same buffer."""
        node = self._inodes.get(_ino(fh))
        return await self.read_node(node, offset, offset + length)

    async def read_node(self, node: Node, start: int, end: int) -> Buffer:
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

    async def _read_staged(self, node: Node, start: int, end: int) -> Buffer:
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
        with its writeback cache the kernel keeps them, and sends them by setattr at the latest when it closes. What
        goes past its cache does not move the kernel's times: they are ours, and it has to ask for them.
        Raises: QuotaExceeded, TooLarge, NoSpace (dirty limit, or the quota where the kernel would make EIO of EDQUOT
        when it tells the program later), OSError (ENOSPC, EDQUOT of the local disk). What is too large is dropped
        where the kernel has answered it already: of EFBIG it would make EIO, so `flush` and `fsync` say it."""
        node = self._inodes.get(_ino(fh))
        try:
            await self._write(node, fh, offset, data)
        except (PhfsError, OSError) as exc:  # the kernel may have taken it, into its pages
            node.misjudged = True
            node.pages = Pages.DOUBTED
            self._kernel.referred(node)
            if not isinstance(exc, TooLarge) or fh & (DIRECT | UNCACHED):
                raise
            node.refused = exc
        return len(data)

    async def _write(self, node: Node, fh: int, offset: int, data: bytes) -> None:
        self._writable.require_space(len(data))
        self._may_be_kept(node)
        if not self._settling.has_room(len(data)):
            await self._settling.room(len(data))
        if offset + len(data) > node.size:
            try:
                self._may_grow(node, offset + len(data))
            except QuotaExceeded as exc:
                if fh & (DIRECT | UNCACHED):
                    raise
                raise NoSpace("write", self._inodes.path(node), str(exc)) from exc
        self.put(node, offset, data)
        if fh & DIRECT:
            node.mtime_ns = node.ctime_ns = time.time_ns()
            node.misjudged = True

    def _may_be_kept(self, node: Node) -> None:
        """Bytes that may have to go to `saved/`, since they are no whole file or the store takes no file of that
        name, are not taken while there is no room for them. Raises: NoSpace."""
        if not self._saved.is_full:
            return
        staged, dirty = node.staged, node.dirty
        is_part = node.base is not None and (staged is None or bool(staged.bottom.gaps()))
        is_refused = dirty is not None and dirty.refusal is not None
        if is_part or is_refused:
            where = self._saved.directory
            raise NoSpace("write", self._inodes.path(node), f"{where} is full; phfs saved lists what is there")

    def _may_grow(self, node: Node, size: int) -> None:
        """Raises: TooLarge, QuotaExceeded. A file without a name is in no folder."""
        self._storable.require_size(node, size)
        if self._quotas and not node.detached:
            self._quotas.require(self._inodes.key(node), size - node.size)

    def _require_attrs(self, node: Node, *, anew: bool) -> None:
        """Raises: NoSpace, NotSupported. What others gave to the object does not stay with new bytes."""
        if anew and node.base is not None and node.base.size:
            node.others_bytes = 0
        self._storable.require_room(node)

    def put(self, node: Node, offset: int, data: bytes) -> None:
        layer = self._changes.stage(node)
        layer.write(offset, data)
        self._changes.written(node, layer.size)

    def begin_truncate(self, node: Node, size: int) -> Layer:
        """Note that `node` changes; `truncate` follows once that is in the journal, since it cannot be undone.
        Raises: IsADirectory, TooLarge, QuotaExceeded, OSError."""
        if node.is_dir:
            raise IsADirectory("truncate", self._inodes.path(node))
        self._require_attrs(node, anew=size == 0)
        if size > node.size:
            self._may_grow(node, size)
        if size:
            self._may_be_kept(node)
        layer = self._changes.stage(node)
        self._changes.keep(node)
        node.mtime_ns = time.time_ns()
        return layer

    def truncate(self, node: Node, layer: Layer, size: int) -> None:
        """Raises: OSError; then it is as long as it was."""
        layer.truncate(size)
        self._changes.written(node, size)
        if not node.writers:
            self._changes.closed(node)

    async def flush(self, fh: int) -> None:
        """At each close(2). Raises: the failure of an upload, or of a write, that was not told yet; it is told to
        writers only."""
        node = self._inodes.get(_ino(fh))
        if fh & 1:
            self._tell_refused(node)
        if fh & 1 and (error := self._settling.take_error(node)) is not None:
            raise error
        if self._write_through and fh & 1:
            await self._settling.settle(node)

    def misjudged(self, fh: int) -> Node | None:
        """The file if the kernel has to look it up again already at this close(2) of a writer. Its inode goes then,
        unless others have the file open: see `release`."""
        node = self._inodes.get(_ino(fh))
        return node if fh & 1 and node.misjudged and not node.detached else None

    @staticmethod
    def _tell_refused(node: Node) -> None:
        if (error := node.refused) is not None:
            node.refused = None
            raise error

    async def fsync(self, fh: int) -> None:
        """Return when the store has the bytes. Raises: PhfsError, StoreTimeout (ETIMEDOUT)."""
        node = self._inodes.get(_ino(fh))
        self._tell_refused(node)
        await self._settling.settle(node)

    def release(self, fh: int) -> Node | None:
        """Returns the file if the kernel has to look it up again: it believes in bytes that were refused, or in times
        that are no more."""
        node = self._inodes.get(_ino(fh))
        node.opens -= 1
        self.count -= 1
        if _writes_past_pages(fh):
            node.pages = Pages.DOUBTED
        elif not node.opens and node.pages is Pages.DROPPED:
            node.pages = Pages.TRUE
        if fh & 1:
            node.writers -= 1
            self.writers -= 1
            if fh & DIRECT and node.direct_writers:  # not known any more after a restart
                node.direct_writers -= 1
        self._kernel.referred(node)
        if not node.opens and node.version is not None:
            node.version.close()
            node.version = None
        if fh & 1 and not node.writers:
            self._changes.closed(node)
        if not node.opens:
            self._changes.released(node)
            self._inodes.drop_unused(node)
            if node.misjudged and not node.detached:
                return node
        return None

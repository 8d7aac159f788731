"""The kernel's requests: bytes and flags <-> `Vfs` calls, and the boundary where every error becomes an errno.

Decides nothing. An exception other than FUSEError that leaves a handler ends the whole mount, so each one is inside
`_answers`. Owns no state.
"""

from __future__ import annotations

import errno
import functools
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, Protocol, TypeVar

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, RequestContext, SetattrFields, StatvfsData

from phfs_fuse import metrics
from phfs_fuse.config.model import TreeConfig
from phfs_fuse.errors import NotFound, PhfsError
from phfs_fuse.quota.limits import Room
from phfs_fuse.tasks import surviving
from phfs_fuse.tree.node import Node
from phfs_fuse.types import ROOT_INO, Act, Buffer, Fh, Name
from phfs_fuse.vfs.files import DIRECT
from phfs_fuse.vfs.vfs import Change, Vfs

log = logging.getLogger(__name__)

DROP_SECONDS: Final = 5.0  # for the keeper to be told that a name is to be dropped, and to do it
BLOCK_BYTES: Final = 4096
NOMINAL: Final = Room(1 << 50, 1 << 50, 1 << 50)  # a bucket has no size
PASSED: Final = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.ENFILE))  # of the local disk
F = TypeVar("F", bound=Callable[..., Awaitable[Any]])


class KernelNames(Protocol):
    """What the kernel knows by name: see `worker.keeper_link`."""

    def drop(self, name: Name) -> int | None: ...

    async def told(self, number: int) -> None: ...


def errno_of(exc: Exception) -> int | None:
    """The errno that answers a request which ended in `exc`; None: a bug."""
    if isinstance(exc, PhfsError):
        return exc.errno
    if isinstance(exc, OSError):  # a lost cache file must not look like a lost user file
        return exc.errno if exc.errno in PASSED else errno.EIO
    return None


def _answers(handler: F) -> F:
    """Let only FUSEError (or a cancellation) leave a request handler."""

    @functools.wraps(handler)
    async def wrapped(self: Operations, *args: object) -> object:
        metrics.FUSE_REQUESTS.values[handler.__name__] += 1
        self._note_request()
        try:
            return await handler(self, *args)
        except FUSEError:
            raise
        except Exception as exc:
            code = errno_of(exc)
            if code is None or code == errno.EIO:
                log.log(
                    logging.ERROR if code is None else logging.WARNING,
                    "%s%r failed: %s",
                    handler.__name__,
                    tuple(a for a in args if isinstance(a, int)),
                    exc,
                    exc_info=exc if code is None else None,
                )
            raise FUSEError(code or errno.EIO) from exc

    return wrapped  # type: ignore[return-value]


class Operations(pyfuse3.Operations):
    """Handlers of one mount."""

    supports_dot_lookup = False
    enable_writeback_cache = True
    enable_acl = False

    def __init__(
        self, vfs: Vfs, config: TreeConfig, note_request: Callable[[], None], kernel_names: KernelNames | None
    ) -> None:
        super().__init__()
        self._kernel_names = kernel_names
        self._vfs = vfs
        self._note_request = note_request
        self._ttl = config.attr_ttl_seconds
        self._statfs_ino: int = ROOT_INO

    def _entry(self, node: Node) -> EntryAttributes:
        entry = EntryAttributes()
        entry.st_ino = node.ino
        entry.generation = 0
        entry.entry_timeout = entry.attr_timeout = self._vfs.lifetime(node)
        entry.st_mode = node.mode
        entry.st_nlink = node.nlink
        entry.st_uid = node.uid
        entry.st_gid = node.gid
        entry.st_rdev = node.rdev
        entry.st_size = node.size
        entry.st_blksize = BLOCK_BYTES
        entry.st_blocks = (node.size + 511) >> 9
        entry.st_atime_ns = node.atime_ns
        entry.st_mtime_ns = node.mtime_ns
        entry.st_ctime_ns = node.ctime_ns
        return entry

    def _counted(self, node: Node) -> EntryAttributes:
        """The entry for an answer that hands out a reference to the node."""
        self._vfs.told(node)
        return self._entry(node)

    @_answers
    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        try:
            node = await self._vfs.lookup(parent_inode, name)
        except NotFound:
            missing = EntryAttributes()  # inode 0: the kernel remembers that there is nothing
            missing.st_ino = pyfuse3.InodeT(0)
            missing.entry_timeout = self._ttl  # never long: nobody keeps count of which names the kernel was told
            return missing
        return self._counted(node)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        with surviving("forget"):  # which has no answer
            self._vfs.forget(inode_list)

    @_answers
    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        return self._entry(self._vfs.getattr(inode))

    @_answers
    async def setattr(
        self, inode: int, attr: EntryAttributes, fields: SetattrFields, fh: int | None, ctx: RequestContext
    ) -> EntryAttributes:
        change = Change(
            mode=attr.st_mode if fields.update_mode else None,
            uid=attr.st_uid if fields.update_uid else None,
            gid=attr.st_gid if fields.update_gid else None,
            size=attr.st_size if fields.update_size else None,
            atime_ns=attr.st_atime_ns if fields.update_atime else None,
            mtime_ns=attr.st_mtime_ns if fields.update_mtime else None,
            ctime_ns=attr.st_ctime_ns if fields.update_ctime else None,
        )
        return self._entry(await self._vfs.setattr(inode, change))

    @_answers
    async def readlink(self, inode: int, ctx: RequestContext) -> bytes:
        return await self._vfs.readlink(inode)

    @_answers
    async def mknod(
        self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: RequestContext
    ) -> EntryAttributes:
        act = Act(ctx.pid, "mknod", parent_inode, name)
        return self._counted(await self._vfs.mknod(parent_inode, name, mode, rdev, ctx.uid, ctx.gid, act=act))

    @_answers
    async def mkdir(self, parent_inode: int, name: bytes, mode: int, ctx: RequestContext) -> EntryAttributes:
        act = Act(ctx.pid, "mkdir", parent_inode, name)
        return self._counted(await self._vfs.mkdir(parent_inode, name, mode, ctx.uid, ctx.gid, act=act))

    @_answers
    async def unlink(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        await self._vfs.unlink(parent_inode, name, act=Act(ctx.pid, "unlink", parent_inode, name))

    @_answers
    async def rmdir(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        await self._vfs.rmdir(parent_inode, name, act=Act(ctx.pid, "rmdir", parent_inode, name))

    @_answers
    async def symlink(self, parent_inode: int, name: bytes, target: bytes, ctx: RequestContext) -> EntryAttributes:
        act = Act(ctx.pid, "symlink", parent_inode, name)
        return self._counted(await self._vfs.symlink(parent_inode, name, target, ctx.uid, ctx.gid, act=act))

    @_answers
    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: RequestContext,
    ) -> None:
        act = Act(ctx.pid, "rename", parent_inode_old, name_old, parent_inode_new, name_new)
        await self._vfs.rename(parent_inode_old, name_old, parent_inode_new, name_new, flags, act=act)

    @_answers
    async def link(self, inode: int, new_parent_inode: int, new_name: bytes, ctx: RequestContext) -> EntryAttributes:
        raise FUSEError(errno.EPERM)  # Source: link(2), the filesystem does not support hard links

    def _opened(self, fh: Fh) -> FileInfo:
        direct, keeps = bool(fh & DIRECT), self._vfs.keeps_pages(fh)
        return FileInfo(fh=pyfuse3.FileHandleT(fh), direct_io=direct, keep_cache=keeps)

    @_answers
    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        return self._opened(self._vfs.open(inode, flags))

    @_answers
    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        act = Act(ctx.pid, "create", parent_inode, name)
        node, fh = await self._vfs.create(parent_inode, name, mode, flags, ctx.uid, ctx.gid, act=act)
        return self._opened(fh), self._counted(node)

    @_answers
    async def read(self, fh: int, off: int, size: int) -> Buffer:  # type: ignore[override]  # a buffer
        return await self._vfs.read(fh, off, size)

    @_answers
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        return await self._vfs.write(fh, off, buf)

    @_answers
    async def flush(self, fh: int) -> None:
        try:
            await self._vfs.flush(fh)
        finally:
            number = self._drop(self._vfs.misjudged(fh))
            if number is not None and self._kernel_names is not None:
                with trio.move_on_after(DROP_SECONDS):  # whoever asks after close(2) shall be told what is
                    await self._kernel_names.told(number)

    @_answers
    async def fsync(self, fh: int, datasync: bool) -> None:
        await self._vfs.fsync(fh)

    @_answers
    async def release(self, fh: int) -> None:
        """Answers at once: until then the kernel keeps the file's inode, and what it believes of it, and a look-up of
        the same program is right behind."""
        self._drop(self._vfs.release(fh))

    def _drop(self, node: Node | None) -> int | None:
        """Have the kernel look the name up again. It may hold a lock there until we have answered: the keeper tells
        it, and nobody waits for long. Without such a keeper the next look-up corrects it (`Inodes.corrected`)."""
        if node is None or node.parent is None or self._kernel_names is None:
            return None
        return self._kernel_names.drop((node.parent.ino, node.name))

    @_answers
    async def opendir(self, inode: int, ctx: RequestContext) -> int:
        return self._vfs.opendir(inode)

    @_answers
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        found = await self._vfs.readdir(fh, start_id)
        fitting = 0
        for cookie, node in found:
            name = pyfuse3.FileNameT(node.name)
            if not pyfuse3.readdir_reply(token, name, self._entry(node), cookie):
                break
            fitting += 1
        self._vfs.told_page(fh, found[:fitting])

    @_answers
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        await self._vfs.fsyncdir(fh)

    @_answers
    async def releasedir(self, fh: int) -> None:
        await self._vfs.releasedir(fh)

    def statfs_for(self, ino: int) -> None:
        """The next request is a statfs, which asks for `ino`."""
        self._statfs_ino = ino

    def fallocate_errno(self, end: int) -> int:
        """The errno of a fallocate up to byte `end`: nothing can be reserved, and programs then write instead."""
        return errno.EFBIG if end > self._vfs.size_max else errno.EOPNOTSUPP

    @_answers
    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        found = StatvfsData()
        found.f_bsize = found.f_frsize = BLOCK_BYTES
        room = self._vfs.statfs(self._statfs_ino) or NOMINAL
        found.f_blocks = room.size // BLOCK_BYTES
        found.f_bfree, found.f_bavail = room.free // BLOCK_BYTES, room.available // BLOCK_BYTES
        found.f_files = found.f_ffree = found.f_favail = 1 << 40
        found.f_namemax = 255
        return found


class XattrOperations(Operations):
    """With extended attributes. A handler apart: only ENOSYS keeps the kernel from asking before each write."""

    @_answers
    async def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes:
        return self._vfs.getxattr(inode, name)

    @_answers
    async def listxattr(self, inode: int, ctx: RequestContext) -> Sequence[bytes]:
        return self._vfs.listxattr(inode)

    @_answers
    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: RequestContext) -> None:
        await self._vfs.setxattr(inode, name, value)

    @_answers
    async def removexattr(self, inode: int, name: bytes, ctx: RequestContext) -> None:
        self._vfs.removexattr(inode, name)


def operations(
    vfs: Vfs, config: TreeConfig, note_request: Callable[[], None], kernel_names: KernelNames | None = None
) -> Operations:
    """`kernel_names` has the kernel forget names, and what it believes of their files."""
    kind = XattrOperations if config.xattrs else Operations
    return kind(vfs, config, note_request, kernel_names)


__all__ = ["Operations", "errno_of", "operations"]

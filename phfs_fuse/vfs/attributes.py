"""Attributes of files and directories: setattr and extended attributes. Owns no state."""

from __future__ import annotations

import stat
import time
from dataclasses import dataclass, replace

from phfs_fuse.attrs import USER_XATTR, Attrs
from phfs_fuse.config.model import PosixAttrs, TreeConfig
from phfs_fuse.errors import NoAttribute, NotSupported, StaleVersion
from phfs_fuse.pending.changes import Changes
from phfs_fuse.tree.default_attrs import DefaultAttrs
from phfs_fuse.tree.inodes import Inodes
from phfs_fuse.tree.node import Node
from phfs_fuse.types import time_ns
from phfs_fuse.vfs.admission import Admission
from phfs_fuse.vfs.files import OpenFiles
from phfs_fuse.vfs.store_limits import StoreLimits, may_be_refused


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What setattr shall set; None: leave as it is. Times in nanoseconds; one that does not fit is clamped."""

    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    size: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None
    ctime_ns: int | None = None

    @property
    def is_late(self) -> bool:
        """Whether this may be the kernel's own: the times of writes, which it keeps to itself until it likes."""
        return all(asked is None for asked in (self.mode, self.uid, self.gid, self.size, self.atime_ns))


class FileAttrs:
    def __init__(
        self,
        *,
        inodes: Inodes,
        changes: Changes,
        files: OpenFiles,
        defaults: DefaultAttrs,
        storable: StoreLimits,
        writable: Admission,
        config: TreeConfig,
    ) -> None:
        self._inodes = inodes
        self._changes = changes
        self._files = files
        self._defaults = defaults
        self._storable = storable
        self._writable = writable
        self._config = config

    async def setattr(self, ino: int, change: Change) -> Node:
        """Raises: ReadOnly, TooLarge, NoSpace, StaleVersion, OSError."""
        self._writable.require()
        node = self._inodes.get(ino)
        self._inodes.require_no_record(node)
        if node.is_dir or may_be_refused(node):
            await self._require_kept(node, self._wanted(node, change))
        if node.detached and not node.opens:
            if change.is_late:
                return node
            raise StaleVersion("setattr", self._inodes.path(node), "others have replaced it")  # it is looked up again
        if change.size is not None and change.size > node.size:
            self._writable.require_room()
        with self._changes.batch():
            layer = None
            if change.size is not None and change.size != node.size:
                layer = self._files.begin_truncate(node, change.size)
            self._set(node, change, changed=layer is not None)
        if layer is not None and change.size is not None:
            self._files.truncate(node, layer, change.size)
        return node

    def _set(self, node: Node, change: Change, *, changed: bool) -> None:
        """All but the size, within a transaction. `changed`: something else has to be noted too."""
        self._changes.keep(node)
        changed = self._set_owner(node, change) or changed
        if change.mtime_ns is not None and (mtime_ns := time_ns(change.mtime_ns)) != node.mtime_ns:
            node.mtime_ns = mtime_ns
            changed = True
            if node.is_dir:
                node.own_attrs = True
        if change.atime_ns is not None:
            node.atime_ns = time_ns(change.atime_ns)
        node.ctime_ns = time_ns(change.ctime_ns) if change.ctime_ns is not None else time.time_ns()
        if changed:
            if node.is_dir and not node.own_attrs:
                node.own_attrs = self._defaults.differs(node.attrs)
            self._changes.attrs_changed(node)

    def _wanted(self, node: Node, change: Change) -> Attrs:
        """The attributes that `node` shall have after `change`."""
        mtime_ns = node.mtime_ns if change.mtime_ns is None else change.mtime_ns
        if self._config.posix_attrs is PosixAttrs.IGNORE:
            return replace(node.attrs, mtime_ns=mtime_ns)
        return replace(
            node.attrs,
            mode=node.mode if change.mode is None else stat.S_IFMT(node.mode) | stat.S_IMODE(change.mode),
            uid=node.uid if change.uid is None else change.uid,
            gid=node.gid if change.gid is None else change.gid,
            mtime_ns=mtime_ns,
        )

    async def _require_kept(self, node: Node, attrs: Attrs) -> None:
        """Raises: NoSpace, NotSupported if the store cannot keep `attrs` with the object, or marker, of `node`."""
        if attrs == node.attrs or node.detached:
            return
        self._storable.require_attrs(node, attrs)
        if node.is_dir:
            await self._storable.require_marker(node)

    def _set_owner(self, node: Node, change: Change) -> bool:
        if self._config.posix_attrs is PosixAttrs.IGNORE:
            return False
        before = node.mode, node.uid, node.gid
        if change.mode is not None:
            node.mode = stat.S_IFMT(node.mode) | stat.S_IMODE(change.mode)
        node.uid = node.uid if change.uid is None else change.uid
        node.gid = node.gid if change.gid is None else change.gid
        return before != (node.mode, node.uid, node.gid)

    # ---- extended attributes (only with --xattrs) ----

    def getxattr(self, ino: int, name: bytes) -> bytes:
        node = self._inodes.get(ino)
        try:
            return (node.xattrs or {})[name]
        except KeyError:
            raise NoAttribute("getxattr", name.decode(errors="replace")) from None

    def listxattr(self, ino: int) -> list[bytes]:
        return list(self._inodes.get(ino).xattrs or {})

    async def setxattr(self, ino: int, name: bytes, value: bytes) -> None:
        self._writable.require()
        node = self._inodes.get(ino)
        self._inodes.require_no_record(node)
        if not name.startswith(USER_XATTR):
            raise NotSupported("setxattr", name.decode(errors="replace"), "only user.* is kept")
        found = {**(node.xattrs or {}), name: value}
        await self._require_kept(node, replace(node.attrs, xattrs=found))
        self._set_xattrs(node, found)

    def removexattr(self, ino: int, name: bytes) -> None:
        self._writable.require()
        node = self._inodes.get(ino)
        self._inodes.require_no_record(node)
        self.getxattr(ino, name)
        self._storable.require_unsealed(node)
        self._set_xattrs(node, {k: v for k, v in (node.xattrs or {}).items() if k != name})

    def _set_xattrs(self, node: Node, found: dict[bytes, bytes]) -> None:
        with self._changes.batch():
            self._changes.keep(node)
            node.xattrs = found or None
            node.ctime_ns = time.time_ns()
            if node.is_dir:
                node.own_attrs = True
            self._changes.attrs_changed(node)

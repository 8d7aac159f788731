"""The attributes of what the store has: those in its metadata, or the defaults of the mount. Owns no state."""

from __future__ import annotations

import stat
import time

from phfs_fuse.attrs import Attrs, from_metadata
from phfs_fuse.config.model import PosixAttrs, TreeConfig
from phfs_fuse.store.base import ObjectInfo


class DefaultAttrs:
    def __init__(self, config: TreeConfig) -> None:
        self._config = config

    def file(self, modified_ns: int) -> Attrs:
        config = self._config
        return Attrs(mode=stat.S_IFREG | config.file_mode, uid=config.uid, gid=config.gid, mtime_ns=modified_ns)

    def directory(self, modified_ns: int | None = None) -> Attrs:
        """None: as of now."""
        config = self._config
        at = time.time_ns() if modified_ns is None else modified_ns
        return Attrs(mode=stat.S_IFDIR | config.dir_mode, uid=config.uid, gid=config.gid, mtime_ns=at)

    def differs(self, attrs: Attrs) -> bool:
        """Whether a directory's mode or owner are not the defaults, or it has extended attributes."""
        default = self.directory()
        return (attrs.mode, attrs.uid, attrs.gid) != (default.mode, default.uid, default.gid) or bool(attrs.xattrs)

    def stored(self, info: ObjectInfo, default: Attrs) -> Attrs:
        """Those of an object; what it lacks is as in `default`."""
        found = from_metadata(info.metadata or {}, info.modified_ns, default)
        if self._config.posix_attrs is PosixAttrs.STORE:
            return found
        return Attrs(
            mode=stat.S_IFMT(found.mode) | stat.S_IMODE(default.mode),
            uid=default.uid,
            gid=default.gid,
            mtime_ns=found.mtime_ns,
            rdev=found.rdev,
            xattrs=found.xattrs,
            link=found.link,
        )

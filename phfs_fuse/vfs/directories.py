"""Changes of names: what create, unlink, rename and their like do to the tree. Owns what was done last by whom.

Between the last await and the change of the tree nothing else runs, so no locks are needed.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, contextmanager, nullcontext

import trio

from phfs_fuse import keys
from phfs_fuse.attrs import Attrs, to_metadata
from phfs_fuse.config.model import ExclusiveCreate, PosixAttrs, TreeConfig
from phfs_fuse.errors import (
    BoundToFolder,
    Exists,
    InvalidArgument,
    IsADirectory,
    NameTooLong,
    NotADirectory,
    NotEmpty,
    NotFound,
    NotSupported,
    PhfsError,
    StaleVersion,
)
from phfs_fuse.namespace.namespace import Namespace
from phfs_fuse.pending.changes import Changes
from phfs_fuse.quota.limits import Quotas
from phfs_fuse.state.staging import Layer
from phfs_fuse.store.base import ObjectInfo
from phfs_fuse.tree.default_attrs import DefaultAttrs
from phfs_fuse.tree.inodes import Inodes
from phfs_fuse.tree.node import Node
from phfs_fuse.types import KEY_BYTES_MAX, Act, Fh, Ino, ObjectKey
from phfs_fuse.vfs.admission import ROWS_BYTES, Admission
from phfs_fuse.vfs.exclusive_create import ExclusiveCreates
from phfs_fuse.vfs.files import OpenFiles
from phfs_fuse.vfs.store_limits import StoreLimits

RENAME_NOREPLACE = 1  # Source: renameat2(2)
LOOKS_MAX = 3  # at what is to be moved, while others change it; then what was seen is moved
LINK_BYTES_MAX = 4095  # Source: PATH_MAX in limits.h, without the NUL


def _log_bytes(moved: list[Node], longest: int) -> int:
    """What the journal's log grows by at most when a folder is moved. Measured: 0.3 KB for each file where names are
    short, 5 where keys are long and all have extended attributes; 4 where the rows lie far apart."""
    return sum(ROWS_BYTES * (2 if node.xattrs else 1) + 4 * longest for node in moved)


class Directories:
    def __init__(
        self,
        *,
        inodes: Inodes,
        namespace: Namespace,
        changes: Changes,
        files: OpenFiles,
        quotas: Quotas,
        claims: ExclusiveCreates,
        defaults: DefaultAttrs,
        storable: StoreLimits,
        writable: Admission,
        config: TreeConfig,
    ) -> None:
        self._inodes = inodes
        self._namespace = namespace
        self._changes = changes
        self._files = files
        self._quotas = quotas
        self._defaults = defaults
        self._storable = storable
        self._writable = writable
        self._config = config
        self._claims = claims if config.exclusive_create is ExclusiveCreate.STORE else None
        self._acts: dict[int, tuple[Act, Ino]] = {}  # what the process before did last and maybe did not answer

    def resume(self, acts: dict[int, tuple[Act, Ino]]) -> None:
        """Go on for a process that died."""
        self._acts = acts

    def end_resume(self) -> None:
        """What is asked for from now on is no repetition."""
        self._acts.clear()

    def _repeated(self, act: Act | None) -> Ino | None:
        """The file concerned, if the process before had done just this already when it died."""
        if not self._acts or act is None or (done := self._acts.pop(act.pid, None)) is None:
            return None
        return done[1] if done[0] == act else None

    def _meant(self, node: Node) -> Node:
        """`node`, if the kernel can mean it by its name. What somebody else has stored since the kernel looked is
        another node, which no program has seen: it is not removed or moved in place of the one that was.
        Raises: StaleVersion, and the kernel looks again (Source: retry_estale in fs/namei.c)."""
        if not node.lookups:
            raise StaleVersion("lookup", self._inodes.path(node), "was stored anew by somebody else")
        return node

    def _folder(self, ino: int) -> Node:
        node = self._inodes.get(ino)
        if not node.is_dir:
            raise NotADirectory("lookup", self._inodes.path(node))
        if node.detached:
            raise NotFound("lookup", self._inodes.path(node), "was removed")
        return node

    async def lookup(self, parent_ino: int, name: bytes) -> Node:
        """Raises: NotFound. The caller counts the reference that it passes on."""
        node = await self._namespace.child(self._folder(parent_ino), name)
        return self._inodes.corrected(node) if node.misjudged else node

    async def readlink(self, ino: int) -> bytes:
        node = self._inodes.get(ino)
        if not node.is_symlink:
            raise InvalidArgument("readlink", self._inodes.path(node), "is no symbolic link")
        if node.link is not None:
            return node.link
        if node.size > LINK_BYTES_MAX:  # part of a target is another target
            raise NameTooLong("readlink", self._inodes.path(node), f"the target has {node.size} bytes")
        return bytes(await self._files.read_node(node, 0, node.size))

    # ---- new names ----

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

    async def create(
        self, parent_ino: int, name: bytes, mode: int, flags: int, uid: int, gid: int, *, act: Act | None = None
    ) -> tuple[Node, Fh]:
        ino, parent = self._repeated(act), self._folder(parent_ino)
        if ino is not None:
            return self._created_before(await self._made_before(ino, parent, name), flags)
        refusal = await self._storable.refusal(parent, name, is_dir=False)
        async with self._making(parent, name):
            node = None if self._is_removed(parent, name) else await self._namespace.exists(parent, name)
            if node is None:
                if refusal is not None:
                    raise refusal
                self._writable.require_room()
                attrs = self._attrs(stat.S_IFREG | stat.S_IMODE(mode), uid, gid, parent)
                node = await self._new(parent, name, attrs, act, exclusive=bool(flags & os.O_EXCL))
                return node, self._files.opened(node, flags)
            if flags & os.O_EXCL and not self._made_by_us(node):
                raise Exists("create", self._inodes.path(node))
            return node, self._files.open(node.ino, flags)

    def _is_removed(self, parent: Node, name: bytes) -> bool:
        """Whether programs here know that `name` is free: it is being deleted. What another client has stored there
        since, and nobody here has seen, is met as a conflict."""
        key = self._inodes.key(parent) + keys.segment_of(name)
        return name not in (parent.kids or {}) and key in self._changes.gone

    async def _made_before(self, ino: Ino, parent: Node, name: bytes) -> Node:
        """What the process before had made; one that the store has already it may not have noted."""
        return self._inodes.find(ino) or await self._namespace.child(parent, name)

    def _made_by_us(self, node: Node) -> bool:
        """Whether it is in the store since we put it there for a call that got no answer."""
        return self._claims is not None and self._changes.attempts.made_before(node, self._inodes.key(node))

    def _making(self, parent: Node, name: bytes) -> AbstractAsyncContextManager[None]:
        return self._claims.making(parent, name) if self._claims else nullcontext()

    def _created_before(self, node: Node, flags: int) -> tuple[Node, Fh]:
        """The references of an answer that was not given may have been noted already."""
        if node.opens:
            node.lookups -= 1  # the caller counts it
            return node, Fh(node.ino << 1 | (flags & os.O_ACCMODE != os.O_RDONLY))
        return node, self._files.open(node.ino, flags)

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
        self._writable.require_room()
        ino, parent = self._repeated(act), self._folder(parent_ino)
        if ino is not None:
            return await self._made_before(ino, parent, name)
        refusal = await self._storable.refusal(parent, name, is_dir=stat.S_ISDIR(attrs_mode))
        async with self._making(parent, name):
            if (found := await self._namespace.exists(parent, name)) is not None:
                if self._made_by_us(found):
                    return found
                raise Exists("create", name.decode(errors="replace"))
            if refusal is not None:
                raise refusal
            attrs = self._attrs(attrs_mode, uid, gid, parent, rdev)
            return await self._new(parent, name, attrs, act, content, exclusive=True)

    async def _new(
        self, parent: Node, name: bytes, attrs: Attrs, act: Act | None, content: bytes = b"", *, exclusive: bool
    ) -> Node:
        """What nothing had the name of. Nothing is awaited after the last look. Raises: Exists, NotFound."""
        info = None
        key = self._new_key(parent, name, attrs, len(content))
        if exclusive and self._claims:
            info = await self._claims.claim(key, content, to_metadata(attrs))
            if (taken := self._claims.taken(parent, name, info)) is not None:
                with self._changes.batch():
                    self._changes.attempts.answered(key)
                    self._changes.did(act, taken)
                return taken
        if parent.detached:
            raise NotFound("create", name.decode(errors="replace"), "its directory was removed")
        with self._giving_back(info):
            layer = None if info is not None or stat.S_ISDIR(attrs.mode) else self._changes.new_layer(content)
            try:
                with self._changes.batch():
                    return self._add(parent, name, attrs, act, info, layer)
            except BaseException:
                if layer is not None:
                    self._changes.drop_layer(layer)
                raise

    @contextmanager
    def _giving_back(self, info: ObjectInfo | None) -> Iterator[None]:
        """If the change is refused, `info`, which the store was given for it, goes again."""
        try:
            yield
        except (PhfsError, OSError):
            if info is not None:
                self._changes.give_back(info.key, info.etag)
            raise

    def _new_key(self, parent: Node, name: bytes, attrs: Attrs, size: int) -> ObjectKey:
        """Where the quota is used up there are no new files: what would be written to them is refused too late."""
        key = keys.changed(self._inodes.key(parent), keys.new_segment(name))
        if stat.S_ISDIR(attrs.mode):
            return keys.join(key, "/")
        if self._quotas:
            self._quotas.require(key, max(1, size))
        return key

    def _add(
        self,
        parent: Node,
        name: bytes,
        attrs: Attrs,
        act: Act | None,
        info: ObjectInfo | None,
        layer: Layer | None,
    ) -> Node:
        """`info`: the store has it already; else a file has a `layer`."""
        node = self._inodes.new(attrs, ctime_ns=attrs.mtime_ns)
        node.checked_at = trio.current_time()
        if node.is_dir:
            node.complete_at = node.checked_at
            node.own_attrs = self._defaults.differs(attrs)
        self._inodes.attach(parent, name, node)
        if info is None:
            self._changes.created(node, layer)
        else:
            self._changes.created_in_store(node, info)
        self._namespace.forget_missing(parent, name)
        self._child_changed(parent)
        self._changes.did(act, node)
        return node

    def _attrs(self, mode: int, uid: int, gid: int, parent: Node, rdev: int = 0) -> Attrs:
        now = time.time_ns()
        if parent.mode & stat.S_ISGID:  # Source: inode(7), set-group-ID on a directory
            gid = parent.gid
            mode |= stat.S_ISGID if stat.S_ISDIR(mode) else 0
        if self._config.posix_attrs is PosixAttrs.IGNORE:
            like = self._defaults.directory(now) if stat.S_ISDIR(mode) else self._defaults.file(now)
            mode, uid, gid = stat.S_IFMT(mode) | stat.S_IMODE(like.mode), like.uid, like.gid
        return Attrs(mode=mode, uid=uid, gid=gid, mtime_ns=now, rdev=rdev)

    def _child_changed(self, parent: Node) -> None:
        """`parent` has got or lost a name."""
        self._changes.keep(parent)
        parent.mtime_ns = parent.ctime_ns = time.time_ns()
        parent.own_attrs = self._defaults.differs(parent.attrs)
        parent.unseen = False  # to be asked again, should `kids` be empty
        self._changes.review_marker(parent)

    # ---- names that go ----

    async def unlink(self, parent_ino: int, name: bytes, *, act: Act | None = None) -> None:
        self._writable.require()
        if self._repeated(act) is not None:
            return
        parent = self._folder(parent_ino)
        keys.changed(self._inodes.key(parent), keys.segment_of(name))
        node = self._meant(await self._namespace.child(parent, name))
        if node.is_dir:
            raise IsADirectory("unlink", self._inodes.path(node))
        self._remove(parent, node, act)

    async def rmdir(self, parent_ino: int, name: bytes, *, act: Act | None = None) -> None:
        self._writable.require()
        if self._repeated(act) is not None:
            return
        parent = self._folder(parent_ino)
        keys.changed(self._inodes.key(parent), keys.segment_of(name))
        node = self._meant(await self._namespace.child(parent, name))
        if not node.is_dir:
            raise NotADirectory("rmdir", self._inodes.path(node))
        if not await self._namespace.is_empty(node):
            raise NotEmpty("rmdir", self._inodes.path(node))
        if node.detached:
            raise NotFound("rmdir", self._inodes.path(node))
        self._remove(parent, node, act)

    def _remove(self, parent: Node, node: Node, act: Act | None) -> None:
        key = self._inodes.key(node)
        with self._changes.batch():
            self._changes.keep(node)
            node.ctime_ns = time.time_ns()
            self._inodes.detach(node)
            if node.is_body:
                self._changes.emptied(parent, node)
                self._namespace.note_missing(parent, node.name, self._inodes.questions.moment())
            else:
                self._changes.unlinked(node, key)
            self._child_changed(parent)
            self._changes.did(act, node)

    # ---- names that move ----

    async def rename(
        self, parent_ino: int, name: bytes, to_ino: int, to_name: bytes, flags: int, *, act: Act | None = None
    ) -> None:
        """Atomic in the tree; the store follows. Raises: Exists (RENAME_NOREPLACE), NotEmpty, InvalidArgument
        (RENAME_EXCHANGE and unknown flags), IsADirectory, NotADirectory, NameTooLong."""
        self._writable.require()
        if flags & ~RENAME_NOREPLACE:
            raise InvalidArgument("rename", name.decode(errors="replace"), "flags are not supported")
        if self._repeated(act) is not None:
            return
        source_dir, target_dir = self._folder(parent_ino), self._folder(to_ino)
        keys.changed(self._inodes.key(source_dir), keys.segment_of(name))
        with self._namespace.loading() as load:
            for look in range(LOOKS_MAX):
                source = self._meant(await self._namespace.child(source_dir, name))
                if source.is_body:
                    raise BoundToFolder("rename", self._inodes.path(source), "these bytes are the directory's marker")
                if source.is_dir:
                    await load.below(source)
                    if load.hides_some(source):
                        path = self._inodes.path(source)
                        raise NotSupported("rename", path, "objects in it that no name can show would stay behind")
                refusal = await self._storable.refusal(target_dir, to_name, is_dir=source.is_dir)
                target = await self._namespace.exists(target_dir, to_name)
                if target is source:
                    return
                if target is not None:
                    await self._may_replace(source, target, flags)
                still = self._still(source_dir, name, source) and self._still(target_dir, to_name, target)
                if still and (load.has_all(source) or look + 1 == LOOKS_MAX):
                    break
            else:
                raise StaleVersion("rename", name.decode(errors="replace"), "others change the names all the time")
            if refusal is not None:
                raise refusal
            info = None
            if flags & RENAME_NOREPLACE and self._claims:
                info = await self._claim_target(self._claims, source, source_dir, name, target_dir, to_name)
            with self._giving_back(info):
                self._rename(source, source_dir, target_dir, to_name, target, act, info)
            if not load.has_all(source):  # what others have stored in it since then stays where it is
                self._inodes.incomplete(source_dir)
                self._namespace.forget_missing(source_dir, name)

    async def _claim_target(
        self, claims: ExclusiveCreates, source: Node, source_dir: Node, name: bytes, target_dir: Node, to_name: bytes
    ) -> ObjectInfo:
        """Put the new name into the store. Nothing is awaited after the last look. Raises: Exists, NotFound."""
        key = keys.changed(self._inodes.key(target_dir), keys.new_segment(to_name))
        info = await claims.claim(keys.join(key, "/" * source.is_dir), b"", to_metadata(source.attrs))
        seen = claims.taken(target_dir, to_name, info)
        if not self._still(source_dir, name, source):
            claims.give_back(info)
            raise NotFound("rename", name.decode(errors="replace"), "changed meanwhile")
        if seen is not None:  # somebody has looked at the empty object: the file takes its place
            self._inodes.detach(seen)
        return info

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

    def _may_move(self, moved: list[Node], old: list[ObjectKey], to: ObjectKey, target: Node | None) -> None:
        """Raises: QuotaExceeded, also where another errno would have programs copy what will not fit."""
        moves: list[tuple[str, str | None, int]] = [
            (key, to + key.removeprefix(old[0].rstrip("/")), node.stored_size)
            for node, key in zip(moved, old, strict=True)
        ]
        if target is not None:
            moves.append((self._inodes.key(target), None, target.stored_size))
        self._quotas.require_moves(moves)

    def _rename(
        self,
        source: Node,
        source_dir: Node,
        target_dir: Node,
        to_name: bytes,
        target: Node | None,
        act: Act | None,
        info: ObjectInfo | None,
    ) -> None:
        """`info` is what the store has under the new name on our behalf."""
        moved = [source, *self._inodes.descendants(source)]
        for node in moved if target is None else [*moved, target]:
            self._storable.require_unsealed(node)
        self._writable.require_room(len(moved) * ROWS_BYTES)
        old = [self._inodes.key(node) for node in moved]
        new_prefix = keys.changed(self._inodes.key(target_dir), keys.new_segment(to_name))
        longest = max(len(key.encode()) for key in old) - len(old[0].encode()) + len(new_prefix.encode()) + 1
        if longest > KEY_BYTES_MAX:
            raise NameTooLong("rename", self._inodes.path(source), f"a key would have over {KEY_BYTES_MAX} bytes")
        if self._quotas:
            self._may_move(moved, old, new_prefix, target)
        over = None if info is None else info.etag
        with self._changes.batch(_log_bytes(moved, longest)):
            if target is not None:
                target_key = self._inodes.key(target)
                self._changes.keep(target)
                target.ctime_ns = time.time_ns()
                self._inodes.detach(target)
                over = self._changes.replaced(target, target_key)
            if info is not None:
                self._changes.attempts.answered(info.key)
            self._changes.keep(source)
            self._inodes.move(source, target_dir, to_name)
            # Children first: a folder whose marker is not wanted any more is let go of, with all in it that is clean.
            for node, key in reversed(list(zip(moved, old, strict=True))):
                self._changes.renamed(node, key, over if node is source else None, at_once=source.is_dir)
            source.ctime_ns = time.time_ns()
            self._namespace.forget_missing(target_dir, to_name)
            self._child_changed(source_dir)
            if target_dir is not source_dir:
                self._child_changed(target_dir)
            self._changes.did(act, source)

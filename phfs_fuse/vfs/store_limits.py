"""Changes that the store could not keep: found before they are answered, by what would be sent. Owns no state."""

from __future__ import annotations

from phfs_fuse import keys
from phfs_fuse.attrs import Attrs, to_metadata
from phfs_fuse.errors import IllegalName, NameTooLong, NoSpace, NotSupported, PhfsError, TooLarge
from phfs_fuse.store.base import ObjectStore, metadata_bytes
from phfs_fuse.tree.inodes import Inodes
from phfs_fuse.tree.node import Node


def may_be_refused(node: Node) -> bool:
    """Whether its object is sealed, or has more metadata than mode, owner and times, which always fit."""
    return node.xattrs is not None or node.link is not None or node.others_bytes > 0 or node.is_sealed


class StoreLimits:
    def __init__(self, store: ObjectStore, inodes: Inodes) -> None:
        self._store = store
        self._inodes = inodes

    async def refusal(self, parent: Node, name: bytes, *, is_dir: bool) -> PhfsError | None:
        """The reason why nothing new can have `name` in `parent`. None: the store takes it."""
        try:
            key = keys.changed(self._inodes.key(parent), keys.new_segment(name))
            await self._store.require_key(keys.join(key, "/" * is_dir))
        except (IllegalName, NameTooLong) as exc:
            return exc
        return None

    def require_unsealed(self, node: Node) -> None:
        """Raises: NotSupported if only the owner of the key of `node`'s object can have the store copy or read it.
        MinIO does not even replace it, if it has a certain version."""
        if node.is_sealed:
            reason = "the object is encrypted by a key that its owner has (SSE-C); it can only be removed"
            raise NotSupported("change", self._inodes.path(node), reason)

    def require_attrs(self, node: Node, attrs: Attrs) -> None:
        """Raises: NotSupported for a sealed object, NoSpace if the object of `node` has no room for `attrs`. Mode,
        owner and times alone always fit."""
        self.require_unsealed(node)
        if attrs.xattrs is None and attrs.link is None and not node.others_bytes:
            return
        size = metadata_bytes(to_metadata(attrs)) + node.others_bytes
        size_max = self._store.limits.metadata_bytes_max
        if size > size_max:
            reason = f"{size} bytes of metadata, the store keeps {size_max}; remove some extended attributes"
            raise NoSpace("set attributes", self._inodes.path(node), reason)

    def require_room(self, node: Node) -> None:
        """As `require_attrs`, for those that `node` has: they are sent again with each change of its bytes."""
        if may_be_refused(node):
            self.require_attrs(node, node.attrs)

    async def require_marker(self, node: Node) -> None:
        """Raises: NoSpace if the directory cannot have attributes, since the store takes no marker of its name."""
        if not (key := self._inodes.key(node)):
            return  # the root of the bucket
        try:
            await self._store.require_key(key)
        except (IllegalName, NameTooLong) as exc:
            reason = "the name is too long for a directory marker, which would keep them; rename the directory"
            raise NoSpace("set attributes", self._inodes.path(node), reason) from exc

    def require_size(self, node: Node, size: int) -> None:
        """Raises: TooLarge."""
        if size > self.size_max:
            reason = f"{size} bytes, an object holds at most {self.size_max}"
            raise TooLarge("write", self._inodes.path(node), reason)

    @property
    def size_max(self) -> int:
        return self._store.limits.object_bytes_max

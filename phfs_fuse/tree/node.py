"""One node: a file, link, special file or directory, small enough that there may be a million. No I/O, no await.

Owns nothing: the nodes are those of `inodes`, and each field is changed by the module that it is about.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Callable, Mapping
from enum import Enum, auto
from functools import lru_cache
from operator import attrgetter
from sys import intern
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from phfs_fuse.attrs import Attrs
from phfs_fuse.errors import PhfsError
from phfs_fuse.keys import BODY
from phfs_fuse.tree.dirty import DirtyFile
from phfs_fuse.types import ETag, Ino, ObjectKey

if TYPE_CHECKING:
    from phfs_fuse.cache.block_cache import Version
    from phfs_fuse.state.staging import Staged
    from phfs_fuse.store.base import Properties

NEVER = float("-inf")
_MD5 = re.compile("[0-9a-f]{32}")
# Apart from the classes: a file has no room for what only directories have, and reads the values of the class.
_OF_ALL = (
    "_base_etag", "_base_folder", "_base_name", "_base_size", "_few", "atime_ns", "checked_at", "ctime_ns",
    "detached", "dirty", "gid", "holds", "ino", "lookups", "mode", "mtime_ns", "name", "noted", "opens", "parent",
    "seq", "size", "uid", "version",
)  # fmt: skip
_OF_FOLDERS = ("complete_at", "gaps", "hidden", "keyed", "kids", "marker", "misses", "own_attrs", "subdirs", "unseen")
# What a change of names, bytes or attributes changes: not what the kernel holds, nor `kids`, which is no value.
_CHANGED = (
    "_base_etag", "_base_folder", "_base_name", "_base_size", "atime_ns", "checked_at", "ctime_ns", "detached",
    "dirty", "gid", "mode", "mtime_ns", "name", "parent", "size", "uid",
)  # fmt: skip
_CHANGED_OF_FOLDERS = (*_CHANGED, "complete_at", "marker", "own_attrs", "subdirs", "unseen")
T = TypeVar("T")


_values = attrgetter(*_CHANGED)
_values_of_folder = attrgetter(*_CHANGED_OF_FOLDERS)


@lru_cache(4096)
def _same(value: int) -> int:
    """One object for equal numbers: modes and owners are few, nodes are many."""
    return value


class Pages(Enum):
    """The pages of a file that the kernel has, as far as this process knows: see `OpenFiles.keeps_pages`."""

    TRUE = auto()
    DOUBTED = auto()  # some may have other bytes than the file
    DROPPED = auto()  # an open had them dropped, and may be under way still


class Base(NamedTuple):
    """Where the stored bytes of a file are: one version of one object."""

    key: ObjectKey
    etag: ETag
    size: int


class Few(Generic[T]):
    """An attribute that few nodes have at a time: the others read its default, and have no room for it."""

    def __init__(self, default: T) -> None:
        self._default = default

    def __set_name__(self, owner: type[Node], name: str) -> None:
        self._name = name

    def __get__(self, node: Node, owner: type[Node]) -> T:
        few = node._few
        return self._default if few is None else few.get(self._name, self._default)

    def __set__(self, node: Node, value: T) -> None:
        if value == self._default:
            if node._few is not None and node._few.pop(self._name, None) is not None and not node._few:
                node._few = None
        elif node._few is None:
            node._few = {self._name: value}
        else:
            node._few[self._name] = value


class Node:
    """One file, symlink or special file; a directory is a `Folder`. Its methods do not await.

    There is one for each known name, and there may be a million: what a slot or an object more costs, all pay.
    """

    __slots__ = _OF_ALL

    _segment: Few[str | None] = Few(None)  # None: the name, as text
    rdev: Few[int] = Few(0)
    xattrs: Few[Mapping[bytes, bytes] | None] = Few(None)
    link: Few[bytes | None] = Few(None)
    others_bytes: Few[int] = Few(
        0
    )  # of user metadata that is none of these and stays with the object; see `store.limits`
    is_sealed: Few[bool] = Few(False)  # the store needs its owner's key for the object (SSE-C)
    staged: Few[Staged | None] = Few(None)
    inherited: Few[Properties | None] = Few(None)  # of a base whose bytes have all been fetched
    writers: Few[int] = Few(0)  # of `opens`, open for writing
    direct_writers: Few[int] = Few(0)  # of these, past the kernel's cache
    misjudged: Few[bool] = Few(False)  # the kernel takes it for longer, or older, than it is
    pages: Few[Pages] = Few(Pages.TRUE)
    refused: Few[PhfsError | None] = Few(None)  # why a write was not taken that the kernel had answered; to be told
    doubted_at: Few[float] = Few(NEVER)  # when somebody else changed the name: answers from before do not count

    # of directories only; a file has these values and cannot be given others
    kids: dict[bytes, Node] | None = None
    complete_at: float = NEVER  # when `kids` was all that there is
    marker: ETag | None = None  # version of the marker object in the store
    own_attrs: bool = False  # has attributes that only a marker can keep
    gaps: int = 0  # how often `kids` lost a name that the store has
    subdirs: int = 0
    unseen: bool = False  # the store has more in it than `kids`
    hidden: bool = False  # and some of that no name can show
    misses: int = 0  # names that had to be asked for since `complete_at`
    keyed: tuple[int, ObjectKey] | None = None  # its key, and when that was so: see `Inodes.key`

    def __init__(self, ino: Ino, attrs: Attrs, *, ctime_ns: int) -> None:
        self.ino = ino
        self.parent: Node | None = None
        self.name = b""
        self._few: dict[str, Any] | None = None  # see `Few`
        self.size = 0
        self.set_attrs(attrs)
        self.ctime_ns = ctime_ns
        self.atime_ns = attrs.mtime_ns
        self.base = None
        self.lookups = 0  # references that the kernel holds
        self.noted = False  # kernel state on disk has it as it is
        self.opens = 0  # open files and directory streams
        self.holds = 0  # directory streams that are about to show it
        self.checked_at = NEVER  # when the store was last asked and said that this is what the name means
        self.seq = 0  # of the last local change: answers that are older say nothing about it
        self.detached = False
        self.dirty: DirtyFile | None = None
        self.version: Version | None = None

    def memento(self) -> Callable[[], None]:
        """A call that brings back what a change may change, also of how far its bytes are."""
        names, get = (_CHANGED_OF_FOLDERS, _values_of_folder) if self.is_dir else (_CHANGED, _values)
        values = get(self)
        few = None if self._few is None else dict(self._few)
        parts = [part.memento() for part in (self.dirty, self.staged) if part is not None]

        def bring_back() -> None:
            for name, value in zip(names, values, strict=True):
                setattr(self, name, value)
            self._few = few
            for part in parts:
                part()

        return bring_back

    @property
    def base(self) -> Base | None:
        """None: the store has no bytes of it."""
        if (folder := self._base_folder) is None:
            return None
        etag = self._base_etag
        text = f"{etag:032x}" if isinstance(etag, int) else etag
        return Base(ObjectKey(folder + self._base_name.decode()), ETag(text), self._base_size)

    @base.setter
    def base(self, base: Base | None) -> None:
        """Kept small: the key as its folder, one object for all in there, and the name; an MD5 as a number."""
        key, etag, self._base_size = base or (None, "", 0)
        text = self.name.decode(errors="replace")
        is_ours = key is not None and text != "" and key.endswith(text) and text.encode() == self.name
        self._base_folder: str | None = intern(key[: -len(text)]) if key is not None and is_ours else key
        self._base_name = self.name if is_ours else b""
        self._base_etag: int | str = int(etag, 16) if _MD5.fullmatch(etag) else etag

    @property
    def segment(self) -> str:
        """Of the key, for this name."""
        return self.name.decode() if self._segment is None else self._segment

    def set_name(self, name: bytes, segment: str) -> None:
        self.name = name
        self._segment = None if segment.encode("utf-8", "surrogatepass") == name else segment

    @property
    def is_dir(self) -> bool:
        return stat.S_ISDIR(self.mode)

    @property
    def is_file(self) -> bool:
        return stat.S_ISREG(self.mode)

    @property
    def is_symlink(self) -> bool:
        return stat.S_ISLNK(self.mode)

    @property
    def nlink(self) -> int:
        if self.detached:
            return 0
        if not self.is_dir or self.complete_at == NEVER:  # 1 for a directory says: not counted
            return 1
        return 2 + self.subdirs

    @property
    def attrs(self) -> Attrs:
        return Attrs(
            mode=self.mode,
            uid=self.uid,
            gid=self.gid,
            mtime_ns=self.mtime_ns,
            rdev=self.rdev,
            xattrs=self.xattrs,
            link=self.link,
        )

    def set_attrs(self, attrs: Attrs) -> None:
        self.mode, self.uid, self.gid = _same(attrs.mode), _same(attrs.uid), _same(attrs.gid)
        self.mtime_ns, self.rdev, self.xattrs = attrs.mtime_ns, attrs.rdev, attrs.xattrs
        self.link = attrs.link

    @property
    def is_dated_by_store(self) -> bool:
        """Whether its time is the store's own of its object: a copy has another one."""
        return self.mtime_ns == self.ctime_ns and self.mtime_ns % 10**9 == 0

    @property
    def stored_size(self) -> int:
        """How many bytes its object has, or shall have."""
        return 0 if self.link is not None or self.is_dir else self.size

    @property
    def body(self) -> Node | None:
        """The file that shows the bytes of the directory's marker: the object is that file's, and has the attributes
        of the directory too."""
        found = self.kids.get(BODY) if self.kids else None
        return found if found is not None and found.segment == "" else None

    @property
    def is_body(self) -> bool:
        return self._segment == ""

    @property
    def busy(self) -> bool:
        """Whether something still refers to it."""
        return bool(self.lookups or self.opens or self.holds or self.dirty)


class Folder(Node):
    """A directory."""

    __slots__ = _OF_FOLDERS

    def __init__(self, ino: Ino, attrs: Attrs, *, ctime_ns: int) -> None:
        super().__init__(ino, attrs, ctime_ns=ctime_ns)
        self.kids = {}
        self.complete_at = NEVER
        self.marker = self.keyed = None
        self.own_attrs = self.unseen = self.hidden = False
        self.gaps = self.subdirs = self.misses = 0

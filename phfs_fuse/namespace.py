"""What a name means: the store's listings and HEADs, merged with what was changed here and is not uploaded yet.

Owns no files and no bytes: it brings nodes into the tree, refreshes them, and replaces a node by a new one when
somebody else has stored a new version (the old one stays with those who have it open). An answer of the store never
overrides a local change made after the question was asked.
"""

from __future__ import annotations

import logging
import math
import stat
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from functools import partial

import trio
from cachetools import LRUCache

from phfs_fuse import keys
from phfs_fuse.attrs import Attrs, from_metadata
from phfs_fuse.changes import Changes
from phfs_fuse.config import PosixAttrs, TreeConfig
from phfs_fuse.errors import (
    AccessDenied,
    BucketNotFound,
    IllegalName,
    NameTooLong,
    NotADirectory,
    NotFound,
    PhfsError,
    ReadOnly,
    StoreUnavailable,
)
from phfs_fuse.inodes import NEVER, Base, Inodes, Node, Question
from phfs_fuse.namewalks import NameWalks
from phfs_fuse.store.base import Listing, ObjectInfo, ObjectStore
from phfs_fuse.tasks import gather
from phfs_fuse.trust import Trust
from phfs_fuse.types import NAME_BYTES_MAX, Ino, ObjectKey

log = logging.getLogger(__name__)

MISSES_MAX = 2  # names asked for one by one before the whole directory is listed
AWAY_SECONDS = 2.0  # after a request that found the store away, names are answered from memory
ROWS_BYTES = 4096  # of the journal, for one change
MISSING_SECONDS = 0.5  # for which a name is known not to be there, without any lifetime: create follows lookup
REFUSED = (StoreUnavailable, BucketNotFound, AccessDenied)  # answers that say nothing about a name
HEADS_MAX = 32  # at a time, where a listing does not carry the metadata


def _plain(page: Listing, prefix: str) -> list[ObjectInfo]:
    """The objects of a page from within a folder of which is certain that they show under their own names: what else
    has a part in that (a folder, a file that is no link) may be on another page."""
    folders = set(page.prefixes)
    end = page.objects[-1].key if page.objects and page.next_token is not None else ""
    return [
        info
        for info in page.objects
        if info.key != prefix
        and info.key + "/" not in folders
        and not info.key.endswith(keys.RCLONE_LINK)
        and not end.startswith(info.key)
    ]


class Namespace:
    def __init__(
        self, *, store: ObjectStore, inodes: Inodes, changes: Changes, config: TreeConfig, trust: Trust
    ) -> None:
        self._store = store
        self._inodes = inodes
        self._changes = changes
        self._config = config
        self._trust = trust
        # names that the kernel was told are not there, and when they were asked for
        self._missing: LRUCache[tuple[int, bytes], float] = LRUCache(100_000)
        self._listings: dict[Ino, trio.Event] = {}  # for single names, under way
        self._heads = trio.CapacityLimiter(HEADS_MAX)
        self._walks = NameWalks()
        self._away_until = -math.inf
        self.illegal_keys = 0

    def require_writable(self) -> None:
        """Raises: ReadOnly, OSError (ENOSPC, when not even what gives space back could be noted)."""
        self._require_not_read_only()
        self._changes.require_some_space()

    def require_room(self, size: int = ROWS_BYTES) -> None:
        """As `require_writable`, for what makes the local state grow. Raises: ReadOnly, OSError (ENOSPC)."""
        self._require_not_read_only()
        self._changes.require_space(size)

    def _require_not_read_only(self) -> None:
        if self._config.read_only:
            raise ReadOnly("write", "mount", "is read-only")

    @property
    def ttl(self) -> float:
        """Seconds for which an answer of the store is believed."""
        return self._trust.short_seconds

    # ---- defaults ----

    @staticmethod
    def root_attrs(config: TreeConfig) -> Attrs:
        mode = stat.S_IFDIR | config.dir_mode
        return Attrs(mode=mode, uid=config.uid, gid=config.gid, mtime_ns=time.time_ns())

    def set_root(self, marker: ObjectInfo) -> None:
        """The root has a marker with attributes of its own."""
        self._set_marker(self._inodes.root, marker)

    def default_file(self, modified_ns: int) -> Attrs:
        config = self._config
        return Attrs(mode=stat.S_IFREG | config.file_mode, uid=config.uid, gid=config.gid, mtime_ns=modified_ns)

    def default_directory(self, modified_ns: int | None = None) -> Attrs:
        config = self._config
        at = time.time_ns() if modified_ns is None else modified_ns
        return Attrs(mode=stat.S_IFDIR | config.dir_mode, uid=config.uid, gid=config.gid, mtime_ns=at)

    def _attrs(self, info: ObjectInfo, default: Attrs) -> Attrs:
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

    # ---- one name ----

    def _known_at(self, node: Node) -> float:
        """When the store was asked last what the name of `node` means; NEVER if somebody else changed it since."""
        parent = node.parent
        at = node.checked_at if parent is None else max(node.checked_at, parent.complete_at)
        return at if at > node.doubted_at else NEVER

    def lifetime(self, node: Node) -> float:
        """Seconds for which the kernel may believe what it is told of `node`."""
        now = trio.current_time()
        is_ours = node.dirty is not None or node.detached or node.parent is None
        return self._trust.kernel_seconds(now if is_ours else self._known_at(node), now)

    def _complete(self, parent: Node, now: float) -> bool:
        return self._trust.holds(parent.complete_at, now)

    def _is_missing(self, parent: Node, name: bytes, now: float) -> bool:
        """Whether `name` was asked for, not long ago, and is not there."""
        asked_at = self._missing.get((parent.ino, name), NEVER)
        return self._trust.holds(asked_at, now) or now < asked_at + MISSING_SECONDS

    def _question(self) -> Question:
        return Question(self._changes.seq, trio.current_time())

    def known(self, parent: Node, name: bytes) -> Node | None:
        """The child if what is known of it is recent enough. Raises: NotFound if it is known not to be there."""
        kids = parent.kids
        if kids is None:
            raise NotADirectory("lookup", self._inodes.path(parent))
        now = trio.current_time()
        node = kids.get(name)
        if node is not None:
            if node.dirty is not None or self._trust.holds(self._known_at(node), now):
                return node
        elif self._complete(parent, now) or self._is_missing(parent, name, now):
            self._missing[parent.ino, name] = max(parent.complete_at, self._missing.get((parent.ino, name), NEVER))
            raise NotFound("lookup", name.decode(errors="replace"))
        return None

    async def child(self, parent: Node, name: bytes) -> Node:
        """What `name` in `parent` means now. Returns without awaiting anything after the last look at the tree.

        Raises: NotFound, NotADirectory, NameTooLong, IllegalName, and those of REFUSED. While the store is away or
        refuses, what was known last is taken for true.
        """
        if len(name) > NAME_BYTES_MAX:
            raise NameTooLong("lookup", repr(name[:40]), f"longer than {NAME_BYTES_MAX} bytes")
        node = self.known(parent, name)
        if node is not None:
            return node
        if self._is_away and (node := self._remembered(parent, name)) is not None:
            return node
        keys.join(self._inodes.key(parent), keys.segment_of(name))  # the key's length
        question = self._question()
        try:
            with self._inodes.asking(parent, question):
                if parent.misses < MISSES_MAX or not await self._listed(parent, name):
                    parent.misses += 1
                    if not await self._listed_on(parent, name):
                        await self._ask(parent, name)
        except REFUSED as exc:
            self._found_away(exc)
            if (node := self._remembered(parent, name)) is None:
                raise
            return node
        if (node := (parent.kids or {}).get(name)) is not None:
            return node
        if name not in question.heard:
            self._missing[parent.ino, name] = question.at
        raise NotFound("lookup", name.decode(errors="replace"))

    def _remembered(self, parent: Node, name: bytes) -> Node | None:
        """While the store is away what was known last counts, and a directory that was seen whole has no other
        names. What is made on that ground replaces nothing of somebody else: uploads are conditional.
        Raises: NotFound. None: nothing is known."""
        node = (parent.kids or {}).get(name)
        if node is None and parent.complete_at > NEVER:
            raise NotFound("lookup", name.decode(errors="replace"), "as far as known: the store is away")
        return node

    @property
    def _is_away(self) -> bool:
        """Whether the store was found to be away a moment ago."""
        return trio.current_time() < self._away_until

    def _found_away(self, exc: PhfsError) -> None:
        if not isinstance(exc, AccessDenied):  # that may be so for one key
            self._away_until = trio.current_time() + AWAY_SECONDS

    async def exists(self, parent: Node, name: bytes) -> Node | None:
        try:
            return await self.child(parent, name)
        except NotFound:
            return None

    def appeared(self, parent: Node, name: bytes) -> None:
        """`name` was made here."""
        self._missing.pop((parent.ino, name), None)

    async def _ask(self, parent: Node, name: bytes) -> None:
        """HEAD for the file and LIST for the directory at once; then the names that stand for odd keys."""
        segment = keys.segment_of(name)
        if segment.endswith(keys.RCLONE_LINK):
            self._vanish(parent, name, self._changes.seq)  # it is shown as a link, without the suffix
            return
        prefix = self._inodes.key(parent)
        with self._inodes.asking(parent, self._question()) as question:
            await self._ask_plain(parent, name, segment, prefix, question)

    async def _ask_plain(self, parent: Node, name: bytes, segment: str, prefix: str, question: Question) -> None:
        folder: tuple[bool, ObjectInfo | None] = (False, None)
        found: ObjectInfo | None = None

        async def ask_folder() -> None:
            nonlocal folder
            folder = await self._probe_folder(ObjectKey(prefix + segment + "/"))

        async def ask_file() -> None:
            nonlocal found
            found = await self._head(ObjectKey(prefix + segment))

        await gather([ask_folder, ask_file])
        if folder[0]:
            self._merge_folder(parent, segment, folder[1], question)
        elif found is not None:
            self._merge_object(parent, segment, name, found, question)
        else:
            await self._ask_odd(parent, name, segment, prefix, question)

    async def _ask_odd(self, parent: Node, name: bytes, segment: str, prefix: str, question: Question) -> None:
        if segment.endswith(keys.OBJECT_BESIDE):
            plain = segment.removesuffix(keys.OBJECT_BESIDE)
            beside = plain != "" and (await self._probe_folder(ObjectKey(prefix + plain + "/")))[0]
            info = await self._head(ObjectKey(prefix + plain)) if beside else None
            if info is not None:
                self._merge_object(parent, plain, name, info, question)
                return
        else:
            info = await self._head(ObjectKey(prefix + segment + keys.RCLONE_LINK))
            if info is not None:
                self._merge_object(parent, segment + keys.RCLONE_LINK, name, info, question)
                return
        self._vanish(parent, name, question.seq)

    async def _head(self, key: ObjectKey) -> ObjectInfo | None:
        try:
            async with self._heads:
                return await self._store.head(key)
        except NotFound:
            return None

    async def _probe_folder(self, key: ObjectKey) -> tuple[bool, ObjectInfo | None]:
        """Whether anything is below `key`, and its marker with metadata if there is one."""
        page = await self._store.list(key, delimiter=False, count_max=1)
        if not page.objects or page.objects[0].key != key:
            return bool(page.objects), None
        marker = page.objects[0]
        return True, marker if marker.metadata is not None else await self._head(key)

    # ---- merging ----

    def _vanish(self, parent: Node, name: bytes, seq: int) -> None:
        """The store has nothing of that name."""
        node = (parent.kids or {}).get(name)
        if node is None or node.dirty is not None or node.seq > seq or self._holds_local(node):
            return
        self._inodes.displace(node)

    def _holds_local(self, node: Node) -> bool:
        """Whether a directory has something in it that exists only here."""
        return node.is_dir and any(n.dirty is not None for n in self._inodes.descendants(node))

    def _merge_object(
        self, parent: Node, segment: str, name: bytes, info: ObjectInfo, question: Question
    ) -> Node | None:
        """The store has object `info` for `name`; returns the node that shows it now, or what we have instead."""
        assert parent.kids is not None
        node = parent.kids.get(name)
        if self._changes.gone.hides(info.key, question.seq):
            return node
        if node is not None:
            if node.dirty is not None or node.seq > question.seq:
                return node
            if self._shows(node, segment, name, info):
                node.checked_at = max(node.checked_at, question.at)
                return node
            if node.is_dir and self._holds_local(node):
                return node
            self._inodes.displace(node)
        return self._new_file(parent, segment, name, info, question)

    def _shows(self, node: Node, segment: str, name: bytes, info: ObjectInfo) -> bool:
        """Whether `node` is that version; takes on attributes that somebody else has given to it."""
        if node.is_dir or (base := node.base) is None or (base.key, base.etag) != (info.key, info.etag):
            return False
        if info.metadata is None:
            return True
        attrs = self._object_attrs(segment, name, info)
        if stat.S_IFMT(attrs.mode) != stat.S_IFMT(node.mode):
            return False
        if attrs != node.attrs:
            node.set_attrs(attrs)
            node.ctime_ns = info.modified_ns
            self._changes.refreshed(node)
        return True

    def _object_attrs(self, segment: str, name: bytes, info: ObjectInfo) -> Attrs:
        attrs = self._attrs(info, self.default_file(info.modified_ns))
        if segment.endswith(keys.RCLONE_LINK) and not name.endswith(keys.RCLONE_LINK.encode()):
            return Attrs(mode=stat.S_IFLNK | 0o777, uid=attrs.uid, gid=attrs.gid, mtime_ns=attrs.mtime_ns)
        return attrs

    def _new_file(self, parent: Node, segment: str, name: bytes, info: ObjectInfo, question: Question) -> Node:
        attrs = self._object_attrs(segment, name, info)
        node = self._inodes.new(attrs, ctime_ns=info.modified_ns)
        node.size = info.size if attrs.link is None else len(attrs.link)
        self._attach(parent, name, node, segment, question)
        node.base = Base(info.key, info.etag, info.size)
        return node

    def _attach(self, parent: Node, name: bytes, node: Node, segment: str, question: Question) -> None:
        node.checked_at = question.at
        if name in question.heard:
            node.doubted_at = trio.current_time()
        self._inodes.attach(parent, name, node, segment)

    def _merge_folder(self, parent: Node, segment: str, marker: ObjectInfo | None, question: Question) -> Node | None:
        """The store has keys below `segment/`, and `marker` among them if that is not None."""
        assert parent.kids is not None
        name = keys.name_of(segment)
        key = self._inodes.key(parent) + segment + "/"
        node = parent.kids.get(name)
        if self._changes.gone.hides(key, question.seq):
            return node
        if node is not None and not node.is_dir:
            if node.dirty is not None or node.seq > question.seq:
                return node
            self._inodes.displace(node)  # from now on shown as name + OBJECT_BESIDE
            node = None
        if node is None:
            node = self._inodes.new(self.default_directory(), ctime_ns=time.time_ns())
            self._attach(parent, name, node, segment, question)
        if node.dirty is None and node.seq <= question.seq:
            self._set_marker(node, marker)
        node.checked_at = max(node.checked_at, question.at)
        return node

    def _set_marker(self, node: Node, marker: ObjectInfo | None) -> None:
        if marker is None:
            node.marker = None
            return
        if node.marker == marker.etag and marker.metadata is None:
            return
        node.marker = marker.etag
        node.set_attrs(self._attrs(marker, self.default_directory(marker.modified_ns)))
        node.own_attrs = self.differs(node.attrs)

    def differs(self, attrs: Attrs) -> bool:
        """Whether a directory's mode or owner are not the defaults, or it has extended attributes."""
        default = self.default_directory()
        return (attrs.mode, attrs.uid, attrs.gid) != (default.mode, default.uid, default.gid) or bool(attrs.xattrs)

    # ---- what others change ----

    def changed_by_others(self, key: str, *, removed: bool) -> list[tuple[Ino, bytes]]:
        """Somebody else has stored or removed `key`: nothing that was known of the names on the way to it and is
        touched by that is believed any more. Returns those of which the kernel may know: (directory, name)."""
        told: list[tuple[Ino, bytes]] = []
        at = self._inodes.root
        segments = key.removeprefix(self._inodes.key(at)).split("/")
        is_marker = segments[-1] == ""
        if is_marker:
            segments.pop()
        for depth, segment in enumerate(segments, 1):
            is_last = depth == len(segments)
            kid: Node | None = None
            for name in self._names_for(segment, is_object=is_last and not is_marker):
                self._inodes.heard(at, name)
                kid = (at.kids or {}).get(name)
                if self._doubts(kid, is_folder=is_marker or not is_last, is_last=is_last, removed=removed):
                    told += self._doubt(at, name, kid, removed=removed)
            if is_last or kid is None or not kid.is_dir:
                break
            at = kid
        return told

    @staticmethod
    def _names_for(segment: str, *, is_object: bool) -> list[bytes]:
        """The names that may show a key's segment; the last is its own."""
        shown = [segment]
        if is_object:
            shown.insert(0, segment + keys.OBJECT_BESIDE)
            if segment.endswith(keys.RCLONE_LINK):
                shown.insert(0, segment.removesuffix(keys.RCLONE_LINK))
        names = []
        for text in shown:
            with suppress(IllegalName, NameTooLong):
                names.append(keys.name_of(text))
        return names

    @staticmethod
    def _doubts(kid: Node | None, *, is_folder: bool, is_last: bool, removed: bool) -> bool:
        """Whether the change can mean something for the name that now shows `kid`."""
        if kid is None:
            return not removed
        if not kid.is_dir or not is_folder:
            return True
        if is_last and not removed:
            return True  # attributes in the marker
        has_others = len(kid.kids or ()) > 1 or (is_last and bool(kid.kids))
        return removed and not has_others

    def _doubt(self, parent: Node, name: bytes, kid: Node | None, *, removed: bool) -> list[tuple[Ino, bytes]]:
        parent.gaps += 1  # a listing that is under way may not know
        was_missing = self._missing.pop((parent.ino, name), None) is not None
        if kid is None or removed:
            self._inodes.incomplete(parent)
        if kid is not None:
            kid.doubted_at = trio.current_time()
        return [(parent.ino, name)] if was_missing or (kid is not None and kid.lookups) else []

    # ---- whole directories ----

    async def _listed(self, parent: Node, name: bytes) -> bool:
        """Whether a listing of `parent` says what `name` is. One that is under way counts if it has the name; what
        it lacks may have come since it was asked for."""
        if self.ttl and (under_way := self._listings.get(parent.ino)) is not None:
            await under_way.wait()
            return name in (parent.kids or {}) and self._complete(parent, trio.current_time())
        ended = self._listings[parent.ino] = trio.Event()
        try:
            return await self._list_once(parent)
        finally:
            if self._listings.get(parent.ino) is ended:
                del self._listings[parent.ino]
            ended.set()

    async def _list_once(self, parent: Node) -> bool:
        """List `parent` if one page is enough for it; returns whether all its names are known now."""
        async with aclosing(self.pages(parent, pages_max=1)) as pages:
            async for _ in pages:
                pass
        if (whole := self._complete(parent, trio.current_time())) is False:
            parent.misses = -1000  # a big one: asking for single names is cheaper for long
        return whole

    async def _listed_on(self, parent: Node, name: bytes) -> bool:
        """Whether a page of a listing says what `name` is: of a big folder one is asked for, from `name` on, when
        names are asked for one after the other."""
        segment = keys.segment_of(name)
        if parent.misses >= 0 or not self.ttl or (before := self._walks.before(parent, segment)) is None:
            return False
        prefix = self._inodes.key(parent)
        with self._inodes.asking(parent, self._question()) as question:
            page = await self._store.list(prefix, delimiter=True, start_after=prefix + before)
            await self._merge_page(parent, prefix, _plain(page, prefix), (), question)
        kid = (parent.kids or {}).get(name)
        helped = kid is not None and not kid.is_dir and kid.checked_at >= question.at
        self._walks.listed(parent, page.objects[-1].key[len(prefix) :] if page.objects else "", helped=helped)
        return helped

    async def pages(self, parent: Node, *, pages_max: int = 1 << 60) -> AsyncGenerator[list[Node]]:
        """The directory page by page, in the order of the store; then `kids` has all that is not forgotten
        meanwhile, and what is not there any more has left it. Local names that the store lacks are not in
        the pages. Raises: PhfsError."""
        prefix = self._inodes.key(parent)
        seq = self._changes.seq
        asked_at = trio.current_time()
        gaps = parent.gaps
        before = dict(parent.kids or {})
        token: str | None = None
        for _ in range(pages_max):
            try:
                with self._inodes.asking(parent, self._question()) as question:
                    page = await self._store.list(prefix, delimiter=True, token=token)
                    nodes = await self._merge_page(parent, prefix, page.objects, page.prefixes, question)
            except REFUSED as exc:
                self._found_away(exc)
                if token is not None or parent.complete_at == NEVER:
                    raise
                yield list((parent.kids or {}).values())  # as it was known last
                return
            for node in nodes:
                before.pop(node.name, None)
            yield nodes
            if (token := page.next_token) is None:
                for name, node in before.items():
                    if not node.detached:
                        self._vanish(parent, name, seq)
                parent.misses = 0
                parent.unseen = False
                if parent.gaps == gaps:
                    parent.complete_at = asked_at
                return

    async def _merge_page(
        self,
        parent: Node,
        prefix: str,
        objects: Sequence[ObjectInfo],
        prefixes: Sequence[str],
        question: Question,
    ) -> list[Node]:
        infos = await self._with_metadata(parent, prefix, objects)
        legal = [key[len(prefix) : -1] for key in prefixes if self._legal(key[len(prefix) : -1])]
        segments = await self._folders(parent, prefix, legal, question)
        markers = await gather([partial(self._head, ObjectKey(prefix + s + "/")) for s in segments])
        nodes: list[Node] = []
        folders = set(segments)
        plain = folders | {info.key[len(prefix) :] for info in infos}
        for segment, marker in zip(segments, markers, strict=True):
            if (node := self._merge_folder(parent, segment, marker, question)) is not None:
                nodes.append(node)
        for info in infos:
            if info.key == prefix:
                if parent.dirty is None and parent.seq <= question.seq:
                    self._set_marker(parent, info)
                continue
            segment = info.key[len(prefix) :]
            name = self._shown_name(segment, folders, plain)
            if name is None:
                continue
            if (node := self._merge_object(parent, segment, name, info, question)) is not None:
                nodes.append(node)
        return nodes

    async def _folders(self, parent: Node, prefix: str, segments: list[str], question: Question) -> list[str]:
        """Without those that are none: an object that MinIO is deleting just now shows as a folder for a moment."""
        doubtful = [segment for segment in segments if self._was_file(parent, prefix, segment, question)]
        probes = await gather([partial(self._probe_folder, ObjectKey(f"{prefix}{s}/")) for s in doubtful])
        none = {segment for segment, (is_there, _) in zip(doubtful, probes, strict=True) if not is_there}
        return [segment for segment in segments if segment not in none]

    def _was_file(self, parent: Node, prefix: str, segment: str, question: Question) -> bool:
        kid = (parent.kids or {}).get(keys.name_of(segment))
        is_file = kid is not None and not kid.is_dir
        return is_file or self._changes.gone.hides(prefix + segment, question.seq)

    def _shown_name(self, segment: str, folders: set[str], plain: set[str]) -> bytes | None:
        """The name of an object beside `folders`, in a page with the segments `plain`; None: it cannot be shown."""
        shown = segment + keys.OBJECT_BESIDE if segment in folders else segment
        if segment.endswith(keys.RCLONE_LINK):
            shown = segment.removesuffix(keys.RCLONE_LINK)
            if shown in plain:
                self._left_out(f"{segment!r} is hidden by {shown!r}")
                return None
        try:
            return keys.name_of(shown)
        except IllegalName as exc:
            self._left_out(str(exc))
            return None

    def _left_out(self, reason: str) -> None:
        self.illegal_keys += 1
        log.info("left out: %s", reason)

    def _legal(self, segment: str) -> bool:
        """Whether a folder found in the store can be shown; if not it is counted."""
        try:
            keys.name_of(segment)
        except IllegalName as exc:
            self._left_out(str(exc))
            return False
        return True

    async def _with_metadata(self, parent: Node, prefix: str, objects: Sequence[ObjectInfo]) -> Sequence[ObjectInfo]:
        """The page with metadata; what the listing lacks is asked for, unless the version is known already."""
        infos: list[ObjectInfo | None] = list(objects)

        async def one(index: int) -> None:
            infos[index] = await self._head(objects[index].key)

        await gather(
            [
                partial(one, index)
                for index, info in enumerate(objects)
                if info.metadata is None and not self._same_version(parent, prefix, info)
            ]
        )
        return [info for info in infos if info is not None]

    def _same_version(self, parent: Node, prefix: str, info: ObjectInfo) -> bool:
        try:
            kid = (parent.kids or {}).get(keys.name_of(info.key[len(prefix) :]))
        except IllegalName:
            return True  # left out anyway
        return kid is not None and (base := kid.base) is not None and base.etag == info.etag

    def complete_listing(self, parent: Node) -> list[Node] | None:
        """All children, if they are known and recent enough."""
        if not self._complete(parent, trio.current_time()) and not (self._is_away and parent.complete_at > NEVER):
            return None
        return list((parent.kids or {}).values())

    def local_only(self, parent: Node) -> list[Node]:
        """Children that a listing of the store may lack."""
        return [kid for kid in (parent.kids or {}).values() if kid.dirty is not None or self._holds_local(kid)]

    async def is_empty(self, node: Node) -> bool:
        """Whether nothing is below the directory, here or in the store."""
        if node.kids:
            return False
        if self._complete(node, trio.current_time()) or (self._is_away and node.complete_at > NEVER):
            return True
        key = self._inodes.key(node)
        seq = self._changes.seq
        token: str | None = None
        while True:
            page = await self._store.list(key, delimiter=False, token=token)
            if any(o.key != key and not self._changes.gone.hides(o.key, seq) for o in page.objects):
                return False
            if (token := page.next_token) is None:
                return not node.kids

    def is_loaded(self, node: Node) -> bool:
        """Whether the tree still has all that `load_below` brought (the kernel may have forgotten some)."""
        folders = [node, *self._inodes.descendants(node)]
        return all(folder.complete_at > NEVER for folder in folders if folder.is_dir)

    async def load_below(self, node: Node) -> None:
        """Bring all that the store has below `node` into the tree, so that it can be renamed as a whole."""
        async with aclosing(self.pages(node)) as pages:
            async for nodes in pages:
                for kid in nodes:
                    if kid.is_dir and not kid.detached:
                        await self.load_below(kid)

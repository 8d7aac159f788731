"""Whole directories: brings pages of the store's listings into the tree. Owns the count of keys that are left out,
since no name can show them.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import replace

from phfs_fuse import keys
from phfs_fuse.errors import IllegalName
from phfs_fuse.namespace.merge import Merge
from phfs_fuse.namespace.name_cache import REFUSED, NameCache
from phfs_fuse.namespace.queries import StoreQueries
from phfs_fuse.pending.changes import Changes
from phfs_fuse.store.base import Listing, ObjectInfo, ObjectStore
from phfs_fuse.tree.inodes import Inodes
from phfs_fuse.tree.node import NEVER, Node
from phfs_fuse.tree.questions import Question

log = logging.getLogger(__name__)


class Listings:
    def __init__(
        self,
        *,
        store: ObjectStore,
        inodes: Inodes,
        changes: Changes,
        known: NameCache,
        merging: Merge,
        probes: StoreQueries,
    ) -> None:
        self._store = store
        self._inodes = inodes
        self._changes = changes
        self._known = known
        self._merging = merging
        self._probes = probes
        self.illegal_keys = 0

    async def pages(self, parent: Node, *, pages_max: int = 1 << 60, after: str = "") -> AsyncGenerator[list[Node]]:
        """The directory page by page, in the order of the store; then `kids` has all that is not forgotten
        meanwhile, and what is not there any more has left it. Local names that the store lacks are not in
        the pages. With `after`, the segment of a key, only what follows it. All pages are answers to one question, as
        old as the first. Raises: PhfsError."""
        gaps = parent.gaps
        before = set(parent.kids or ())  # names of which no page told so far
        moved: set[bytes] = set()  # names that were given when the folder got another place
        held: list[ObjectInfo] = []  # the last object of a page: its folder may begin the next one
        hidden = False
        token, last, is_last = None, after, False
        with self._merging.walking(parent) as question:
            whole = Question(question.prefix, question.seq, question.at)
            for _ in range(pages_max):
                try:
                    asked_at = question.at
                    page = await self._page(question, token, last, held)
                    page, held = _held_back(page, held if question.at == asked_at else [])
                    end = "" if page.next_token is None else max(_ends(page, held), default="")
                    nodes, left_out = await self._merge(parent, page, question, end)
                except REFUSED as exc:
                    self._known.found_away(exc)
                    if token is not None or parent.complete_at == NEVER:
                        raise
                    yield list((parent.kids or {}).values())  # as it was known last
                    return
                if nodes is None:  # the folder has another place, and the tree all that was in it
                    question.prefix = self._inodes.key(parent)
                    self._merging.ask_anew(question)
                    nodes = [kid for kid in (parent.kids or {}).values() if _is_behind(kid, last)]
                    moved.update(kid.name for kid in nodes)
                    token, held = None, []
                else:
                    nodes = [node for node in nodes if node.name not in moved] if moved else nodes
                    before.difference_update(node.name for node in nodes)
                    hidden = hidden or left_out
                    last = max((key[len(question.prefix) :] for key in _ends(page)), key=str.encode, default=last)
                    token = page.next_token
                    is_last = token is None
                question.rests = True
                yield nodes
                question.rests = False
                if is_last:
                    if not after:
                        self._listed(parent, before, whole, gaps, hidden=hidden)
                    return

    def _listed(self, parent: Node, before: Iterable[bytes], question: Question, gaps: int, *, hidden: bool) -> None:
        """All pages of `parent` are in the tree, and none of the names `before` was on them; `gaps` as it was."""
        if not self._inodes.is_about(question, parent):
            return
        parent.hidden = hidden
        kids = parent.kids or {}
        for name in before:
            if (kid := kids.get(name)) is not None and kid.doubted_at <= question.at:
                self._merging.absent(parent, name, question)
        parent.misses = 0
        parent.unseen = False
        if parent.gaps == gaps:
            parent.complete_at = max(parent.complete_at, question.at)

    async def _page(self, question: Question, token: str | None, last: str, held: Sequence[ObjectInfo]) -> Listing:
        """The next page, behind the segment `last`, of which `held` was held back. It is asked for as the first of a
        new walk, and `question` put anew, where this walk has lasted for long, or the page or `held` has what others
        were heard to have removed."""
        if token is not None and not question.is_spent:
            page = await self._store.list(question.prefix, delimiter=True, token=token)
            if not _has_left(page, held, question):
                return page
        if token is not None:
            self._merging.ask_anew(question)
        page = await self._store.list(
            question.prefix, delimiter=True, start_after=question.prefix + last if last else ""
        )
        again = question.prefix + last  # a folder, in which the store goes on
        if again in page.prefixes:
            return replace(page, prefixes=[prefix for prefix in page.prefixes if prefix != again])
        return page

    async def page_behind(self, parent: Node, segment: str) -> tuple[str, float]:
        """Bring a page of plain objects, from behind `segment` on, into the tree. Returns the last segment of the
        page ("": it is empty), and when it was asked for. Awaits nothing after the tree has it."""
        with self._merging.asking(parent) as question:
            prefix = question.prefix
            page = await self._store.list(prefix, delimiter=True, start_after=prefix + segment)
            plain = replace(page, objects=_plain(page, prefix), prefixes=(), unreadable=(), next_token=None)
            await self._merge(parent, plain, question)
        return page.objects[-1].key[len(prefix) :] if page.objects else "", question.at

    async def _merge(
        self, parent: Node, page: Listing, question: Question, end: str = ""
    ) -> tuple[list[Node] | None, bool]:
        """Returns the nodes that show what is on the page, in order of their kind, and whether something is left out.
        None: `parent` is another folder by now. `end`: the last key so far, where others follow."""
        prefix = question.prefix
        infos = await self._probes.with_metadata(parent, prefix, page.objects)
        legal = [key[len(prefix) : -1] for key in page.prefixes if self._legal(key[len(prefix) : -1])]
        found = await self._probes.folders(parent, prefix, legal, question)
        later = await self._probes.folders(parent, prefix, _open_at(end, page, prefix), question, surely=True)
        segments = {info.key[len(prefix) :] for info in infos}
        folders = {segment for segment, _ in (*found, *later)}
        beside = [f"{prefix}{segment}{keys.OBJECT_BESIDE}" for segment in segments & folders if end]
        real = await self._probes.there([key for key in beside if key >= end])
        if not self._inodes.is_about(question, parent):
            return None, False
        left_out = len(legal) < len(page.prefixes) or bool(page.unreadable)
        for key in page.unreadable:
            self._left_out(f"{key!r}: the store says what cannot be of it")
        nodes: list[Node] = []
        plain = folders | segments | {key[len(prefix) :] for key in real}
        plain |= {name for name in _links(infos, prefix) if _is_object(parent, name, prefix + name)}
        for segment, marker in found:
            if (node := self._merging.folder(parent, segment, marker, question)) is not None:
                nodes.append(node)
        for info in infos:
            if info.key == prefix:
                self._merging.marker(parent, info, question)
                nodes += [body] if (body := parent.body) is not None else []
                continue
            segment = info.key[len(prefix) :]
            name = self._shown_name(segment, folders, plain)
            if name is None:
                left_out = True
                continue
            if (node := self._merging.file(parent, segment, name, info, question)) is not None:
                nodes.append(node)
        return nodes, left_out

    # ---- names of keys ----

    def _shown_name(self, segment: str, folders: set[str], plain: set[str]) -> bytes | None:
        """The name of an object beside `folders`, in a page with the segments `plain`; None: it cannot be shown."""
        shown = segment + keys.OBJECT_BESIDE if segment in folders else segment
        if segment.endswith(keys.RCLONE_LINK):
            shown = segment.removesuffix(keys.RCLONE_LINK)
        if shown != segment and shown in plain:
            self._left_out(f"{segment!r} is hidden by {shown!r}")
            return None
        try:
            return keys.name_of(shown)
        except IllegalName as exc:
            self._left_out(str(exc))
            return None

    def _legal(self, segment: str) -> bool:
        """Whether a folder found in the store can be shown; if not it is counted."""
        try:
            keys.name_of(segment)
        except IllegalName as exc:
            self._left_out(str(exc))
            return False
        return True

    def _left_out(self, reason: str) -> None:
        self.illegal_keys += 1
        log.info("left out: %s", reason)

    # ---- all that is below ----

    async def is_empty(self, node: Node) -> bool:
        """Whether nothing is below the directory, here or in the store."""
        if node.kids:
            return False
        if self._known.has_all(node) and not node.hidden:
            return True
        token: str | None = None
        with self._merging.asking(node) as question:
            key, seq = question.prefix, question.seq
            while True:
                page = await self._store.list(key, delimiter=False, token=token)
                if page.unreadable or any(
                    not self._changes.gone.hides(o.key, o.etag, seq)
                    for o in page.objects
                    if o.key != key or (o.size and o.etag != node.marker)
                ):
                    return False
                if (token := page.next_token) is None:
                    return not node.kids

    @contextmanager
    def loading(self) -> Iterator[Load]:
        """To move a folder as a whole: what is loaded stays in the tree until then."""
        load = Load(self, self._inodes)
        try:
            yield load
        finally:
            load.let_go()


class Load:
    """All that the store has below some folder, brought into the tree and held there."""

    def __init__(self, listings: Listings, inodes: Inodes) -> None:
        self._listings = listings
        self._inodes = inodes
        self._began_at = inodes.questions.moment()
        self._held: dict[Node, None] = {}

    async def below(self, folder: Node) -> None:
        """List it and the folders in it; not those again of which all is here since this load began."""
        if folder.complete_at < self._began_at:
            async with aclosing(self._listings.pages(folder)) as pages:
                async for nodes in pages:
                    self._hold(nodes)
        self._hold((folder.kids or {}).values())
        for kid in list((folder.kids or {}).values()):
            if kid.is_dir and not kid.detached:
                await self.below(kid)

    def _hold(self, nodes: Iterable[Node]) -> None:
        for node in nodes:
            if node not in self._held:
                self._held[node] = None
                node.holds += 1

    def has_all(self, folder: Node) -> bool:
        """Whether the tree has all that the store is known to have below it: others may have changed something."""
        folders = [folder, *self._inodes.descendants(folder)]
        return all(each.complete_at > NEVER for each in folders if each.is_dir)

    def hides_some(self, folder: Node) -> bool:
        """Whether the store was seen to have something in `folder`, or below, that no name can show."""
        return folder.hidden or any(below.hidden for below in self._inodes.descendants(folder))

    def let_go(self) -> None:
        for node in self._held:
            node.holds -= 1
            if node.detached:
                self._inodes.drop_unused(node)


def _held_back(page: Listing, before: Sequence[ObjectInfo]) -> tuple[Listing, list[ObjectInfo]]:
    """The page with what was held back `before`, and without its last object, if a folder of that name may follow on
    the next page; and that object."""
    known = {info.key for info in page.objects}
    objects = [*(info for info in before if info.key not in known), *page.objects]
    if page.next_token is None or not objects or (page.prefixes and page.prefixes[-1] > objects[-1].key):
        return replace(page, objects=objects), []
    return replace(page, objects=objects[:-1]), objects[-1:]


def _stem(info: ObjectInfo, prefix: str) -> str:
    """The segment that a folder has which takes the name of the object."""
    return info.key[len(prefix) :].removesuffix(keys.RCLONE_LINK)


def _open_at(end: str, page: Listing, prefix: str) -> list[str]:
    """Segments of objects on the page of which a folder may come yet: `end` is not beyond that."""
    stems = dict.fromkeys(_stem(info, prefix) for info in page.objects) if end else {}
    return [stem for stem in stems if stem and end.startswith(prefix + stem) and f"{prefix}{stem}/" > end]


def _links(infos: Sequence[ObjectInfo], prefix: str) -> Iterator[str]:
    """The names of the links among them, in rclone's form."""
    return (_stem(info, prefix) for info in infos if info.key.endswith(keys.RCLONE_LINK))


def _is_object(parent: Node, segment: str, key: str) -> bool:
    """Whether `parent` shows the object `key`, of an earlier page, under its own name."""
    try:
        kid = (parent.kids or {}).get(keys.name_of(segment))
    except IllegalName:
        return False
    return kid is not None and kid.base is not None and kid.base.key == key


def _ends(page: Listing, held: Sequence[ObjectInfo] = ()) -> Iterator[str]:
    """The last keys of a page."""
    yield from (info.key for info in held)
    yield from (found.key for found in page.objects[-1:])
    yield from page.prefixes[-1:]


def _is_behind(node: Node, segment: str) -> bool:
    """Whether `node` comes after `segment` in a listing."""
    own = node.segment + "/" * node.is_dir
    return own.encode("utf-8", "surrogatepass") > segment.encode("utf-8", "surrogatepass")


def _has_left(page: Listing, held: Sequence[ObjectInfo], question: Question) -> bool:
    """Whether a page, or what was held back for it, has what others were heard to have removed since the walk
    began."""
    left = [keys.segment_of(name) for name, removed in question.heard.items() if removed]
    if not left:
        return False
    found = {info.key for info in (*held, *page.objects)} | {prefix.removesuffix("/") for prefix in page.prefixes}
    return any(question.prefix + segment in found for segment in left)


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

"""What one name means: from what is known, else from a listing of the whole directory, else from requests for the
name alone. Owns the listings for single names that are under way, and who asks for names in order.
"""

from __future__ import annotations

from contextlib import aclosing

import trio

from phfs_fuse import keys
from phfs_fuse.errors import NameTooLong, NotFound
from phfs_fuse.namespace.listing import Listings
from phfs_fuse.namespace.merge import Merge
from phfs_fuse.namespace.name_cache import REFUSED, NameCache
from phfs_fuse.namespace.name_walks import NameWalks
from phfs_fuse.namespace.queries import StoreQueries
from phfs_fuse.store.base import ObjectInfo
from phfs_fuse.tasks import gather
from phfs_fuse.tree.inodes import Inodes
from phfs_fuse.tree.node import Node
from phfs_fuse.tree.questions import Question
from phfs_fuse.types import NAME_BYTES_MAX, Ino, ObjectKey

MISSES_MAX = 2  # names asked for one by one before the whole directory is listed


class Lookup:
    def __init__(
        self, *, inodes: Inodes, known: NameCache, merging: Merge, probes: StoreQueries, listings: Listings
    ) -> None:
        self._inodes = inodes
        self._known = known
        self._merging = merging
        self._probes = probes
        self._listings = listings
        self._under_way: dict[Ino, trio.Event] = {}  # listings for single names
        self._walks = NameWalks()

    async def child(self, parent: Node, name: bytes) -> Node:
        """What `name` in `parent` means now. Returns without awaiting anything after the last look at the tree.

        Raises: NotFound, NotADirectory, NameTooLong, IllegalName, and those of REFUSED. While the store is away or
        refuses, what was known last is taken for true.
        """
        if len(name) > NAME_BYTES_MAX:
            raise NameTooLong("lookup", repr(name[:40]), f"longer than {NAME_BYTES_MAX} bytes")
        node = self._known.find(parent, name)
        if node is not None:
            return node
        if self._known.is_away and (node := self._known.remembered(parent, name)) is not None:
            return node
        keys.join(self._inodes.key(parent), keys.segment_of(name))  # the key's length
        try:
            with self._merging.asking(parent) as question:
                if parent.misses < MISSES_MAX or not await self._listed(parent, name):
                    parent.misses += 1
                    if not await self._listed_on(parent, name):
                        self._merging.ask_anew(question)
                        await self._ask(parent, name, question)
        except REFUSED as exc:
            self._known.found_away(exc)
            if (node := self._known.remembered(parent, name)) is None:
                raise
            return node
        if (node := (parent.kids or {}).get(name)) is not None:
            return node
        if name not in question.heard and self._inodes.is_about(question, parent):
            self._known.note_missing(parent, name, question.at)
        raise NotFound("lookup", name.decode(errors="replace"))

    async def exists(self, parent: Node, name: bytes) -> Node | None:
        """As `child`. None: there is nothing of that name."""
        try:
            return await self.child(parent, name)
        except NotFound:
            return None

    # ---- by a listing ----

    async def _listed(self, parent: Node, name: bytes) -> bool:
        """Whether a listing of `parent` says what `name` is. One that is under way counts if it has the name; what
        it lacks may have come since it was asked for."""
        if self._known.ttl and (under_way := self._under_way.get(parent.ino)) is not None:
            await under_way.wait()
            return name in (parent.kids or {}) and self._known.is_complete(parent)
        ended = self._under_way[parent.ino] = trio.Event()
        try:
            return await self._list_once(parent)
        finally:
            if self._under_way.get(parent.ino) is ended:
                del self._under_way[parent.ino]
            ended.set()

    async def _list_once(self, parent: Node) -> bool:
        """List `parent` if one page is enough for it; returns whether all its names are known now."""
        async with aclosing(self._listings.pages(parent, pages_max=1)) as pages:
            async for _ in pages:
                pass
        if (whole := self._known.is_complete(parent)) is False:
            parent.misses = -1000  # a big one: asking for single names is cheaper for long
        return whole

    async def _listed_on(self, parent: Node, name: bytes) -> bool:
        """Whether a page of a listing says what `name` is: of a big folder one is asked for, from `name` on, when
        names are asked for one after the other."""
        segment = keys.segment_of(name)
        if parent.misses >= 0 or not self._known.ttl or (before := self._walks.before(parent, segment)) is None:
            return False
        last, asked_at = await self._listings.page_behind(parent, before)
        kid = (parent.kids or {}).get(name)
        helped = kid is not None and not kid.is_dir and kid.checked_at >= asked_at
        self._walks.listed(parent, last, helped=helped)
        return helped

    # ---- by requests for the name alone ----

    async def _ask(self, parent: Node, name: bytes, question: Question) -> None:
        segment = keys.segment_of(name)
        if segment.endswith(keys.RCLONE_LINK):
            self._merging.absent(parent, name, question)  # it is shown as a link, without the suffix
        else:
            await self._ask_plain(parent, name, segment, question)

    async def _ask_plain(self, parent: Node, name: bytes, segment: str, question: Question) -> None:
        """HEAD for the file and LIST for the directory at once; then the names that stand for odd keys."""
        prefix = question.prefix
        folder: tuple[bool, ObjectInfo | None] = (False, None)
        found: ObjectInfo | None = None

        async def ask_folder() -> None:
            nonlocal folder
            folder = await self._probes.folder(ObjectKey(prefix + segment + "/"), question)

        async def ask_file() -> None:
            nonlocal found
            found = await self._probes.file(ObjectKey(prefix + segment))

        await gather([ask_folder, ask_file])
        if not self._inodes.is_about(question, parent):
            return
        if folder[0]:
            self._merging.folder(parent, segment, folder[1], question)
        elif found is not None:
            self._merging.file(parent, segment, name, found, question)
        else:
            await self._ask_odd(parent, name, segment, question)

    async def _ask_odd(self, parent: Node, name: bytes, segment: str, question: Question) -> None:
        prefix = question.prefix
        if segment.endswith(keys.OBJECT_BESIDE):
            stored = segment.removesuffix(keys.OBJECT_BESIDE)
            beside = stored == "" or (await self._probes.folder(ObjectKey(prefix + stored + "/"), question))[0]
            info = await self._probes.file(ObjectKey(prefix + stored)) if beside and prefix + stored else None
            if info is not None and stored == "" and not info.size:
                info = None  # a marker as most are
        else:
            stored = segment + keys.RCLONE_LINK
            info = await self._probes.file(ObjectKey(prefix + stored))
        if not self._inodes.is_about(question, parent):
            return
        if info is not None:
            self._merging.file(parent, stored, name, info, question)
        else:
            self._merging.absent(parent, name, question)

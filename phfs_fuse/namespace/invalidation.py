"""What it means for the tree that somebody else has changed a key: nothing that was known of the names on the way to
it, and is touched by that, is believed any more. Owns no state; no I/O, no await.
"""

from __future__ import annotations

from contextlib import suppress

from phfs_fuse import keys
from phfs_fuse.errors import IllegalName, NameTooLong
from phfs_fuse.namespace.name_cache import NameCache
from phfs_fuse.tree.inodes import Inodes
from phfs_fuse.tree.node import Node
from phfs_fuse.types import Ino


class Invalidation:
    def __init__(self, inodes: Inodes, known: NameCache) -> None:
        self._inodes = inodes
        self._known = known

    def changed_by_others(self, key: str, *, removed: bool) -> list[tuple[Ino, bytes]]:
        """Somebody else has stored or removed `key`. Returns the names, of those that are doubted now, of which the
        kernel may know: (directory, name)."""
        told: list[tuple[Ino, bytes]] = []
        at = self._inodes.root
        segments = key.removeprefix(self._inodes.key(at)).split("/")
        is_marker = segments[-1] == ""
        if is_marker:
            segments.pop()
        way: list[tuple[Node, bytes, Node | None, bool]] = []
        for depth, segment in enumerate(segments, 1):
            is_last = depth == len(segments)
            kid: Node | None = None
            for name in _names_for(segment, is_object=is_last and not is_marker):
                self._inodes.heard(at, name, removed=removed)
                kid = (at.kids or {}).get(name)
                way.append((at, name, kid, is_last))
            if is_last or kid is None or not kid.is_dir:
                break
            at = kid
        for parent, name, kid, is_last in reversed(way):  # a folder is doubted with the last of what is in it
            if self._concerns(kid, is_folder=is_marker or not is_last, is_last=is_last, removed=removed):
                told += self._doubt(parent, name, kid, removed=removed)
        return told

    def _concerns(self, kid: Node | None, *, is_folder: bool, is_last: bool, removed: bool) -> bool:
        """Whether the change can mean something for the name that now shows `kid`."""
        if kid is None:
            return not removed
        if not kid.is_dir or not is_folder:
            return True
        if not removed:
            return is_last  # attributes in the marker
        first = next(iter(kid.kids.values()), None) if kid.kids else None
        return first is None or (first.dirty is None and not self._known.is_believed(first))

    def _doubt(self, parent: Node, name: bytes, kid: Node | None, *, removed: bool) -> list[tuple[Ino, bytes]]:
        parent.gaps += 1  # a listing that is under way may not know
        was_missing = self._known.forget_missing(parent, name)
        if kid is None or removed:
            self._inodes.incomplete(parent)
        if kid is not None:
            kid.doubted_at = self._inodes.questions.moment()
            if removed and parent.kids is not None:
                parent.kids[name] = parent.kids.pop(name)  # behind those that are believed: see `_concerns`
        return [(parent.ino, name)] if was_missing or (kid is not None and kid.lookups) else []


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

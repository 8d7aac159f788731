"""What the kernel knows: inode numbers, the tree of names, lookup counts. Owns all nodes and their numbers.

No I/O and no await. A node in the tree is reachable by its name; one that is `detached` (unlinked, replaced, or
a version that somebody else has replaced in the store) lives on until the kernel and the open files let go of it.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from phfs_fuse import keys
from phfs_fuse.attrs import Attrs
from phfs_fuse.errors import IllegalName, StaleVersion
from phfs_fuse.state.transaction import Transaction
from phfs_fuse.tree.node import NEVER, Folder, Node, Pages
from phfs_fuse.tree.questions import Question, Questions
from phfs_fuse.types import ROOT_INO, Ino, ObjectKey


class Inodes:
    """All nodes of a mount by number, and the tree of names. Numbers are never used twice."""

    def __init__(self, prefix: str, root_attrs: Attrs, *, now_ns: int, first_ino: int = ROOT_INO + 1) -> None:
        self._prefix = ObjectKey(prefix)
        self._places = 0  # how often a folder got a place in the tree
        self._next = first_ino
        self._nodes: dict[int, Node] = {}
        self.questions = Questions()
        self._displaced: set[Ino] = set()  # open files whose names others have taken or removed
        self.on_changed: Callable[[Node], None] | None = None  # a node got another name, or lost it
        self.transaction = Transaction()  # of the changes under way
        self.root: Node = Folder(ROOT_INO, root_attrs, ctime_ns=now_ns)
        self.root.lookups = 1  # never forgotten
        self._nodes[ROOT_INO] = self.root

    def __len__(self) -> int:
        return len(self._nodes)

    @property
    def next_ino(self) -> int:
        return self._next

    def get(self, ino: int) -> Node:
        """Raises: StaleVersion (ESTALE) for a number that nobody was given, or that was given back."""
        try:
            return self._nodes[ino]
        except KeyError:
            raise StaleVersion("inode", str(ino), "is not known") from None

    def find(self, ino: int) -> Node | None:
        return self._nodes.get(ino)

    def shrink(self) -> None:
        """Take no more room than what is known now needs: a dict never does so when it loses entries."""
        self._nodes = dict(self._nodes)

    def all(self) -> Iterator[Node]:
        return iter(self._nodes.values())

    def new(self, attrs: Attrs, *, ctime_ns: int, ino: Ino | None = None) -> Node:
        """A node with the next number (or its number from the journal), not yet in the tree."""
        if ino is None:
            ino = Ino(self._next)
        self._next = max(self._next, ino + 1)
        node = (Folder if stat.S_ISDIR(attrs.mode) else Node)(ino, attrs, ctime_ns=ctime_ns)
        self.transaction.item(self._nodes, ino)
        self.transaction.made(node)
        self._nodes[ino] = node
        return node

    def attach(self, parent: Node, name: bytes, node: Node, segment: str | None = None) -> None:
        """Give `node` a name, which must be free. `segment` differs from the name only for odd keys."""
        assert parent.kids is not None
        assert name not in parent.kids
        segment = keys.segment_of(name) if segment is None else segment
        self._moves(node, parent, name)
        node.parent = parent
        node.set_name(name, segment)
        node.detached = False
        parent.kids[name] = node
        self._set_displaced(node, False)
        if node.is_dir:
            parent.subdirs += 1
            self._places += 1

    def _moves(self, node: Node, parent: Node, name: bytes) -> None:
        """`node` is about to get or to lose its place as `name` in `parent`."""
        assert parent.kids is not None
        transaction = self.transaction
        if transaction.is_open:
            transaction.keep(node)
            transaction.keep(parent)
            transaction.item(parent.kids, name)
            if node.is_dir:
                transaction.undo(self._forget_keys)

    def _forget_keys(self) -> None:
        """The keys of folders have to be worked out anew."""
        self._places += 1

    def displace(self, node: Node) -> None:
        """Others have stored something else under the name of `node`, or removed it. It is detached; should somebody
        write to it, who has it open, it gets a name again."""
        self.mark_displaced(node)
        self.detach(node)

    def mark_displaced(self, node: Node) -> None:
        if node.opens and not node.is_dir:
            self._set_displaced(node, True)

    def _set_displaced(self, node: Node, is_displaced: bool) -> None:
        if is_displaced == (node.ino in self._displaced):
            return
        self.transaction.undo(partial(self._set_displaced, node, not is_displaced))
        if is_displaced:
            self._displaced.add(node.ino)
        else:
            self._displaced.discard(node.ino)

    def is_displaced(self, node: Node) -> bool:
        return node.ino in self._displaced

    def corrected(self, node: Node) -> Node:
        """The file for the kernel, which believes of `node` what is not so and takes no correction: with another
        number as soon as nothing of it is open or on its way to the store."""
        if not node.lookups:  # it has forgotten the file, and what it believed
            node.misjudged = False
            node.pages = Pages.TRUE
        if not node.misjudged or node.opens or node.dirty is not None or node.staged is not None:
            return node
        parent, name, segment = node.parent, node.name, node.segment
        assert parent is not None
        new = self.new(node.attrs, ctime_ns=node.ctime_ns)
        self.detach(node)
        self.attach(parent, name, new, segment)
        new.size, new.base, new.seq = node.size, node.base, node.seq
        new.inherited, new.others_bytes, new.is_sealed = node.inherited, node.others_bytes, node.is_sealed
        new.atime_ns, new.checked_at, new.doubted_at = node.atime_ns, node.checked_at, node.doubted_at
        return new

    def detach(self, node: Node) -> None:
        """Take `node` out of the tree; it keeps its number while it is referred to."""
        parent = node.parent
        if parent is None or node.detached:
            return
        assert parent.kids is not None
        self._moves(node, parent, node.name)
        del parent.kids[node.name]
        node.detached = True
        if node.is_dir:
            parent.subdirs -= 1
        self._changed(node)
        self.drop_unused(node)

    def _changed(self, node: Node) -> None:
        if node.noted and self.on_changed is not None:
            self.on_changed(node)

    def move(self, node: Node, parent: Node, name: bytes) -> None:
        """Give a node in the tree another name, which must be free."""
        old = node.parent
        assert old is not None
        assert old.kids is not None
        self._moves(node, old, node.name)
        del old.kids[node.name]
        if node.is_dir:
            old.subdirs -= 1
        self.attach(parent, name, node)
        self._changed(node)

    def key(self, node: Node) -> ObjectKey:
        """The key that the node's name stands for; a directory's ends in "/". Raises: NameTooLong."""
        if node.is_dir:
            return self._folder_key(node)
        return keys.join(self._folder_key(node.parent), node.segment) if node.parent is not None else self._prefix

    def is_listed(self, node: Node) -> bool:
        """Whether a listing shows `node`: all but the CSI plugin's records."""
        return node.name != keys.RECORDS.encode() or bool(self._prefix) or node.parent is not self.root

    def require_no_record(self, node: Node) -> None:
        """Before a change of `node`. Raises: ReadOnly."""
        if not self._prefix and not node.detached:
            keys.require_no_record(self.key(node))

    def _folder_key(self, folder: Node) -> ObjectKey:
        """Worked out once, until some folder gets another place."""
        if folder.parent is None:
            return self._prefix
        if folder.keyed is None or folder.keyed[0] != self._places:
            key = keys.join(self._folder_key(folder.parent), folder.segment + "/")
            folder.keyed = self._places, key
        return folder.keyed[1]

    def named(self, key: ObjectKey) -> Node | None:
        """The known node of that key."""
        at: Node | None = self.root
        for segment in key.removeprefix(self._prefix).rstrip("/").split("/"):
            if at is None or at.kids is None:
                return None
            try:
                at = at.kids.get(keys.name_of(segment))
            except IllegalName:
                return None
        return at

    def path(self, node: Node) -> str:
        """Path below the mount point, for people."""
        return self.raw_path(node).decode("utf-8", "replace")

    @staticmethod
    def raw_path(node: Node) -> bytes:
        """Path below the mount point."""
        parts: list[bytes] = []
        at: Node | None = node
        while at is not None and at.parent is not None:
            parts.append(at.name)
            at = at.parent
        return b"/".join(reversed(parts))

    def forget(self, ino: int, count: int) -> None:
        """The kernel gives `count` references back."""
        if (node := self._nodes.get(ino)) is None or (node.parent is None and not node.detached):
            return
        node.lookups = max(0, node.lookups - count)
        self.drop_unused(node)

    def drop_unused(self, node: Node) -> None:
        """Let go of a node that nothing refers to, and of its parents likewise: after the change under way."""
        if self.transaction.is_open:
            self.transaction.after(partial(self.drop_unused, node))
            return
        at: Node | None = node
        while at is not None and not at.busy and at is not self.root and not self.questions.keeps(at):
            parent = at.parent
            self._drop_untold(at)
            if at.kids:
                return
            self._nodes.pop(at.ino, None)
            self._displaced.discard(at.ino)
            if at.version is not None:
                at.version.close()
                at.version = None
            if at.detached or parent is None or parent.kids is None:
                return
            parent.kids.pop(at.name, None)
            self.incomplete(parent)
            if at.is_dir:
                parent.subdirs -= 1
            at.detached = True
            at = parent

    def _drop_untold(self, folder: Node) -> None:
        """Let go of what a listing brought into `folder` and nobody has asked for."""
        for kid in list((folder.kids or {}).values()):
            if kid.busy or self.questions.keeps(kid):
                return
            self._drop_untold(kid)
            if kid.kids:
                return
            self._nodes.pop(kid.ino, None)
            if kid.version is not None:
                kid.version.close()
                kid.version = None
            assert folder.kids is not None
            del folder.kids[kid.name]
            self.incomplete(folder)
            if kid.is_dir:
                folder.subdirs -= 1
            kid.detached = True

    @staticmethod
    def incomplete(parent: Node) -> None:
        """The store has a name in `parent` that `kids` lacks, whatever a listing that is under way has found."""
        parent.complete_at = NEVER
        parent.gaps += 1

    @contextmanager
    def asking(self, parent: Node, seq: int) -> Iterator[Question]:
        """While the store is asked about names in `parent`, and until the answer is merged: nodes changed since then
        stay, they know what the answer cannot know. May be held over an await."""
        question = Question(self.key(parent), seq, self.questions.moment())
        self.questions.open(parent, question)
        try:
            yield question
        finally:
            self.questions.close(parent, question)

    def is_about(self, question: Question, parent: Node) -> bool:
        """Whether `parent` is still the folder that the question was put about: it may have moved meanwhile."""
        return self.key(parent) == question.prefix

    def heard(self, parent: Node, name: bytes, *, removed: bool) -> None:
        """Others have changed `name`, or something below it: answers that are under way say nothing of it."""
        for question in self.questions.about(parent):
            question.heard[name] = removed

    @staticmethod
    def descendants(node: Node) -> Iterator[Node]:
        """All known nodes below `node`, parents before children."""
        stack = list((node.kids or {}).values())
        while stack:
            at = stack.pop()
            yield at
            if at.kids:
                stack.extend(at.kids.values())

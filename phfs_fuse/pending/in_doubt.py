"""Requests that were sent to store something and had no answer: the store may have it. Owns them and their journal
rows, so that what is found there after a restart is known for our own. No await.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from phfs_fuse.attrs import to_metadata
from phfs_fuse.state.journal import Journal
from phfs_fuse.store.base import ObjectInfo
from phfs_fuse.tree.node import Node
from phfs_fuse.types import ETag, ObjectKey

_COPY_OF = "copy of "  # in place of metadata
ATTEMPTS_MAX = 8  # of one key that are remembered


class InDoubt:
    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._sent: dict[ObjectKey, list[tuple[int, str]]] = {}  # (size, metadata)
        self.claims: set[ObjectKey] = set()  # keys of calls that make a name and have no answer

    def __contains__(self, key: ObjectKey) -> bool:
        return key in self._sent

    def recover(self) -> None:
        """Take up what an earlier process left in the journal."""
        for key, size, metadata in self._journal.attempts():
            self._sent.setdefault(key, []).append((size, metadata))
        self.claims = {key for key in self._journal.claims() if key in self._sent}

    def claim(self, key: ObjectKey, size: int, metadata: Mapping[str, str]) -> None:
        """As `begin`, for an object that a call makes so that nobody else has the name."""
        with self._journal.batch():
            self._journal.put_claim(key)
            self.claims.add(key)
            self.begin(key, size, metadata)

    def begin(self, key: ObjectKey, size: int, content: Mapping[str, str] | ETag) -> None:
        """An upload is about to be sent, with that metadata or, where it is a copy that has all of its source, of
        that version. Until its answer is known the store may have it, also after a restart."""
        known = self._sent.get(key, [])
        text = f"{_COPY_OF}{content}" if isinstance(content, str) else json.dumps(dict(content), sort_keys=True)
        if (size, text) in known:
            return
        with self._journal.batch():
            if len(known) == ATTEMPTS_MAX:
                self.answered(key)
            self._journal.transaction.item(self._sent, key)
            known = self._sent[key] = [*known, (size, text)][-ATTEMPTS_MAX:]
            for row in known:
                self._journal.put_attempt(key, *row)

    def answered(self, key: ObjectKey) -> None:
        """What the store has under `key` is known now."""
        if key in self._sent:
            self._journal.drop_attempts(key)
            self._journal.transaction.item(self._sent, key)
            del self._sent[key]
        if key in self.claims:
            self._journal.drop_claim(key)
            self.claims.discard(key)

    def is_ours(self, found: ObjectInfo) -> bool:
        """Whether the store has what an upload of ours has sent without getting an answer."""
        text = json.dumps(dict(found.metadata or {}), sort_keys=True)
        sent = self._sent.get(found.key, ())
        return (found.size, text) in sent or (found.size, f"{_COPY_OF}{found.etag}") in sent

    def made_before(self, node: Node, key: ObjectKey) -> bool:
        """Whether `node` is what a call for its name `key` has made that got no answer: then that ends here."""
        base, sent = node.base, self._sent.get(key)
        if sent is None or node.dirty is not None or (base or node.marker) is None:
            return False
        text = json.dumps(to_metadata(node.attrs), sort_keys=True)
        if (base.size if base else 0, text) not in sent:
            return False
        self.answered(key)
        return True

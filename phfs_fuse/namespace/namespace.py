"""What names mean: the store's listings and HEADs, merged with what was changed here and is not uploaded yet.

Puts the parts together that do it, each with its own state, and names what others need of them. Owns no state.
"""

from __future__ import annotations

from phfs_fuse.namespace.invalidation import Invalidation
from phfs_fuse.namespace.lifetimes import Lifetimes
from phfs_fuse.namespace.listing import Listings
from phfs_fuse.namespace.lookup import Lookup
from phfs_fuse.namespace.merge import Merge
from phfs_fuse.namespace.name_cache import NameCache
from phfs_fuse.namespace.queries import StoreQueries
from phfs_fuse.pending.changes import Changes
from phfs_fuse.store.base import ObjectStore
from phfs_fuse.tree.default_attrs import DefaultAttrs
from phfs_fuse.tree.inodes import Inodes


class Namespace:
    def __init__(
        self, *, store: ObjectStore, inodes: Inodes, changes: Changes, defaults: DefaultAttrs, trust: Lifetimes
    ) -> None:
        known = NameCache(inodes, trust)
        merging = Merge(inodes, changes, known, defaults)
        probes = StoreQueries(store, changes.gone)
        self._listings = listings = Listings(
            store=store, inodes=inodes, changes=changes, known=known, merging=merging, probes=probes
        )
        lookup = Lookup(inodes=inodes, known=known, merging=merging, probes=probes, listings=listings)
        # what others ask for, each by the one that does it
        self.child, self.exists = lookup.child, lookup.exists
        self.ttl, self.lifetime = known.ttl, known.lifetime
        self.note_missing = known.note_missing
        self.complete_listing, self.forget_missing = known.complete_listing, known.forget_missing
        self.pages, self.is_empty = listings.pages, listings.is_empty
        self.loading = listings.loading
        self.local_only, self.set_marker = merging.local_only, merging.set_marker
        self.changed_by_others = Invalidation(inodes, known).changed_by_others

    @property
    def illegal_keys(self) -> int:
        """How many keys were left out, since no name can show them."""
        return self._listings.illegal_keys

"""The meaning of a name: cached answers, lookups, listings, changes by other clients.

Asks the store about names and merges the answers into the tree, never over a local change. Whole answers are at hand
before the tree is touched: `merge` has no await.

Begin with `lookup` (one name) and `listing` (a whole directory).
"""

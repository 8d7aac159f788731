"""The store brought up to date: uploads, deletions, markers, conflicts, fsync.

The rule is one: for each key, the store shall have what the node of that name says, or nothing. Each request carries
a condition, so that nothing which another client has stored is overwritten.

Begin with `loop`, then `uploader`; `sync` is how fsync and drain wait.
"""

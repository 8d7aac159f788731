"""The process that serves a mount, and `phfs drain`, the same process without a mount.

Owns all objects of a mount: `wiring` builds them, `serving` runs what goes on while the mount is served and holds the
order of its end. A worker may die at any time: everything that has to outlive it is in `state/`, in `kernel.log` or
in the store.

The keeper starts it as `python -m phfs_fuse.mount`, a name that stays: a keeper of an older version starts the worker
of a newer one, and the other way round. Begin with `main`, then `wiring`.
"""

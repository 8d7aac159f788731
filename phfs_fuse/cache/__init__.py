"""Clean blocks on disk, by key, ETag and block number.

Owns the cache directory. All of it may vanish at any time: whatever happens to the disk, reads go past it to the
store. One task fetches a block, however many readers wait for it.

Begin with `block_cache`, then `version` (one version of one object) and `fills` (what is on its way).
"""

"""The volumes of this node: mounts, records, limits, uploads of what ended mounts have left.

Owns the records on disk, which say what is staged and published: they are written before each effect. No call here
waits for a mount within this process; a child with a deadline does.

Begin with `volumes`, then `mounter`; `upkeep` acts without a call.
"""

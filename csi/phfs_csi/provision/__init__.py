"""Volumes made for claims: their records in the bucket, the one question to the cluster.

A record says which prefix the volume is and what its deletion may delete. It is written under a condition, so that of
two controllers one wins.

Begin with `catalog`.
"""

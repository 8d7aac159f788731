"""Inodes, the tree of names, what the kernel was told of them.

Owns all nodes and their numbers. No await but in the compaction of `kernel_log`. A node lives while the kernel, an
open file, a dirty file or a child refers to it.

Begin with `node` and `inodes`; `dirty` is the state machine of a changed file, `resume` brings the tree of a worker
that died back from `kernel.log`.
"""

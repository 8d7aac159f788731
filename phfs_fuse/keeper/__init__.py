"""The process that holds the mount while its worker may die or be replaced.

Owns the descriptor of `/dev/fuse`, the mount point and the record of the mount. Standard library only, one thread
(and that of `kernel_notify`, which may have to wait). Nothing here touches a file of the mount: the call would wait
for a worker that waits for the keeper.

A keeper outlives upgrades: it starts workers of newer versions. So the packets of `messages` and the command line of
a worker are interfaces between versions. Begin with `keeper`.
"""

"""phfs-fuse: an S3 prefix as a POSIX tree, with a block cache and a write-back layer.

The way of a call, from the kernel to the store; each wing imports only those below it:

    fuse                     kernel requests
    vfs                      POSIX calls
    namespace    writeback   what a name means; the store brought up to date
    pending, quota           what the store does not have yet; limits
    tree                     inodes and names
    cache, state             clean blocks; journal and staging files
    store                    S3

Around it: `keeper` holds the mount, `worker` builds and runs the above, `launch` and `cli` are the commands, `host`
is this machine, `config` the settings. The `__init__` of each wing says what it owns and where to begin reading;
begin with `fuse/ops.py`, then `vfs/`.
"""

__version__ = "0.1.0"

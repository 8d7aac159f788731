"""phfs-fuse: an S3 prefix as a POSIX tree, with a block cache and a write-back layer."""

__version__ = "0.1.0"

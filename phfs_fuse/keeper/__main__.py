"""The process of a keeper: `python -m phfs_fuse.keeper`."""

import sys

from phfs_fuse.keeper.keeper import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

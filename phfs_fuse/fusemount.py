"""The child that unmounts: `python -m phfs_fuse.fusemount [--lazy] MOUNTPOINT`.

The name is an interface: a keeper of one version runs the child of another one.
"""

import sys

from phfs_fuse.host.fusemount import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

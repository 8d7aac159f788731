"""The worker under the name by which keepers start it: `python -m phfs_fuse.mount`.

The name is an interface: a keeper of one version starts the worker of another one.
"""

import sys

from phfs_fuse.worker.main import main

if __name__ == "__main__":
    sys.exit(main())

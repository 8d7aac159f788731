"""S3: the seam and what stands behind it; the only user of boto3 and awscrt, with `cli/demo` and `bench`.

The other wings know `base` alone (and `retry`). Errors leave as `PhfsError`s: codes are translated once
(`error_codes`), and what cannot be read becomes a `BadAnswer`. One try of a call is in `boto` and `crt`; retries and
conditions stand above them.

Begin with `base`, then `s3`.
"""

from __future__ import annotations

import logging
from pathlib import Path

from phfs_fuse.config.model import StoreConfig
from phfs_fuse.store.base import ObjectStore

log = logging.getLogger(__name__)


def warm() -> None:
    """Load all that a store needs, so that forks of this process have it. No I/O but the disk's, no thread."""
    from phfs_fuse.store import clients, crt, s3  # noqa: F401

    clients.warm()


def open_store(config: StoreConfig, owner: str = "", notes: Path | None = None) -> ObjectStore:
    """The fastest store that works here. Does no I/O: the first call, `check_bucket`, opens it.

    `owner` names the objects that the store is tried out on, `notes` is the file in which they are noted. Both are
    the same for each process that goes on for another: what a death leaves of them is removed by the next one.

    Imported late: boto3 and awscrt take longer to load than the commands that need no store.
    """
    from phfs_fuse.store.s3 import S3Store

    try:
        from phfs_fuse.store.crt import CrtStore
    except ImportError as exc:  # no build of awscrt for this machine
        log.info("boto3 does all requests: %s", exc)
        return S3Store(config, owner=owner, notes=notes)
    return CrtStore(config, owner, notes)

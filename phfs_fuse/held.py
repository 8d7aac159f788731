"""The keeper's care for the duplicate of its connection that a holder has (see `holding`). Standard library only.

State: the connection to the holder, and whether it has the duplicate.
"""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path

from phfs_fuse import fusemount
from phfs_fuse.errors import LocalStateError
from phfs_fuse.holding import HolderLink

log = logging.getLogger(__name__)


class HeldConnection:
    """Named after its mount point. Nothing here raises: a mount without a holder is as good as one that has none."""

    def __init__(self, holder: Path, mountpoint: Path) -> None:
        self._holder = holder
        self._mountpoint = mountpoint
        self._has_complained = False
        self.link: HolderLink | None = None
        self.is_held = False

    def adopt(self) -> int | None:
        """The connection of a keeper that has ended, if it lives and is still mounted here."""
        try:
            held = self._connected().take(str(self._mountpoint))
        except LocalStateError as exc:
            log.warning("%s", exc)
            self.close()
            return None
        if held is None:
            return None
        if held.device == fusemount.device_of(self._mountpoint) and fusemount.is_connected(held.fd):
            log.info("adopted mountpoint=%s device=%s", self._mountpoint, held.device)
            return held.fd
        os.close(held.fd)
        return None

    def keep(self, device_fd: int) -> HolderLink | None:
        """Have the holder hold it; returns the link, which is readable when the holder is gone. None: it is gone."""
        try:
            if (device := fusemount.device_of(self._mountpoint)) is not None:  # None: on its way out
                self._connected().keep(str(self._mountpoint), device, device_fd)
                self.is_held = True
        except LocalStateError as exc:
            if not self._has_complained:
                log.warning("not held, the mount would end with this process: %s", exc)
            self._has_complained = True
            self.close()
            return None
        self._has_complained = False
        return self.link

    def drop(self) -> None:
        """Have the holder let go of it: nobody is to take it up."""
        if self.link is not None:
            with contextlib.suppress(LocalStateError):
                self.link.drop(str(self._mountpoint))

    def close(self) -> None:
        """The holder is gone."""
        self.is_held = False
        if self.link is not None:
            self.link.close()
            self.link = None

    def _connected(self) -> HolderLink:
        """Raises: LocalStateError."""
        if self.link is None:
            self.link = HolderLink(self._holder)
        return self.link

"""The keeper's care for the duplicate of its connection that a holder has (see `host.holder_link`). Standard library
only.

State: the link to the holder, and whether it has the duplicate.
"""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path
from typing import Final

from phfs_fuse.errors import LocalStateError
from phfs_fuse.host import fusemount
from phfs_fuse.host.holder_link import HolderLink
from phfs_fuse.keeper.event_loop import EventLoop

log = logging.getLogger(__name__)

HOLDER_SECONDS: Final = 1.0  # between two tries to reach the holder


class HolderClient:
    """Named after its mount point. Nothing here raises: a mount without a holder is as good as one that has none."""

    def __init__(self, loop: EventLoop, holder: Path, mountpoint: Path) -> None:
        self._loop = loop
        self._holder = holder
        self._mountpoint = mountpoint
        self._has_complained = False
        self._link: HolderLink | None = None
        self._device_fd: int | None = None
        self.is_held = False

    def adopt(self) -> int | None:
        """The connection of a keeper that has ended, if it lives and is still mounted here."""
        try:
            held = self._connected().take(str(self._mountpoint))
        except LocalStateError as exc:
            log.warning("%s", exc)
            self._close()
            return None
        if held is None:
            return None
        if held.device == fusemount.device_of(self._mountpoint) and fusemount.is_connected(held.fd):
            log.info("adopted mountpoint=%s device=%s", self._mountpoint, held.device)
            return held.fd
        os.close(held.fd)
        return None

    def keep(self, device_fd: int) -> None:
        """Have the holder hold it, now and each time that the holder is a new one."""
        self._device_fd = device_fd
        self._keep()

    def drop(self) -> None:
        """Have the holder let go of it: nobody is to take it up."""
        self._loop.cancel(self._keep)
        if self._link is not None:
            with contextlib.suppress(LocalStateError):
                self._link.drop(str(self._mountpoint))

    def _keep(self) -> None:
        assert self._device_fd is not None
        try:
            if (device := fusemount.device_of(self._mountpoint)) is not None:  # None: on its way out
                self._connected().keep(str(self._mountpoint), device, self._device_fd)
                self.is_held = True
            self._has_complained = False
        except LocalStateError as exc:
            if not self._has_complained:
                log.warning("not held, the mount would end with this process: %s", exc)
            self._has_complained = True
            self._close()
        if self._link is None:
            self._loop.call_later(HOLDER_SECONDS, self._keep)
        else:  # readable when the holder is gone
            self._loop.watch(self._link, self._on_gone)

    def _on_gone(self) -> None:
        self._close()
        self._loop.call_later(HOLDER_SECONDS, self._keep)

    def _connected(self) -> HolderLink:
        """Raises: LocalStateError."""
        if self._link is None:
            self._link = HolderLink(self._holder)
        return self._link

    def _close(self) -> None:
        self.is_held = False
        if self._link is not None:
            self._loop.forget(self._link)
            self._link.close()
            self._link = None

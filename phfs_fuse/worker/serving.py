"""What goes on while a mount is served, and the order in which it ends.

State: the nursery of the services, and how far the end has got. End: upload what is pending, have the keeper unmount,
upload what the kernel wrote on that occasion.
"""

from __future__ import annotations

import contextlib
import logging
import os
from functools import partial
from typing import Final

import trio

from phfs_fuse.config.model import EventsMode as EventsSetting
from phfs_fuse.errors import LocalStateError, MountpointError, StartupError
from phfs_fuse.fuse.session import Session
from phfs_fuse.keeper.kernel_notify import can_expire
from phfs_fuse.tasks import lasting, survived, surviving
from phfs_fuse.worker.control_socket import ControlServer
from phfs_fuse.worker.keeper_link import KeeperLink
from phfs_fuse.worker.memory import Memory
from phfs_fuse.worker.wiring import Mount

log = logging.getLogger(__name__)

KERNEL_FLUSH_SECONDS: Final = 2.0  # how long the kernel may keep bytes of open files to itself (its default: 30)
CHECKPOINT_SECONDS: Final = 5.0
CHECKPOINT_BYTES: Final = 4 << 20
RESEND_SECONDS: Final = 5.0  # until when a request may be one that the process before had done
HANDOVER_SECONDS: Final = 5.0  # for requests in work, when another worker waits to go on
BUSY_SECONDS: Final = 5.0  # for programs to let go of a mount that is asked to end


class Services:
    """Of one mount."""

    def __init__(self, mount: Mount, link: KeeperLink, session: Session, *, resumed: bool) -> None:
        self._mount = mount
        self._resumed = resumed
        self._link = link
        self._session = session
        self._drain_now = trio.Event()
        self._handing_over = False
        self._ending = trio.Event()
        self._damaged = trio.Event()
        self._damage = ""
        mount.journal.on_damage = self._on_damage
        self._nursery: trio.Nursery | None = None

    async def run(self, listener: ControlServer) -> None:
        """Returns when the mount has ended and what was pending is in the store. Raises: NotDrained."""
        mount = self._mount
        async with trio.open_nursery() as services:
            self._nursery = services
            await services.start(lasting, "cache", mount.blocks.run)
            await services.start(lasting, "write-back", mount.writeback.run)
            await services.start(lasting, "quotas", mount.quotas.run)
            await services.start(lasting, "listing ahead", mount.vfs.list_ahead)
            services.start_soon(lasting, "line to the keeper", self._hear_keeper)
            if mount.config.tree.events is EventsSetting.AUTO:
                services.start_soon(lasting, "events", self._hear_store)
            services.start_soon(self._announce)
            services.start_soon(self._end_damaged)
            await services.start(lasting, "control socket", listener.run)
            services.start_soon(lasting, "memory", Memory(mount.inodes).run)
            services.start_soon(lasting, "syncing", self._flush_kernel)
            services.start_soon(lasting, "checkpoint", self._checkpoint)
            await self._serve_kernel()
            if not self._handing_over:
                log.info("unmounted mountpoint=%s", mount.config.kernel.mountpoint)
                await self._drain()
                await mount.writeback.multiparts.finish()
            services.cancel_scope.cancel()
        if not self._handing_over:
            mount.require_stored()

    async def _serve_kernel(self) -> None:
        """Raises: MountpointError, this worker cannot go on."""
        try:
            await self._session.serve()
        except Exception as exc:
            raise MountpointError(f"the kernel's connection failed: {exc!r}") from exc

    def _on_damage(self, reason: str) -> None:
        self._damage = reason
        self._damaged.set()

    async def _end_damaged(self) -> None:
        """Service. Raises: LocalStateError when the journal is damaged: the next worker carries over what can be
        read of it."""
        await self._damaged.wait()
        raise LocalStateError(f"journal {self._mount.journal.path} is damaged ({self._damage}); it is made anew")

    async def _hear_keeper(self) -> None:
        await self._link.run(on_drain=self._on_drain, on_handover=self._on_handover, on_gone=self._on_gone)

    async def _hear_store(self) -> None:
        """Service: see and show what others change."""
        mount = self._mount
        async with trio.open_nursery() as nursery:
            if self._link.expires:  # the keeper is not of an older version
                mount.trust.kernel_takes_back = can_expire()
                nursery.start_soon(
                    lasting, "telling the kernel", partial(mount.events.tell_kernel, self._link.expire)
                )
                if self._resumed:  # told by the process before, which may have missed something when it died
                    mount.events.expire_all()
            await mount.events.run()

    async def _announce(self) -> None:
        await self._session.established.wait()
        await self._link.ready()
        if self._resumed:
            await trio.sleep(RESEND_SECONDS)
            self._mount.end_resume()
            await survived("look at the store", self._check_again)

    async def _check_again(self) -> None:
        """What a first worker finds out before it serves."""
        try:
            await self._mount.check()
        except StartupError as exc:
            log.warning("%s", exc)

    def _on_drain(self, now: bool) -> None:
        assert self._nursery is not None
        if now:
            self._drain_now.set()
        if not self._ending.is_set():
            self._ending.set()
            self._nursery.start_soon(lasting, "unmount", self._end)

    def _on_handover(self) -> None:
        """Another worker waits to go on: take no more requests, answer those in work, end. What takes too long (it
        may wait for the store) is asked of the other one again, as after a crash."""
        assert self._nursery is not None
        log.info("handing over to another worker")
        self._handing_over = True
        self._session.stop()
        self._nursery.cancel_scope.deadline = trio.current_time() + HANDOVER_SECONDS

    async def upgrade(self) -> None:
        """For `phfs upgrade`. Returns when this worker ends. Raises: StartupError, nothing has changed."""
        await self._link.upgrade()

    def _on_gone(self) -> None:
        log.error("the keeper is gone; the mount ends here and stays broken until it is mounted again")
        os._exit(1)  # what was answered is in the journal

    async def _end(self) -> None:
        """Drain, then unmount; a mount that is in use is taken off the tree and ends with its last open file."""
        await self._mount.flush_kernel()
        await self._drain()
        try:
            await self._link.unmount(lazy=False)
        except MountpointError as exc:
            log.warning("%s; it is detached", exc)
            await self._link.unmount(lazy=True)
            await trio.sleep(BUSY_SECONDS)
            self._session.stop()

    async def shutdown(self, *, lazy: bool = False) -> None:
        """Drain and unmount for `phfs umount`. Raises: MountpointError if files are open and not `lazy`."""
        try:
            await self._mount.flush_kernel()
            await self._drain()
            await self._link.unmount(lazy=lazy)
        finally:
            self._mount.settling.end_drain()

    async def _drain(self) -> bool:
        done = False
        async with trio.open_nursery() as nursery:

            async def stop() -> None:
                await self._drain_now.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(stop)
            done = await self._mount.settling.drain()
            nursery.cancel_scope.cancel()
        return done

    async def _flush_kernel(self) -> None:
        """Service: bytes of files that stay open become visible in time (P8)."""
        while True:
            await trio.sleep(KERNEL_FLUSH_SECONDS)
            if self._mount.vfs.open_writers:
                await self._mount.flush_kernel()

    async def _checkpoint(self) -> None:
        """Service: keep the journal's log short."""
        while True:
            await trio.sleep(CHECKPOINT_SECONDS)
            for step in (self._forget, self._shorten_journal, self._shorten_kernel_log):
                with surviving("checkpoint"), contextlib.suppress(OSError):  # the disk is full: all stays as it is
                    await step()

    async def _forget(self) -> None:
        self._mount.journal.reserve.review()
        self._mount.journal.forget_ended()

    async def _shorten_journal(self) -> None:
        if self._mount.journal.log_bytes > CHECKPOINT_BYTES:
            await trio.to_thread.run_sync(self._mount.journal.checkpoint)

    async def _shorten_kernel_log(self) -> None:
        if self._mount.kernel.wants_compaction:
            await self._mount.kernel.compact()

"""The worker: builds every object of one mount, runs the services, and ends them in the right order.

One mount per process (pyfuse3 keeps global state). Start: lock the state, read the journal, ask the store, tell the
keeper, take the descriptor, serve. End: upload what is pending, have the keeper unmount, upload what the kernel wrote
on that occasion, close.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import logging
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

import trio

import phfs_fuse
from phfs_fuse import logs, metrics
from phfs_fuse.blocks import BlockCache
from phfs_fuse.changes import Changes
from phfs_fuse.claims import Claims
from phfs_fuse.config import Events as EventsSetting
from phfs_fuse.config import MountConfig
from phfs_fuse.control import ControlServer
from phfs_fuse.errors import (
    MountpointError,
    NotDrained,
    NotFound,
    PhfsError,
    StartupError,
    store_startup_error,
)
from phfs_fuse.events import Events
from phfs_fuse.expiry import can_expire
from phfs_fuse.inodes import Inodes
from phfs_fuse.journal import Journal
from phfs_fuse.kernelstate import KernelState
from phfs_fuse.localstate import StateLock
from phfs_fuse.namespace import Namespace
from phfs_fuse.ops import operations
from phfs_fuse.quota import Quotas
from phfs_fuse.quotakeeper import QuotaKeeper
from phfs_fuse.recovery import Recovery
from phfs_fuse.reserve import room_to_resume
from phfs_fuse.resume import last_change, restore
from phfs_fuse.session import KeeperLink, Session
from phfs_fuse.settings import load_config
from phfs_fuse.settling import Settling
from phfs_fuse.staging import StagingArea
from phfs_fuse.store import open_store
from phfs_fuse.store.base import ObjectStore
from phfs_fuse.trust import Trust
from phfs_fuse.uploadqueue import UploadQueue
from phfs_fuse.vfs import Vfs
from phfs_fuse.writeback import Writeback

log = logging.getLogger(__name__)

KERNEL_LOG: Final = "kernel.log"
KERNEL_FLUSH_SECONDS: Final = 2.0  # how long the kernel may keep bytes of open files to itself (its default: 30)
CHECKPOINT_SECONDS: Final = 5.0
CHECKPOINT_BYTES: Final = 4 << 20
RESEND_SECONDS: Final = 5.0  # until when a request may be one that the process before had done
HANDOVER_SECONDS: Final = 5.0  # for requests in work, when another worker waits to go on
DESCRIPTORS_PART: Final = 6  # of them, at most, for files of the staging area, and as many for those of the cache
BUSY_SECONDS: Final = 5.0  # for programs to let go of a mount that is asked to end
EPOCH_INODES: Final = 1 << 28  # numbers of one process: none is given out twice over restarts


class Mount:
    """All objects of one mount, wired. `open` does what may fail before there is a mount."""

    def __init__(self, config: MountConfig, store: ObjectStore) -> None:
        directory = config.writeback.directory
        self.config = config
        self.store = store
        self.started = time.monotonic()
        self.lock = StateLock(directory, f"{config.kernel.mountpoint} (pid {os.getpid()})")
        self.journal = Journal(directory, f"{config.store.endpoint_url or 'aws'} {config.store.url}")
        if self.journal.saved_aside:
            log.error(
                "the journal was damaged; it is kept as %s, what was readable goes on", self.journal.saved_aside
            )
        epoch = self.journal.number("epoch", 0)
        self.starts = epoch + 1  # processes that this local state has had
        self.journal.set_number("epoch", self.starts)
        files_max = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // DESCRIPTORS_PART
        self.area = StagingArea(directory / "staging", first_id=1, files_max=min(512, files_max))
        self.blocks = BlockCache(store, config.cache, files_max=files_max)
        self.inodes = Inodes(
            config.store.prefix,
            Namespace.root_attrs(config.tree),
            now_ns=time.time_ns(),
            first_ino=epoch * EPOCH_INODES + 2,
        )
        self.kernel = KernelState(directory / KERNEL_LOG, self.inodes, self.journal.reserve.give_up)
        queue = UploadQueue(config.writeback)
        quotas = Quotas()
        self.changes = Changes(
            inodes=self.inodes,
            journal=self.journal,
            area=self.area,
            queue=queue,
            kernel=self.kernel,
            quotas=quotas,
        )
        self.quotas = QuotaKeeper(
            quotas=quotas,
            store=store,
            changes=self.changes,
            journal=self.journal,
            config=config.quota,
            prefix=config.store.prefix,
        )
        self.settling = Settling(
            inodes=self.inodes, area=self.area, changes=self.changes, queue=queue, config=config.writeback
        )
        self.writeback = Writeback(
            store=store,
            inodes=self.inodes,
            blocks=self.blocks,
            journal=self.journal,
            area=self.area,
            changes=self.changes,
            queue=queue,
            config=config.writeback,
        )
        self.trust = Trust(config.tree)
        self.namespace = Namespace(
            store=store, inodes=self.inodes, changes=self.changes, config=config.tree, trust=self.trust
        )
        self.events = Events(
            store=store,
            inodes=self.inodes,
            changes=self.changes,
            queue=queue,
            namespace=self.namespace,
            trust=self.trust,
        )
        self.events.on_foreign = quotas.foreign
        self.vfs = Vfs(
            inodes=self.inodes,
            namespace=self.namespace,
            blocks=self.blocks,
            changes=self.changes,
            settling=self.settling,
            kernel=self.kernel,
            quotas=quotas,
            claims=Claims(store=store, changes=self.changes, queue=queue),
            config=config.tree,
            write_through=config.writeback.write_through,
        )

    async def check(self) -> None:
        """Ask the store for the bucket and the root's attributes. Raises: StartupError."""
        config = self.config.store
        try:
            await self.store.check_bucket(create=config.create_bucket)
            if config.prefix and self.inodes.root.dirty is None:
                with contextlib.suppress(NotFound):
                    self.namespace.set_root(await self.store.head(self.inodes.key(self.inodes.root)))
        except PhfsError as exc:
            raise store_startup_error(exc, config.url) from exc

    def resume(self) -> None:
        """Put the tree back as the kernel knows it, before `recover`."""
        known, done = self.kernel.load(), self.journal.acts()
        restore(self.inodes, known, done)
        self.changes.go_on(last_change(known, done))
        self.kernel.go_on()
        for _, ino, _ in done:  # `recover` ends their rows
            if (node := self.inodes.find(ino)) is not None:
                self.kernel.changed(node)
        self.vfs.resume(known.positions, {act.pid: (act, ino) for act, ino, _ in done})

    def recover(self) -> None:
        """Take up what an earlier process left in the journal. Says so."""
        recovery = Recovery(self.journal, self.area, self.inodes, self.namespace.default_directory)
        found = recovery.nodes()
        self.changes.recover(found)
        for node in self.inodes.all():
            if node.detached and node.opens and not node.is_dir:
                self.changes.track(node)
        self.journal.drop_acts()
        for path in recovery.saved:
            log.error("bytes that no file could be found for are saved as %s", path)
        pending = self.settling.pending()
        if pending.files or pending.deletes:
            log.info("found from before: files=%d deletes=%d bytes=%d", pending.files, pending.deletes, pending.bytes)

    def close(self) -> None:
        self.kernel.close()
        self.blocks.close()
        self.area.close()
        self.journal.close()
        self.lock.close()

    # ---- what the control socket asks (see control.Controllable) ----

    def pending(self) -> Mapping[str, int]:
        now = self.settling.pending()
        return {
            "files_pending": now.files + now.deletes,
            "bytes_pending": now.bytes,
            "bytes_done": metrics.UPLOADED_BYTES.values[""],
        }

    def status(self) -> Mapping[str, object]:
        config, settling = self.config, self.settling
        pending, usage = settling.pending(), self.blocks.usage()
        asked = usage.hits + usage.misses
        return {
            "mountpoint": str(config.kernel.mountpoint),
            "url": config.store.url,
            "endpoint": config.store.endpoint_url,
            "pid": os.getpid(),
            "keeper_pid": os.getppid(),
            "version": phfs_fuse.__version__,
            "uptime_seconds": time.monotonic() - self.started,
            "starts": self.starts,
            "read_only": config.tree.read_only,
            "pending": {
                "files": pending.files,
                "deletes": pending.deletes,
                "bytes": pending.bytes,
                "oldest_seconds": pending.oldest_seconds,
            },
            "cache": {
                "bytes": usage.bytes,
                "limit": usage.limit,
                "hits": usage.hits,
                "misses": usage.misses,
                "hit_rate": usage.hits / asked if asked else None,
            },
            "dirty": {"bytes": pending.bytes, "limit": settling.dirty_bytes_max},
            "uploaded": {"files": metrics.UPLOADED_FILES.values[""], "bytes": metrics.UPLOADED_BYTES.values[""]},
            "inodes": len(self.inodes),
            "open_files": self.vfs.open_files,
            "quotas": self.quotas.shown(),
            "conflicts": len(self.journal.conflicts()),
            "illegal_keys": self.namespace.illegal_keys,
            "errors": [{"path": path, "reason": reason, "count": count} for path, reason, count in settling.errors()],
            "events": self.events.status(),
            "counters": metrics.snapshot(),
            "store": {"state": "unavailable" if settling.store_is_away else "ok"},
        }

    def conflicts(self) -> Sequence[Mapping[str, object]]:
        return [
            {
                "path": os.fsdecode(row.path),
                "kept_as": os.fsdecode(row.kept_as),
                "outside": row.outside,
                "at": row.at_ns / 1e9,
            }
            for row in self.journal.conflicts()
        ]

    def settled(self, path: str, kept_as: str) -> None:
        self.journal.drop_conflict(os.fsencode(path), os.fsencode(kept_as))

    def limit(self, *, cache_bytes: int | None, dirty_bytes: int | None) -> None:
        """Raises: ConfigError."""
        if cache_bytes is not None:
            self.blocks.limit(replace(self.config.cache, size_max=cache_bytes).size_max)
        if dirty_bytes is not None:
            self.settling.limit(replace(self.config.writeback, dirty_bytes_max=dirty_bytes).dirty_bytes_max)

    def set_quota(self, path: str, size: int | None) -> None:
        self.quotas.set(path, size)

    async def sync(self, path: str | None) -> None:
        await flush_kernel(self.config.kernel.mountpoint)
        await self.vfs.settle_path(path or "")


async def flush_kernel(mountpoint: Path) -> None:
    """Have the kernel hand over what programs wrote and it still caches. By another process: this one serves the
    mount, and a process that waits for itself waits forever."""
    with trio.move_on_after(60):
        await trio.run_process(
            ["sync", "--file-system", str(mountpoint)],
            check=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )


class Worker:
    """The services of a mount and their end."""

    def __init__(self, mount: Mount, link: KeeperLink, session: Session, *, resumed: bool) -> None:
        self._mount = mount
        self._resumed = resumed
        self._link = link
        self._session = session
        self._drain_now = trio.Event()
        self._handing_over = False
        self._ending = trio.Event()
        self._nursery: trio.Nursery | None = None

    async def run(self, listener: ControlServer) -> None:
        """Returns when the mount has ended and what was pending is in the store. Raises: NotDrained."""
        mount, drained = self._mount, True
        async with trio.open_nursery() as services:
            self._nursery = services
            await services.start(mount.blocks.run)
            await services.start(mount.writeback.run)
            await services.start(mount.quotas.run)
            await services.start(mount.vfs.list_ahead)
            services.start_soon(self._hear_keeper)
            if mount.config.tree.events is EventsSetting.AUTO:
                services.start_soon(self._hear_store)
            services.start_soon(self._announce)
            await services.start(listener.run)
            services.start_soon(self._flush_kernel)
            services.start_soon(self._checkpoint)
            await self._session.serve()
            if not self._handing_over:
                log.info("unmounted mountpoint=%s", mount.config.kernel.mountpoint)
                drained = await self._drain()
            services.cancel_scope.cancel()
        if not drained:
            left = mount.settling.pending()
            raise NotDrained(
                f"{mount.config.kernel.mountpoint}: {left.files} files and {left.bytes} bytes are not in the store "
                f"yet; they stay in {mount.config.writeback.directory} and go up at the next mount"
            )

    async def _hear_keeper(self) -> None:
        await self._link.run(on_drain=self._on_drain, on_handover=self._on_handover, on_gone=self._on_gone)

    async def _hear_store(self) -> None:
        """Service: see and show what others change."""
        mount = self._mount
        async with trio.open_nursery() as nursery:
            if self._link.expires:  # the keeper is not of an older version
                mount.trust.kernel_takes_back = can_expire()
                nursery.start_soon(mount.events.tell_kernel, self._link.expire)
                if self._resumed:  # told by the process before, which may have missed something when it died
                    mount.events.expire_all()
            await mount.events.run()

    async def _announce(self) -> None:
        await self._session.established.wait()
        await self._link.ready()
        if self._resumed:
            await trio.sleep(RESEND_SECONDS)
            self._mount.vfs.end_resume()
            await self._check_again()
        await self._mount.writeback.abort_stale_uploads()

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
            self._nursery.start_soon(self._end)

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
        await flush_kernel(self._mount.config.kernel.mountpoint)
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
            await flush_kernel(self._mount.config.kernel.mountpoint)
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
                await flush_kernel(self._mount.config.kernel.mountpoint)

    async def _checkpoint(self) -> None:
        """Service: keep the journal's log short."""
        while True:
            await trio.sleep(CHECKPOINT_SECONDS)
            with contextlib.suppress(OSError):
                self._mount.journal.reserve.review()
                self._mount.journal.forget_ended()
            if self._mount.journal.log_bytes > CHECKPOINT_BYTES:
                with contextlib.suppress(OSError):  # the disk is full: the log stays as it is
                    await trio.to_thread.run_sync(self._mount.journal.checkpoint)
            if self._mount.kernel.wants_compaction:
                with contextlib.suppress(OSError):  # the disk is still full
                    await self._mount.kernel.compact()


@asynccontextmanager
async def opened(config: MountConfig) -> AsyncIterator[Mount]:
    """The objects of a mount, which holds its state directory until the end of the block."""
    owner = hashlib.sha256(f"{socket.gethostname()}:{config.writeback.directory}".encode()).hexdigest()
    store = open_store(config.store, owner[:16])
    try:
        mount = Mount(config, store)
        try:
            yield mount
        finally:
            mount.close()
    finally:
        with trio.CancelScope(shield=True), trio.move_on_after(5):
            await store.aclose()


async def _serve(config: MountConfig, link: KeeperLink, *, resume: bool) -> None:
    if resume:
        await room_to_resume(config.writeback.directory)
    async with opened(config) as mount:
        if resume:  # without asking the store: the kernel's requests wait
            mount.resume()
        else:
            await mount.check()
            mount.kernel.begin()
        mount.recover()
        mount.quotas.begin(resumed=resume)
        fd = await link.receive_descriptor()
        ops = operations(mount.vfs, config.tree)
        session = Session(ops, fd, resume=resume, on_statfs=ops.statfs_for if config.quota.has_folders else None)
        worker = Worker(mount, link, session, resumed=resume)
        try:
            await worker.run(ControlServer(config.control_socket, mount, worker))
        finally:
            session.close()


async def _main(config: MountConfig, fd: int, *, resume: bool, standby: bool) -> int:
    link = KeeperLink(fd)
    try:
        if standby:
            Journal.check(config.writeback.directory)
            KernelState.check(config.writeback.directory / KERNEL_LOG)
            await link.standby()
        await _serve(config, link, resume=resume)
    except* StartupError as group:
        exc = first_startup_error(group)
        log.error("%s", exc)
        with contextlib.suppress(MountpointError):
            await link.failed(str(exc), exc.exit_code)
        code = exc.exit_code
    else:
        code = 0
    return code


def first_startup_error(group: BaseException) -> StartupError:
    while isinstance(group, BaseExceptionGroup):
        group = group.exceptions[0]
    assert isinstance(group, StartupError)
    return group


def prepare_process() -> None:
    """As many open files as allowed: staging, cache and connections each hold some. Less work for the collector."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m phfs_fuse.mount")
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--resume", action="store_true", help="the kernel knows the mount already")
    parser.add_argument("--standby", action="store_true", help="begin when the worker before has ended")
    options = parser.parse_args(arguments)
    config = load_config(options.config.read_text())
    logs.setup(config.log_level, config.log_format, name=config.log_name)
    prepare_process()
    return trio.run(partial(_main, config, options.fd, resume=options.resume, standby=options.standby))


if __name__ == "__main__":
    sys.exit(main())

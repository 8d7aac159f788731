"""Builds every object of one mount, and does with all of them what comes before and after the services.

State: the objects, one of each. The local state is locked from the first to the last.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import resource
import socket
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import trio

from phfs_fuse.cache.block_cache import BlockCache
from phfs_fuse.config.model import MountConfig
from phfs_fuse.errors import LocalStateError, NotDrained, NotFound, PhfsError, store_startup_error
from phfs_fuse.host.locks import StateLock
from phfs_fuse.namespace.lifetimes import Lifetimes
from phfs_fuse.namespace.namespace import Namespace
from phfs_fuse.namespace.remote_changes import RemoteChanges
from phfs_fuse.pending.changes import Changes
from phfs_fuse.pending.foreground_load import ForegroundLoad
from phfs_fuse.pending.queue import UploadQueue
from phfs_fuse.pending.recovery import Recovery
from phfs_fuse.quota.counter import QuotaCounter
from phfs_fuse.quota.limits import Quotas
from phfs_fuse.state.journal import Journal
from phfs_fuse.state.refusal import summary
from phfs_fuse.state.staging import StagingArea
from phfs_fuse.store import open_store
from phfs_fuse.store.base import ObjectStore
from phfs_fuse.tree.default_attrs import DefaultAttrs
from phfs_fuse.tree.inodes import Inodes
from phfs_fuse.tree.kernel_log import KernelLog
from phfs_fuse.tree.resume import last_change, restore
from phfs_fuse.vfs.admission import Admission
from phfs_fuse.vfs.exclusive_create import ExclusiveCreates
from phfs_fuse.vfs.store_limits import StoreLimits
from phfs_fuse.vfs.vfs import Vfs
from phfs_fuse.writeback.loop import Writeback
from phfs_fuse.writeback.rescue import Rescue
from phfs_fuse.writeback.sync import Sync

log = logging.getLogger(__name__)

KERNEL_LOG: Final = "kernel.log"
TRIALS: Final = "trials.json"  # objects in the store that are no files
DESCRIPTORS_PART: Final = 6  # of them, at most, for files of the staging area, and as many for those of the cache
EPOCH_INODES: Final = 1 << 28  # numbers of one process: none is given out twice over restarts
FLUSH_SECONDS: Final = 60.0  # for the kernel to hand over what it caches


class Mount:
    """All objects of one mount, wired. First `check` (or `resume`), then `recover`."""

    def __init__(self, config: MountConfig, store: ObjectStore) -> None:
        directory = config.writeback.directory
        self.config = config
        self.store = store
        self.started = time.monotonic()
        self._is_resumed = False
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
        self.area = StagingArea(
            directory / "staging",
            first_id=1,
            files_max=min(512, files_max),
            saved_bytes_max=config.writeback.saved_max,
        )
        self.blocks = BlockCache(store, config.cache, files_max=files_max)
        self.defaults = DefaultAttrs(config.tree)
        self.inodes = Inodes(
            config.store.prefix,
            self.defaults.directory(),
            now_ns=time.time_ns(),
            first_ino=epoch * EPOCH_INODES + 2,
        )
        self.kernel = KernelLog(directory / KERNEL_LOG, self.inodes, self.journal.reserve.give_up)
        queue = UploadQueue(config.writeback, self.inodes.key)
        self.demand = ForegroundLoad()
        quotas = Quotas()
        self.changes = Changes(
            inodes=self.inodes,
            journal=self.journal,
            area=self.area,
            queue=queue,
            kernel=self.kernel,
            quotas=quotas,
        )
        self.quotas = QuotaCounter(
            quotas=quotas,
            store=store,
            known_sizes=self.changes.known_sizes,
            journal=self.journal,
            config=config.quota,
            prefix=config.store.prefix,
        )
        self.settling = Sync(
            inodes=self.inodes, area=self.area, changes=self.changes, queue=queue, config=config.writeback
        )
        self.aside = Rescue(self.inodes, self.area, self.changes)
        self.writeback = Writeback(
            store=store,
            inodes=self.inodes,
            blocks=self.blocks,
            journal=self.journal,
            area=self.area,
            changes=self.changes,
            queue=queue,
            demand=self.demand,
            defaults=self.defaults,
            aside=self.aside,
            config=config.writeback,
        )
        store.tell_new_credentials(self.settling.retry_refused)
        self.trust = Lifetimes(config.tree)
        self.namespace = Namespace(
            store=store, inodes=self.inodes, changes=self.changes, defaults=self.defaults, trust=self.trust
        )
        self.events = RemoteChanges(
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
            claims=ExclusiveCreates(store=store, changes=self.changes, queue=queue),
            defaults=self.defaults,
            storable=StoreLimits(store, self.inodes),
            writable=Admission(self.journal, read_only=config.tree.read_only),
            saved=self.area.saved,
            config=config.tree,
            write_through=config.writeback.write_through,
        )

    def end_resume(self) -> None:
        """What is asked for from now on is no repetition."""
        self.vfs.end_resume()
        self.changes.give_back_claims()

    async def check(self) -> None:
        """Ask the store for the bucket and the root's attributes. Raises: StartupError."""
        config = self.config.store
        try:
            await self.store.check_bucket(create=config.create_bucket)
            root = self.inodes.root
            if config.prefix and root.dirty is None:
                with contextlib.suppress(NotFound):
                    self.namespace.set_marker(root, await self.store.head(self.inodes.key(root)))
        except PhfsError as exc:
            raise store_startup_error(exc, config.url, config.endpoint_text) from exc
        except OSError as exc:  # trial objects are noted before they are stored
            directory = self.config.writeback.directory
            raise LocalStateError(f"state directory {directory}: {exc.strerror or exc}") from exc

    def resume(self) -> None:
        """Put the tree back as the kernel knows it, before `recover`."""
        known, done = self.kernel.load(), self.journal.acts()
        restore(self.inodes, known, done)
        self._is_resumed = True
        self.changes.go_on(last_change(known, done))
        self.kernel.go_on()
        for _, ino, _ in done:  # `recover` ends their rows
            if (node := self.inodes.find(ino)) is not None:
                self.kernel.changed(node)
        acts = {act.pid: (act, ino) for act, ino, _ in done}
        self.vfs.resume(known.positions, acts, damaged=self.journal.saved_aside is not None)

    def recover(self) -> None:
        """Take up what an earlier process left in the journal. Says so."""
        recovery = Recovery(self.journal, self.area, self.inodes, self.defaults.directory)
        found = recovery.nodes()
        self.changes.recover(found)
        for node in self.inodes.all():
            if node.detached and node.opens and not node.is_dir:
                self.changes.users.track(node)
        self.journal.drop_acts()
        if not self._is_resumed:  # else the kernel may ask again
            self.changes.give_back_claims()
        for path in recovery.saved:
            log.error("bytes that no file could be found for are saved as %s", path)
        pending = self.settling.pending()
        if pending.files or pending.deletes:
            log.info("found from before: files=%d deletes=%d bytes=%d", pending.files, pending.deletes, pending.bytes)

    def require_stored(self) -> None:
        """The mount has ended. Says what is not in the store. Raises: NotDrained."""
        left, refused = self.settling.pending(), self.settling.refused()
        for refusal in refused:
            log.error("refused by the store: %s", refusal.line)
        self.changes.refusals.end()
        directory = self.config.writeback.directory
        try:
            kept = self.aside.keep_refused()
        except OSError as exc:
            log.error("bytes that were refused stay in %s/staging: %s", directory, exc.strerror)
        else:
            for path in kept:
                log.info("kept as %s", path)
        if left.files or left.deletes:
            why = f"{summary(len(refused))}; " if refused else ""
            raise NotDrained(
                f"{self.config.store.url}: {why}{left.files} files and {left.bytes} bytes are not in the store yet; "
                f"they stay in {directory} and go up at the next mount"
            )
        if refused:
            raise NotDrained(f"{self.config.store.url}: {summary(len(refused))}; the log names each")

    async def flush_kernel(self) -> None:
        """Have the kernel hand over what programs wrote and it still caches. By another process: this one serves the
        mount, and a process that waits for itself waits forever."""
        with trio.move_on_after(FLUSH_SECONDS):
            await trio.run_process(
                ["sync", "--file-system", str(self.config.kernel.mountpoint)],
                check=False,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )

    def close(self) -> None:
        self.kernel.close()
        self.blocks.close()
        self.area.close()
        self.journal.close()
        self.lock.close()


@asynccontextmanager
async def opened(config: MountConfig) -> AsyncIterator[Mount]:
    """The objects of a mount, which holds its state directory until the end of the block."""
    owner = hashlib.sha256(f"{socket.gethostname()}:{config.writeback.directory}".encode()).hexdigest()
    store = open_store(config.store, owner[:16], config.writeback.directory / TRIALS)
    try:
        mount = Mount(config, store)
        try:
            yield mount
        finally:
            mount.close()
    finally:
        with trio.CancelScope(shield=True), trio.move_on_after(5):
            await store.aclose()

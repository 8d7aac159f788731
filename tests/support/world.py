"""The tree and the write-back over a store in memory, put together as a mount does it."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import trio

from phfs_fuse.cache.block_cache import BlockCache
from phfs_fuse.config.model import ExclusiveCreate, OnConflict, TreeConfig, WritebackConfig
from phfs_fuse.errors import PhfsError
from phfs_fuse.namespace.lifetimes import Lifetimes
from phfs_fuse.namespace.namespace import Namespace
from phfs_fuse.namespace.remote_changes import RemoteChanges
from phfs_fuse.pending.changes import Changes
from phfs_fuse.pending.foreground_load import ForegroundLoad
from phfs_fuse.pending.queue import UploadQueue
from phfs_fuse.quota.limits import Quotas
from phfs_fuse.state.journal import Journal
from phfs_fuse.state.staging import StagingArea
from phfs_fuse.tree.default_attrs import DefaultAttrs
from phfs_fuse.tree.inodes import Inodes
from phfs_fuse.tree.kernel_log import KernelLog
from phfs_fuse.tree.node import Node
from phfs_fuse.types import MIB, ObjectKey
from phfs_fuse.vfs.admission import Admission
from phfs_fuse.vfs.exclusive_create import ExclusiveCreates
from phfs_fuse.vfs.store_limits import StoreLimits
from phfs_fuse.vfs.vfs import Vfs
from phfs_fuse.writeback.loop import Writeback
from phfs_fuse.writeback.rescue import Rescue
from phfs_fuse.writeback.sync import Sync
from tests.support.fake_blocks import FakeBlocks
from tests.support.fake_store import FakeStore
from tests.support.fault_store import FaultStore

PREFIX = "groups/a/"


def look_first(vfs: Vfs) -> None:
    """Names are looked up before they are removed or moved, as the kernel does."""

    def looking(call: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
        async def wrapped(parent: int, name: bytes, *rest: object, **more: object) -> None:
            with suppress(PhfsError):
                (await vfs.lookup(parent, name)).lookups += 1
            await call(parent, name, *rest, **more)

        return wrapped

    vfs.unlink, vfs.rmdir, vfs.rename = looking(vfs.unlink), looking(vfs.rmdir), looking(vfs.rename)


@dataclass
class World:
    store: FakeStore
    blocks: FakeBlocks
    journal: Journal
    area: StagingArea
    inodes: Inodes
    changes: Changes
    settling: Sync
    writeback: Writeback
    namespace: Namespace
    vfs: Vfs
    quotas: Quotas
    trust: Lifetimes
    events: RemoteChanges
    kernel: KernelLog
    demand: ForegroundLoad
    defaults: DefaultAttrs
    aside: Rescue

    async def write(self, path: str, data: bytes) -> Node:
        *folders, name = path.split("/")
        at = 1
        for folder in folders:
            at = (await self.vfs.lookup(at, folder.encode())).ino
        node, fh = await self.vfs.create(at, name.encode(), 0o644, os.O_RDWR, 0, 0)
        node.lookups += 1
        await self.vfs.write(fh, 0, data)
        await self.vfs.flush(fh)
        self.vfs.release(fh)
        return node

    async def write_again(self, path: str, data: bytes) -> Node:
        """Write over the start of a file that exists."""
        node = await self.node(path)
        fh = self.vfs.open(node.ino, os.O_WRONLY)
        await self.vfs.write(fh, 0, data)
        await self.vfs.flush(fh)
        self.vfs.release(fh)
        return node

    async def read(self, path: str) -> bytes:
        node = await self.node(path)
        fh = self.vfs.open(node.ino, os.O_RDONLY)
        try:
            return await self.vfs.read(fh, 0, 1 << 30)
        finally:
            self.vfs.release(fh)

    async def node(self, path: str) -> Node:
        at = self.inodes.root
        for part in path.split("/"):
            at = await self.vfs.lookup(at.ino, part.encode())
        at.lookups += 1
        return at

    async def names(self, ino: int = 1) -> list[str]:
        fh = self.vfs.opendir(ino)
        found: list[str] = []
        offset = 0
        while page := await self.vfs.readdir(fh, offset):
            found += [node.name.decode() for _, node in page]
            offset = page[-1][0]
        await self.vfs.releasedir(fh)
        return found

    async def settle(self) -> None:
        await self.settling.settle_below(self.inodes.root)


def keys(world: World) -> list[str]:
    return sorted(str(key).removeprefix(PREFIX) for key in world.store.objects)


def content(world: World, path: str) -> bytes:
    return bytes(world.store.objects[ObjectKey(PREFIX + path)].data)


def made(
    store: FakeStore | FaultStore,
    directory: Path,
    *,
    exclusive_create: ExclusiveCreate = ExclusiveCreate.LOCAL,
    on_conflict: OnConflict = OnConflict.KEEP_BOTH,
    saved_bytes_max: int | None = None,
    prefix: str = PREFIX,
) -> World:
    config = WritebackConfig(
        directory=directory,
        delay_seconds=0.5,
        multipart_bytes_min=8 * MIB,
        part_bytes=5 * MIB,
        on_conflict=on_conflict,
    )
    tree = TreeConfig(exclusive_create=exclusive_create)
    journal = Journal(directory, "volume")
    area = StagingArea(directory / "staging", first_id=1, saved_bytes_max=saved_bytes_max)
    blocks = FakeBlocks(store)
    defaults = DefaultAttrs(tree)
    inodes = Inodes(prefix, defaults.directory(), now_ns=time.time_ns())
    queue = UploadQueue(config, inodes.key)
    demand = ForegroundLoad()
    kernel = KernelLog(directory / "kernel.log", inodes, journal.reserve.give_up)
    kernel.begin()
    quotas = Quotas()
    changes = Changes(inodes=inodes, journal=journal, area=area, queue=queue, kernel=kernel, quotas=quotas)
    settling = Sync(inodes=inodes, area=area, changes=changes, queue=queue, config=config)
    aside = Rescue(inodes, area, changes)
    writeback = Writeback(
        store=store,
        inodes=inodes,
        blocks=cast(BlockCache, blocks),
        journal=journal,
        area=area,
        changes=changes,
        queue=queue,
        demand=demand,
        defaults=defaults,
        aside=aside,
        config=config,
    )
    trust = Lifetimes(tree)
    namespace = Namespace(store=store, inodes=inodes, changes=changes, defaults=defaults, trust=trust)
    events = RemoteChanges(store=store, inodes=inodes, changes=changes, queue=queue, namespace=namespace, trust=trust)
    vfs = Vfs(
        inodes=inodes,
        namespace=namespace,
        blocks=cast(BlockCache, blocks),
        changes=changes,
        settling=settling,
        kernel=kernel,
        quotas=quotas,
        claims=ExclusiveCreates(store=store, changes=changes, queue=queue),
        defaults=defaults,
        storable=StoreLimits(store, inodes),
        writable=Admission(journal, read_only=tree.read_only),
        saved=area.saved,
        config=tree,
        write_through=False,
    )
    look_first(vfs)
    return World(
        store,
        blocks,
        journal,
        area,
        inodes,
        changes,
        settling,
        writeback,
        namespace,
        vfs,
        quotas,
        trust,
        events,
        kernel,
        demand,
        defaults,
        aside,
    )


@asynccontextmanager
async def running(world: World) -> AsyncIterator[World]:
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(world.writeback.run)
            yield world
            nursery.cancel_scope.cancel()
    finally:
        world.kernel.close()
        world.area.close()

"""Mounts of volumes, made, looked at and ended without ever waiting for one of them in this process.

State: none of its own: what is mounted is in the mount table, who serves it in the lock of its keeper (whose place is
noted, since it is looked at every other second).
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Final, Protocol

from phfs_csi.config import NodeConfig
from phfs_csi.errors import CsiError, DeadlineExceeded, FailedPrecondition, Internal, Unavailable
from phfs_csi.node.commands import run
from phfs_csi.node.mount_configs import MountConfigs
from phfs_csi.node.records import VolumeRecord
from phfs_csi.node.shares import Shares
from phfs_fuse.config.dirs import make_private
from phfs_fuse.config.model import MountConfig
from phfs_fuse.errors import LocalStateError, StartupError, StoreStartupError
from phfs_fuse.host import fusemount
from phfs_fuse.host.holder_link import HolderLink
from phfs_fuse.host.locks import keeper_of
from phfs_fuse.host.mount_table import MountEntry, mount_table
from phfs_fuse.host.processes import ended
from phfs_fuse.host.registry import MountRecord
from phfs_fuse.launch import client, launcher, preflight

log = logging.getLogger(__name__)

END_SECONDS: Final = 30.0  # for keeper and worker to end after uploads were given up
RELEASE_SECONDS: Final = 15.0
RELEASE_LOOK_SECONDS: Final = 0.02
HOLDER_SECONDS: Final = 5.0  # for a holder that is being replaced
PROGRESS_SECONDS: Final = 5.0
LAYERS_MAX: Final = 10  # mounts on each other at one path
KIND: Final = f"fuse.{fusemount.FS_TYPE}"


class State(Enum):
    ABSENT = "absent"
    SERVED = "served"
    DEAD = "dead"  # mounted, but nobody serves it


@dataclass(frozen=True, slots=True)
class Usage:
    """As statvfs(3) has it: bytes and inodes."""

    total: int
    used: int
    available: int
    inodes: int
    inodes_used: int
    inodes_free: int


class Mounter(Protocol):
    """Raises everywhere: CsiError, with the reason for people."""

    def state(self, record: VolumeRecord) -> State:
        """What is at the mount point of the volume."""

    def mount(self, record: VolumeRecord, seconds: float) -> None:
        """Mount, or take up the connection that the holder has; what was dead there is taken off first. Nothing is
        left of a mount that is not ready in time."""

    def is_bound(self, record: VolumeRecord, target: Path) -> bool:
        """Whether the target shows the volume as it is mounted now."""

    def bind(self, record: VolumeRecord, target: Path, *, read_only: bool) -> None:
        """Show the volume at `target`, in place of a dead mount of ours."""

    def clear(self, path: Path) -> None:
        """Take off what is mounted at `path`."""

    def unbind(self, target: Path) -> None:
        """The same, and remove the directory, if it is there."""

    def end(self, record: VolumeRecord, seconds: float) -> None:
        """Upload for up to `seconds`, then unmount in any case. What is not uploaded stays in the local state."""

    def abandon(self, record: VolumeRecord) -> None:
        """Take off a mount that nobody serves, and the connection from the holder."""

    def release(self, record: VolumeRecord) -> bool:
        """Have keeper and worker end without unmounting, where the holder keeps the connection."""

    def usage(self, path: Path) -> Usage:
        """Asks the file system; raises DeadlineExceeded when it does not answer."""

    def status(self, record: VolumeRecord) -> Mapping[str, Any] | None:
        """What the worker says of itself; None: nothing."""

    def limit(self, record: VolumeRecord) -> None:
        """Tell the mount what its share is now, also for a restart of the worker. Never raises."""

    def tidy_up(self) -> None:
        """Keep what volumes have left in the cache within its limit."""

    def set_quota(self, record: VolumeRecord) -> None:
        """Tell the mount the quota of the record, also for a restart of the worker."""


class PhfsMounter:
    """The one that mounts."""

    def __init__(self, config: NodeConfig, configs: MountConfigs, shares: Shares, spawn: launcher.Spawn) -> None:
        self._config = config
        self._configs = configs
        self._shares = shares
        self._spawn = spawn
        self._config_paths: dict[tuple[str, Path], Path] = {}

    # --- what is there

    def state(self, record: VolumeRecord) -> State:
        if mount_table().get(str(record.path)) is None:
            return State.ABSENT
        return State.DEAD if self._keeper(record) is None else State.SERVED

    def is_bound(self, record: VolumeRecord, target: Path) -> bool:
        table = mount_table()
        ours, theirs = table.get(str(record.path)), table.get(str(target))
        return ours is not None and theirs is not None and ours.device == theirs.device

    def _keeper(self, record: VolumeRecord) -> int | None:
        name = (record.key, record.path)
        if name not in self._config_paths:
            self._config_paths[name] = preflight.config_path(self._configs.config(record))
        return keeper_of(self._config_paths[name])

    # --- the mount

    def mount(self, record: VolumeRecord, seconds: float) -> None:
        if self._keeper(record) is not None:
            raise Unavailable(f"{record.volume_id}: the process of its mount is ending; try again")
        deadline = time.monotonic() + seconds
        entry = mount_table().get(str(record.path))
        if entry is not None and not self._is_held(record, entry):
            self._take_off(record.path)
        if entry is None:
            _make_directory(record.path)
        config, environ = self._configs.with_credentials(record)
        try:
            for directory in (config.writeback.directory, config.cache.directory):
                make_private(directory)
            launcher.start_held(
                config,
                preflight.write_config(config),
                holder=self._config.holder_socket,
                environ=environ,
                seconds=max(1.0, deadline - time.monotonic()),
                spawn=self._spawn,
                log_fd=sys.stderr.fileno(),
            )
        except TimeoutError:
            raise DeadlineExceeded(f"{record.source}: not mounted within {seconds:.0f} s") from None
        except StoreStartupError as exc:
            raise Unavailable(str(exc)) from exc
        except StartupError as exc:
            raise FailedPrecondition(str(exc)) from exc
        except OSError as exc:
            raise Internal(f"{record.source}: not mounted: {exc}") from exc

    def _is_held(self, record: VolumeRecord, entry: MountEntry) -> bool:
        """Whether the holder has the connection of this mount. Raises: Unavailable, when the holder is not there."""
        if self._config.holder_socket is None:
            return False
        deadline = time.monotonic() + HOLDER_SECONDS
        while True:
            try:
                with closing(HolderLink(self._config.holder_socket)) as link:
                    held = link.take(str(record.path))
            except LocalStateError as exc:
                if time.monotonic() > deadline:
                    raise Unavailable(str(exc)) from exc
                time.sleep(0.2)  # it is being started, or replaced
            else:
                if held is not None:
                    os.close(held.fd)
                return held is not None and held.device == entry.device

    # --- its end

    def end(self, record: VolumeRecord, seconds: float) -> None:
        if (pid := self._keeper(record)) is not None:
            self._drain(record, pid, seconds)
        if str(record.path) in mount_table():
            self._take_off(record.path)

    def _drain(self, record: VolumeRecord, pid: int, seconds: float) -> None:
        """SIGTERM uploads and unmounts, a second one does not wait for the uploads."""
        deadline = time.monotonic() + seconds
        for end, number in ((deadline, signal.SIGTERM), (deadline + END_SECONDS, signal.SIGTERM)):
            with suppress(ProcessLookupError):
                os.kill(pid, number)
            while (left := end - time.monotonic()) > 0:
                if ended(pid, min(left, PROGRESS_SECONDS)):
                    return
                self._log_progress(record)
        log.error("volume=%s: its processes do not end: killed", record.volume_id)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        ended(pid, END_SECONDS)

    def _log_progress(self, record: VolumeRecord) -> None:
        pending = (self.status(record) or {}).get("pending", {})
        log.info(
            "draining volume=%s files=%s deletes=%s bytes=%s",
            record.volume_id,
            *(pending.get(name, "?") for name in ("files", "deletes", "bytes")),
        )

    def abandon(self, record: VolumeRecord) -> None:
        if self._keeper(record) is None:
            self._take_off(record.path)

    def release(self, record: VolumeRecord) -> bool:
        if self._config.holder_socket is None or (pid := self._keeper(record)) is None:
            return False
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGUSR1)
        deadline = time.monotonic() + RELEASE_SECONDS
        while self._keeper(record) is not None:  # its lock, not its process, is what the next one waits for
            if time.monotonic() > deadline:
                return False
            time.sleep(RELEASE_LOOK_SECONDS)
        return True

    # --- targets

    def bind(self, record: VolumeRecord, target: Path, *, read_only: bool) -> None:
        self.clear(target)
        _make_directory(target)
        run(["mount", "--bind", str(record.path), str(target)])
        if read_only:
            try:
                run(["mount", "-o", "remount,bind,ro", str(target)])
            except CsiError:
                self.unbind(target)
                raise

    def clear(self, path: Path) -> None:
        """Raises: FailedPrecondition for a mount of somebody else."""
        if (entry := mount_table().get(str(path))) is not None:
            if entry.kind != KIND:
                raise FailedPrecondition(f"{path}: {entry.source} ({entry.kind}) is mounted here")
            self._take_off(path)

    def unbind(self, target: Path) -> None:
        self.clear(target)
        try:
            target.rmdir()
        except FileNotFoundError:
            pass
        except OSError as exc:  # not ours to remove what is in it
            raise Internal(f"{target}: unmounted, but not removed: {exc.strerror}") from exc

    def _take_off(self, path: Path) -> None:
        """Unmount all that lies at `path`, dead or alive: who is in it keeps it, nobody else finds it."""
        if self._config.holder_socket is not None:
            with suppress(LocalStateError), closing(HolderLink(self._config.holder_socket)) as link:
                link.drop(str(path))  # else the kernel waits for somebody to serve it
        for _ in range(LAYERS_MAX):
            if str(path) not in mount_table():
                return
            run(["umount", "-l", "-i", "-c", str(path)])
        raise Internal(f"{path}: still mounted after {LAYERS_MAX} unmounts")

    # --- what is asked of a running mount

    def usage(self, path: Path) -> Usage:
        fields = run(["stat", "--file-system", "--format=%S %b %f %a %c %d", str(path)]).split()
        size, blocks, free, available, inodes, inodes_free = map(int, fields)
        return Usage(
            total=blocks * size,
            used=(blocks - free) * size,
            available=available * size,
            inodes=inodes,
            inodes_used=inodes - inodes_free,
            inodes_free=inodes_free,
        )

    def status(self, record: VolumeRecord) -> Mapping[str, Any] | None:
        with suppress(StartupError, TimeoutError):
            return client.status(_control(record, self._configs.config(record)))
        return None

    def limit(self, record: VolumeRecord) -> None:
        try:
            config, _environ = self._configs.with_credentials(record)
            if preflight.config_path(config).exists():
                preflight.write_config(config)
            limits = {"cache_bytes": config.cache.size_max, "dirty_bytes": config.writeback.dirty_bytes_max}
            request = {"op": "limits", **limits}
            next(client.ask(_control(record, config), request, client.STATUS_SECONDS))
        except (CsiError, StartupError, TimeoutError, OSError) as exc:  # it reads the file when it starts again
            log.info("volume=%s: limits are told later: %s", record.volume_id, exc)

    def tidy_up(self) -> None:
        self._shares.tidy_up()

    def set_quota(self, record: VolumeRecord) -> None:
        config, _environ = self._configs.with_credentials(record)
        preflight.write_config(config)
        try:
            client.set_quota(_control(record, config), "", config.quota.limits.get(""))
        except (StartupError, TimeoutError) as exc:
            raise Unavailable(f"{record.volume_id}: {exc}") from exc


def _control(record: VolumeRecord, config: MountConfig) -> MountRecord:
    return MountRecord(
        mountpoint=str(record.path), control_socket=str(config.control_socket), keeper_pid=0, url=record.source
    )


def _make_directory(path: Path) -> None:
    """Nothing is mounted there. Raises: CsiError."""
    try:
        path.mkdir(mode=0o750, parents=True, exist_ok=True)
    except OSError as exc:
        raise Internal(f"{path}: cannot be made: {exc.strerror}") from exc

"""The record of a volume as the settings of its mount: what it asks for, and what this node adds. Owns no state."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace

from phfs_csi.config import NodeConfig
from phfs_csi.errors import FailedPrecondition
from phfs_csi.node.records import Records, VolumeRecord
from phfs_csi.node.shares import Shares
from phfs_fuse.config import resolve, values
from phfs_fuse.config.model import MountConfig
from phfs_fuse.config.resolve import GivenValue
from phfs_fuse.errors import StartupError
from phfs_fuse.host import fusemount
from phfs_fuse.launch import preflight
from phfs_fuse.state.journal import Journal


class MountConfigs:
    """Raises everywhere: FailedPrecondition, the recorded settings are not valid."""

    def __init__(self, config: NodeConfig, records: Records, shares: Shares) -> None:
        self._config = config
        self._records = records
        self._shares = shares

    def config(self, record: VolumeRecord) -> MountConfig:
        """Without credentials, which tell neither where its files are nor what it is mounted on."""
        return self._resolve(record).config

    def with_credentials(self, record: VolumeRecord) -> tuple[MountConfig, dict[str, str]]:
        """For a process that asks the store, with the environment of it."""
        config, variables = preflight.with_credentials(self._resolve(record))
        bundle = self._records.ca_file(record)
        ours = {"AWS_CA_BUNDLE": str(bundle)} if bundle else {}
        return config, {**os.environ, **ours, **variables}

    def drain_config(self, record: VolumeRecord) -> tuple[MountConfig, dict[str, str]]:
        """For a process of `phfs_fuse.worker.drain`, with its environment."""
        config, environ = self.with_credentials(record)
        config = replace(config, kernel=replace(config.kernel, mountpoint=config.writeback.directory))
        return config, fusemount.environment(environ)

    def has_leftovers(self, record: VolumeRecord) -> bool:
        """Whether the local state of a volume that is not mounted may have something to upload."""
        return not Journal.is_idle(self.config(record).writeback.directory)

    def _resolve(self, record: VolumeRecord) -> resolve.Resolved:
        share = self._shares.of(record)
        given = {name: GivenValue(raw, name) for name, raw in record.settings.items()}
        given |= _ownership(record.mount_group, given)
        ours: dict[str, str | bool] = {
            "state-dir": str(self._records.directory(record)),
            "cache-dir": str(self._config.cache_dir / record.key),
            "cache-size": str(share.cache_bytes),
            "dirty-max": str(share.dirty_bytes),
            "allow-other": True,
            "read-only": record.read_only,
            "fs-name": record.source,
            "log-level": self._config.log_level,
            "log-format": self._config.log_format,
        }
        if (credentials := self._records.credentials_file(record)) is not None:
            ours["credentials-file"] = str(credentials)
        given = {
            **resolve.from_aws(os.environ),
            **given,
            **{name: GivenValue(raw, name) for name, raw in ours.items()},
        }
        try:
            found = resolve.resolve(record.source, record.path, given)
        except StartupError as exc:
            raise FailedPrecondition(f"{record.volume_id}: {exc}") from exc
        return replace(found, config=replace(found.config, log_name=record.volume_id))


def _ownership(group: int | None, given: Mapping[str, GivenValue]) -> dict[str, GivenValue]:
    """fsGroup as settings: the group owns what names none, and may write. Nothing is changed in the store."""
    if group is None:
        return {}
    umask = _mode("umask", given, 0o022)
    modes = {"file-mode": (0o666 & ~umask, 0o060), "dir-mode": (0o777 & ~umask, 0o2070)}
    found = {"gid": GivenValue(str(group), "gid")}
    for name, (default, more) in modes.items():
        found[name] = GivenValue(f"{_mode(name, given, default) | more:o}", name)
    return found


def _mode(name: str, given: Mapping[str, GivenValue], default: int) -> int:
    return values.mode(given[name].raw) if name in given else default

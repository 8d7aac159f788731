"""Requests, volume context and secrets -> frozen values. Owns no state; everything is hostile until it was here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Final

DRAIN_SECONDS: Final = 60.0


class AccessMode(Enum):
    """Source: CSI spec, VolumeCapability.AccessMode."""

    SINGLE_NODE_WRITER = 1
    SINGLE_NODE_READER_ONLY = 2
    MULTI_NODE_READER_ONLY = 3
    MULTI_NODE_SINGLE_WRITER = 4
    MULTI_NODE_MULTI_WRITER = 5
    SINGLE_NODE_SINGLE_WRITER = 6
    SINGLE_NODE_MULTI_WRITER = 7

    @property
    def read_only(self) -> bool:
        return self in (AccessMode.SINGLE_NODE_READER_ONLY, AccessMode.MULTI_NODE_READER_ONLY)


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """Of one volume. Never shown: `repr` says only which parts are there."""

    access_key: str = field(default="", repr=False)
    secret_key: str = field(default="", repr=False)
    session_token: str = field(default="", repr=False)
    ca_bundle: str = field(default="", repr=False)  # PEM

    def __bool__(self) -> bool:
        return bool(self.access_key or self.ca_bundle)


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeParams:
    """What is mounted and how; the same for every node and pod."""

    volume_id: str
    source: str  # s3://BUCKET/PREFIX/, as `phfs mount` takes it
    settings: Mapping[str, str] = field(default_factory=dict)  # of `config.options`, by name, as -o has them
    credentials: Credentials = Credentials()  # none: those of the plugin's environment
    cache_bytes_max: int | None = None  # the volume's own limit, within its share of the node's
    drain_seconds: float = DRAIN_SECONDS  # how long unstage waits for uploads


@dataclass(frozen=True, slots=True, kw_only=True)
class StageParams:
    """NodeStageVolume."""

    volume: VolumeParams
    staging_target_path: Path
    access_mode: AccessMode
    read_only: bool = False  # by access mode, attribute or mount option: the whole mount refuses changes
    mount_group: int | None = None  # fsGroup of the pod, which becomes the group of all files


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishParams:
    """NodePublishVolume."""

    volume_id: str
    target_path: Path
    access_mode: AccessMode
    read_only: bool = False  # of this pod alone
    mount_group: int | None = None
    staging_target_path: Path | None = None  # None: an inline volume, which is not staged
    inline: VolumeParams | None = None  # the volume of an inline one; else None

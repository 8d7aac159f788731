"""Requests of the Node service -> frozen values. Owns no state; looks at no mount and changes nothing.

Paths are looked at with readlink alone, which asks no file system that the kernel has in memory.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Protocol

from phfs_csi.errors import FailedPrecondition, InvalidArgument, OutOfRange
from phfs_csi.proto import csi_pb2
from phfs_csi.request.attributes import Given, has_controls, parse_volume
from phfs_csi.request.endpoints import Endpoints
from phfs_csi.request.params import DRAIN_SECONDS, AccessMode, PublishParams, StageParams, VolumeParams
from phfs_fuse.config import values
from phfs_fuse.types import ID_MAX, decimal

EPHEMERAL: Final = "csi.storage.k8s.io/ephemeral"
ID_CHARS_MAX: Final = 1024
PATH_BYTES_MAX: Final = 4096
TARGETS: Final = "pods/*/volumes/kubernetes.io~csi/*/mount"  # Source: kubelet, csi_mounter.go
STAGING: Final = "plugins"
_TARGET: Final = re.compile(re.escape(TARGETS).replace(r"\*", "[^/]+"))
_BOOLEAN: Final = "read-only"


class OfVolume(Protocol):
    @property
    def volume_id(self) -> str: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Requests:
    """Raises everywhere: InvalidArgument, which names the field."""

    kubelet_dir: Path
    defaults: Callable[[], Mapping[str, str]] = dict  # the plugin's secret for volumes that bring none
    quota_now: Callable[[VolumeParams], int | None] = lambda volume: None  # of a provisioned volume, may have grown
    drain_seconds: float = DRAIN_SECONDS
    any_target: bool = True  # False: only where a kubelet mounts volumes
    endpoints: Endpoints = field(default_factory=Endpoints)  # of inline volumes

    def stage(self, request: csi_pb2.NodeStageVolumeRequest) -> StageParams:
        volume_id = volume_id_of(request)
        path = self._staging_path(request.staging_target_path)
        mode = access_mode(request.volume_capability)
        given = Given(
            attributes=request.volume_context,
            secrets=request.secrets,
            mount_flags=request.volume_capability.mount.mount_flags,
            defaults=self.defaults(),
        )
        volume = self._with_quota(parse_volume(volume_id, given, drain_seconds=self.drain_seconds))
        return StageParams(
            volume=volume,
            staging_target_path=path,
            access_mode=mode,
            read_only=mode.read_only or _is_read_only(volume),
            mount_group=_mount_group(request.volume_capability),
        )

    def unstage(self, request: csi_pb2.NodeUnstageVolumeRequest) -> tuple[str, Path]:
        return volume_id_of(request), self._staging_path(request.staging_target_path)

    def publish(self, request: csi_pb2.NodePublishVolumeRequest) -> PublishParams:
        """Raises: FailedPrecondition for a volume that is neither staged nor an inline one."""
        volume_id = volume_id_of(request)
        target = self._target_path(request.target_path)
        mode = access_mode(request.volume_capability)
        inline = self._inline(volume_id, request) if is_inline(request) else None
        staging = None if inline else self._staging(request)
        return PublishParams(
            volume_id=volume_id,
            target_path=target,
            access_mode=mode,
            read_only=request.readonly or mode.read_only or (inline is not None and _is_read_only(inline)),
            mount_group=_mount_group(request.volume_capability),
            staging_target_path=staging,
            inline=inline,
        )

    def unpublish(self, request: csi_pb2.NodeUnpublishVolumeRequest) -> tuple[str, Path]:
        return volume_id_of(request), self._target_path(request.target_path)

    def stats(self, request: csi_pb2.NodeGetVolumeStatsRequest) -> tuple[str, Path]:
        """The path is only for looking up what is mounted: it may be any."""
        return volume_id_of(request), _any_path("volume_path", request.volume_path)

    def expand(self, request: csi_pb2.NodeExpandVolumeRequest) -> tuple[str, Path, int]:
        """Volume, path as in `stats`, the size that is asked for in bytes; 0: none."""
        return (
            volume_id_of(request),
            _any_path("volume_path", request.volume_path),
            capacity(request.capacity_range)[0],
        )

    def _staging(self, request: csi_pb2.NodePublishVolumeRequest) -> Path:
        if not request.staging_target_path:
            raise FailedPrecondition("staging_target_path is missing: the volume is to be staged first")
        return self._staging_path(request.staging_target_path)

    def _inline(self, volume_id: str, request: csi_pb2.NodePublishVolumeRequest) -> VolumeParams:
        """The volume that a pod brings along: whoever may start one writes it, so it gets nothing of the plugin's
        own. Raises: PermissionDenied for an endpoint that it may not use."""
        flags = request.volume_capability.mount.mount_flags
        given = Given(attributes=request.volume_context, secrets=request.secrets, mount_flags=flags)
        volume = parse_volume(volume_id, given, drain_seconds=self.drain_seconds)
        if not volume.credentials.access_key:
            raise InvalidArgument("an inline volume needs nodePublishSecretRef with an access key and a secret key")
        self.endpoints.require(volume.settings.get("endpoint-url", ""))
        return volume

    def _with_quota(self, volume: VolumeParams) -> VolumeParams:
        """The context of a volume has the size that it was made with."""
        quota_bytes = self.quota_now(volume)
        if quota_bytes is None:
            return volume
        others = {name: text for name, text in volume.settings.items() if name != "quota"}
        return replace(volume, settings={**others, "quota": str(quota_bytes)} if quota_bytes else others)

    def _target_path(self, text: str) -> Path:
        """Of a pod's volume, an inline one too."""
        path = self._path("target_path", text)
        if not self.any_target and not _TARGET.fullmatch(str(path.relative_to(self.kubelet_dir))):
            raise InvalidArgument(f"target_path: not {self.kubelet_dir}/{TARGETS}")
        return path

    def _staging_path(self, text: str) -> Path:
        path = self._path("staging_target_path", text)
        if not self.any_target and not path.is_relative_to(self.kubelet_dir / STAGING):
            raise InvalidArgument(f"staging_target_path: not below {self.kubelet_dir / STAGING}")
        return path

    def _path(self, name: str, text: str) -> Path:
        """A path strictly below the kubelet's directory that goes through no symbolic link of its own."""
        path = _any_path(name, text)
        if ".." in text.split("/") or not path.is_relative_to(self.kubelet_dir) or path == self.kubelet_dir:
            raise InvalidArgument(f"{name}: not below {self.kubelet_dir}")
        for part in (path, *path.parents):
            if part == self.kubelet_dir:
                break
            if _is_symlink(part):
                raise InvalidArgument(f"{name}: goes through a symbolic link")
        return path


def volume_id_of(request: OfVolume) -> str:
    """Raises: InvalidArgument when it is missing, too long or unprintable."""
    text = request.volume_id
    if not text:
        raise InvalidArgument("volume_id is missing")
    if len(text) > ID_CHARS_MAX or has_controls(text):
        raise InvalidArgument("volume_id: control characters, or too long")
    return text


def access_mode(capability: csi_pb2.VolumeCapability) -> AccessMode:
    """Raises: InvalidArgument when the capability is missing, or one that a tree of files does not have."""
    kind = capability.WhichOneof("access_type")
    if kind is None:
        raise InvalidArgument("volume_capability is missing, or says neither mount nor block")
    if kind == "block":
        raise InvalidArgument("volume_capability: no block devices here, only mounts")
    try:
        return AccessMode(capability.access_mode.mode)
    except ValueError:
        raise InvalidArgument("volume_capability: the access mode is missing or not known") from None


def capacity(size: csi_pb2.CapacityRange) -> tuple[int, int]:
    """Bytes that are required and the limit; 0: none. Raises: OutOfRange, InvalidArgument."""
    if size.required_bytes < 0 or size.limit_bytes < 0:
        raise InvalidArgument("capacity_range: below 0")
    if 0 < size.limit_bytes < size.required_bytes:
        raise OutOfRange("capacity_range: limit_bytes is below required_bytes")
    return size.required_bytes, size.limit_bytes


def is_inline(request: csi_pb2.NodePublishVolumeRequest) -> bool:
    return request.volume_context.get(EPHEMERAL, "") == "true"


def _is_read_only(volume: VolumeParams) -> bool:
    return bool(values.boolean(volume.settings.get(_BOOLEAN, "false")))


def _mount_group(capability: csi_pb2.VolumeCapability) -> int | None:
    text = capability.mount.volume_mount_group
    if not text:
        return None
    if (number := decimal(text, ID_MAX)) is None:
        raise InvalidArgument("volume_capability: volume_mount_group is no group id")
    return number


def _any_path(name: str, text: str) -> Path:
    if not text:
        raise InvalidArgument(f"{name} is missing")
    if has_controls(text) or len(os.fsencode(text)) > PATH_BYTES_MAX:
        raise InvalidArgument(f"{name}: control characters, or too long")
    return Path(text)


def _is_symlink(path: Path) -> bool:
    """Without asking the file system that may be mounted there. Source: readlink(2), EINVAL for what is no link."""
    try:
        os.readlink(path)
    except OSError:
        return False
    return True

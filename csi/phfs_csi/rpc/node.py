"""The Node service: requests of the kubelet to calls on the volumes, and back. Owns no state but the composition."""

from __future__ import annotations

import logging
from typing import Any, Final

import grpc

from phfs_csi.config import NodeConfig
from phfs_csi.errors import NotFound
from phfs_csi.handover.lifecycle import Door, Lifecycle
from phfs_csi.metrics import VolumeState, VolumeStatus
from phfs_csi.node.mounter import Mounter, State
from phfs_csi.node.records import Records, VolumeRecord
from phfs_csi.node.volumes import Volumes
from phfs_csi.proto import csi_pb2, csi_pb2_grpc
from phfs_csi.request.node_requests import Requests

log = logging.getLogger(__name__)

CALL_SECONDS: Final = 110.0  # of a call without a deadline; the kubelet gives 2 min
ANSWER_SECONDS: Final = 3.0  # are kept for the answer
_Rpc = csi_pb2.NodeServiceCapability.RPC
CAPABILITIES: Final = (
    _Rpc.STAGE_UNSTAGE_VOLUME,
    _Rpc.GET_VOLUME_STATS,
    _Rpc.EXPAND_VOLUME,
    _Rpc.VOLUME_CONDITION,
    _Rpc.SINGLE_NODE_MULTI_WRITER,
    _Rpc.VOLUME_MOUNT_GROUP,
)


# A kubelet takes an answer without any usage for an error, and the condition of the volume with it.
NO_USAGE = csi_pb2.VolumeUsage(unit=csi_pb2.VolumeUsage.BYTES)


class NodeService(csi_pb2_grpc.NodeServicer):
    def __init__(
        self,
        config: NodeConfig,
        requests: Requests,
        records: Records,
        mounter: Mounter,
        volumes: Volumes,
        life: Lifecycle,
    ) -> None:
        self._life = life
        self._config = config
        self._requests = requests
        self._records = records
        self._mounter = mounter
        self._volumes = volumes
        self._usage: dict[str, list[csi_pb2.VolumeUsage]] = {}  # by volume, as it was last seen

    # --- its life: see `lifecycle.Lifecycle`

    def start(self, door: Door) -> bool:
        return self._life.start(door)

    def stop(self) -> None:
        self._life.stop()

    def ready(self) -> str:
        return self._life.ready()

    def is_succeeded(self) -> bool:
        return self._life.is_succeeded

    def volumes(self) -> list[VolumeStatus]:
        return [self._status(record) for record in self._records.volumes()]

    def _status(self, record: VolumeRecord) -> VolumeStatus:
        status = self._mounter.status(record)
        pending = status["pending"] if status else None
        return VolumeStatus(
            volume_id=record.volume_id,
            state=VolumeState.DRAINING if record.is_ended else VolumeState.MOUNTED,
            pending_files=pending["files"] + pending["deletes"] if pending else None,
            pending_bytes=pending["bytes"] if pending else None,
            starts=status["starts"] if status else None,
            refused=len(status["refused"]) if status and "refused" in status else self._records.refused(record),
        )

    # --- the calls

    def NodeStageVolume(
        self, request: csi_pb2.NodeStageVolumeRequest, context: grpc.ServicerContext
    ) -> csi_pb2.NodeStageVolumeResponse:
        self._volumes.stage(self._requests.stage(request), _seconds(context))
        return csi_pb2.NodeStageVolumeResponse()

    def NodeUnstageVolume(
        self, request: csi_pb2.NodeUnstageVolumeRequest, context: grpc.ServicerContext
    ) -> csi_pb2.NodeUnstageVolumeResponse:
        volume_id, path = self._requests.unstage(request)
        self._volumes.unstage(volume_id, path, _seconds(context))
        self._usage.pop(volume_id, None)
        return csi_pb2.NodeUnstageVolumeResponse()

    def NodePublishVolume(
        self, request: csi_pb2.NodePublishVolumeRequest, context: grpc.ServicerContext
    ) -> csi_pb2.NodePublishVolumeResponse:
        self._volumes.publish(self._requests.publish(request), _seconds(context))
        return csi_pb2.NodePublishVolumeResponse()

    def NodeUnpublishVolume(
        self, request: csi_pb2.NodeUnpublishVolumeRequest, context: grpc.ServicerContext
    ) -> csi_pb2.NodeUnpublishVolumeResponse:
        self._volumes.unpublish(*self._requests.unpublish(request), _seconds(context))
        return csi_pb2.NodeUnpublishVolumeResponse()

    def NodeGetVolumeStats(
        self, request: csi_pb2.NodeGetVolumeStatsRequest, context: grpc.ServicerContext
    ) -> csi_pb2.NodeGetVolumeStatsResponse:
        volume_id, path = self._requests.stats(request)
        record = self._at(volume_id, path)
        problem = _problem(self._mounter.status(record))
        if self._mounter.state(record) is not State.SERVED:
            message = "the mount is not served; it is being taken up again"
            return _stats(self._usage.get(volume_id, [NO_USAGE]), abnormal=True, message=message)
        usage = self._mounter.usage(path)
        bytes_, inodes = csi_pb2.VolumeUsage.BYTES, csi_pb2.VolumeUsage.INODES
        seen = self._usage[volume_id] = [
            csi_pb2.VolumeUsage(unit=bytes_, total=usage.total, used=usage.used, available=usage.available),
            csi_pb2.VolumeUsage(unit=inodes, total=usage.inodes, used=usage.inodes_used, available=usage.inodes_free),
        ]
        return _stats(seen, abnormal=bool(problem), message=problem or "mounted")

    def _at(self, volume_id: str, path: Any) -> VolumeRecord:
        """The volume if it is mounted or bound there. Raises: NotFound."""
        record = self._records.mounted(volume_id)
        if record is None:
            raise NotFound(f"{volume_id}: is not mounted here")
        if path != record.path and path not in [target.path for target in self._records.targets(record)]:
            raise NotFound(f"{volume_id}: is not mounted at {path}")
        return record

    def NodeExpandVolume(
        self, request: csi_pb2.NodeExpandVolumeRequest, context: grpc.ServicerContext
    ) -> csi_pb2.NodeExpandVolumeResponse:
        volume_id, path, size = self._requests.expand(request)
        self._at(volume_id, path)
        if size:
            self._volumes.expand(volume_id, size)
        return csi_pb2.NodeExpandVolumeResponse(capacity_bytes=size)

    def NodeGetCapabilities(
        self, request: csi_pb2.NodeGetCapabilitiesRequest, context: grpc.ServicerContext
    ) -> csi_pb2.NodeGetCapabilitiesResponse:
        found = [csi_pb2.NodeServiceCapability(rpc=_Rpc(type=kind)) for kind in CAPABILITIES]
        return csi_pb2.NodeGetCapabilitiesResponse(capabilities=found)

    def NodeGetInfo(
        self, request: csi_pb2.NodeGetInfoRequest, context: grpc.ServicerContext
    ) -> csi_pb2.NodeGetInfoResponse:
        return csi_pb2.NodeGetInfoResponse(node_id=self._config.node_id)


def _seconds(context: grpc.ServicerContext) -> float:
    left = context.time_remaining()
    return CALL_SECONDS if left is None or left > CALL_SECONDS else max(1.0, left - ANSWER_SECONDS)


def _problem(status: Any) -> str:
    if status is None:
        return "the mount does not answer; it is being restarted"
    if status["store"]["state"] != "ok":
        return f"the store does not answer; {status['pending']['files']} files wait for upload"
    if status["errors"]:
        return f"{len(status['errors'])} files cannot be uploaded: {status['errors'][0]['reason']}"
    return ""


def _stats(usage: list[csi_pb2.VolumeUsage], *, abnormal: bool, message: str) -> csi_pb2.NodeGetVolumeStatsResponse:
    condition = csi_pb2.VolumeCondition(abnormal=abnormal, message=message)
    return csi_pb2.NodeGetVolumeStatsResponse(usage=usage, volume_condition=condition)

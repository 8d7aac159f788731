"""The shares of the server's threads: who waits for a store, or for uploads, keeps nobody else waiting."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest

from phfs_csi.errors import Aborted, ResourceExhausted
from phfs_csi.proto import csi_pb2
from phfs_csi.request.node_requests import EPHEMERAL
from phfs_csi.rpc.admission import INLINE_MAX, MAX, OF_ONE_VOLUME_MAX, THREADS, Admission, Kind


def stage(volume: str) -> csi_pb2.NodeStageVolumeRequest:
    return csi_pb2.NodeStageVolumeRequest(volume_id=volume)


def inline(volume: str) -> csi_pb2.NodePublishVolumeRequest:
    return csi_pb2.NodePublishVolumeRequest(volume_id=volume, volume_context={EPHEMERAL: "true"})


def refused(admission: Admission, method: str, request: Any) -> bool:
    try:
        with admission.hold(method, request):
            return False
    except (Aborted, ResourceExhausted):
        return True


def test_inline_volumes_use_up_their_own_share_alone() -> None:
    admission = Admission()
    with ExitStack() as stack:
        for number in range(INLINE_MAX):
            stack.enter_context(admission.hold("NodePublishVolume", inline(f"csi-{number}")))
        with pytest.raises(ResourceExhausted):
            stack.enter_context(admission.hold("NodePublishVolume", inline("csi-more")))
        publish = csi_pb2.NodePublishVolumeRequest(volume_id="vol")
        assert not refused(admission, "NodePublishVolume", publish)
        assert not refused(admission, "NodeStageVolume", stage("vol"))
        assert not refused(admission, "NodeUnpublishVolume", csi_pb2.NodeUnpublishVolumeRequest(volume_id="csi-1"))
    assert not refused(admission, "NodePublishVolume", inline("csi-more"))


def test_one_volume_uses_up_its_own_share_alone() -> None:
    admission = Admission()
    with ExitStack() as stack:
        for _ in range(OF_ONE_VOLUME_MAX):
            stack.enter_context(admission.hold("NodeStageVolume", stage("vol")))
        with pytest.raises(Aborted):
            stack.enter_context(admission.hold("NodeStageVolume", stage("vol")))
        assert not refused(admission, "NodeStageVolume", stage("other"))
        assert not refused(admission, "NodeUnstageVolume", csi_pb2.NodeUnstageVolumeRequest(volume_id="vol"))


@pytest.mark.parametrize(
    ("method", "request_of"),
    [
        ("NodeStageVolume", stage),
        ("NodeUnstageVolume", lambda volume: csi_pb2.NodeUnstageVolumeRequest(volume_id=volume)),
        ("NodeGetVolumeStats", lambda volume: csi_pb2.NodeGetVolumeStatsRequest(volume_id=volume)),
        ("CreateVolume", lambda volume: csi_pb2.CreateVolumeRequest(name=volume)),
    ],
)
def test_each_kind_of_call_leaves_threads_to_the_others(method: str, request_of: Any) -> None:
    admission = Admission()
    with ExitStack() as stack:
        count = 0
        while count < THREADS and not refused(admission, method, request_of(f"vol-{count}")):
            stack.enter_context(admission.hold(method, request_of(f"vol-{count}")))
            count += 1
        assert count in MAX.values()
        assert sum(MAX.values()) < THREADS
        kind_of_others = {"NodeStageVolume", "NodeUnstageVolume", "NodeGetVolumeStats"} - {method}
        free = [name for name in kind_of_others if not refused(admission, name, stage("other"))]
        assert len(free) >= len(Kind) - 1
        assert not refused(admission, "Probe", csi_pb2.ProbeRequest())

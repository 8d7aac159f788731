"""Tables of calls to the Node service, over its socket, with a mounter that only remembers."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import StatusCode

from phfs_csi.config import INLINE_MAX, NodeConfig
from phfs_csi.errors import FailedPrecondition, Unavailable
from phfs_csi.handover.lifecycle import Lifecycle
from phfs_csi.metrics import Metrics, VolumeState
from phfs_csi.node.drains import Drains
from phfs_csi.node.forkserver_client import ForkServer
from phfs_csi.node.records import Records
from phfs_csi.node.upkeep import Upkeep
from phfs_csi.node.volumes import Volumes
from phfs_csi.proto import csi_pb2, csi_pb2_grpc
from phfs_csi.request.node_requests import EPHEMERAL, Requests
from phfs_csi.rpc.node import CAPABILITIES, NodeService
from phfs_csi.rpc.server import PluginServer
from tests.csi.fake_mounter import FakeMounter, NothingLeft

SECONDS = 60.0
SECRET = "s3cr3t-that-nobody-may-see"
SECRETS = {"accessKey": "AKIA", "secretKey": SECRET}
CONTEXT = {"bucket": "b-1", "prefix": "x"}
Mode = csi_pb2.VolumeCapability.AccessMode


def capability(mode: int = Mode.MULTI_NODE_MULTI_WRITER, group: str = "") -> csi_pb2.VolumeCapability:
    mount = csi_pb2.VolumeCapability.MountVolume(volume_mount_group=group)
    return csi_pb2.VolumeCapability(mount=mount, access_mode={"mode": mode})


class Caller:
    """Calls with what a kubelet sends, changed as the test says."""

    def __init__(self, socket: Path, kubelet: Path) -> None:
        self.kubelet = kubelet
        self.staging = kubelet / "staging"
        self._socket = socket

    def call(self, method: str, request: Any) -> tuple[StatusCode, Any]:
        with grpc.insecure_channel(f"unix:{self._socket}") as channel:
            try:
                return StatusCode.OK, getattr(csi_pb2_grpc.NodeStub(channel), method)(request, timeout=SECONDS)
            except grpc.RpcError as exc:
                return exc.code(), exc.details()

    def stage(self, volume_id: str = "vol", **changes: Any) -> StatusCode:
        fields = {
            "volume_id": volume_id,
            "staging_target_path": str(self.staging if volume_id == "vol" else self.kubelet / volume_id),
            "volume_capability": capability(),
            "volume_context": CONTEXT,
            "secrets": SECRETS,
        }
        return self.call("NodeStageVolume", csi_pb2.NodeStageVolumeRequest(**{**fields, **changes}))[0]

    def publish(self, pod: str = "pod", **changes: Any) -> StatusCode:
        fields = {
            "volume_id": "vol",
            "staging_target_path": str(self.staging),
            "target_path": str(self.kubelet / pod),
            "volume_capability": capability(),
            "volume_context": CONTEXT,
        }
        return self.call("NodePublishVolume", csi_pb2.NodePublishVolumeRequest(**{**fields, **changes}))[0]

    def unpublish(self, pod: str = "pod", **changes: Any) -> StatusCode:
        fields = {"volume_id": "vol", "target_path": str(self.kubelet / pod)}
        return self.call("NodeUnpublishVolume", csi_pb2.NodeUnpublishVolumeRequest(**{**fields, **changes}))[0]

    def unstage(self, **changes: Any) -> StatusCode:
        fields = {"volume_id": "vol", "staging_target_path": str(self.staging)}
        return self.call("NodeUnstageVolume", csi_pb2.NodeUnstageVolumeRequest(**{**fields, **changes}))[0]

    def stats(self, **changes: Any) -> tuple[StatusCode, Any]:
        fields = {"volume_id": "vol", "volume_path": str(self.kubelet / "pod")}
        return self.call("NodeGetVolumeStats", csi_pb2.NodeGetVolumeStatsRequest(**{**fields, **changes}))


@pytest.fixture
def mounter() -> FakeMounter:
    return FakeMounter()


@contextmanager
def serving(root: Path, mounter: FakeMounter, inline_max: int = INLINE_MAX) -> Iterator[NodeService]:
    """The plugin as `open_node` puts it together, but for the mounter, and without what goes on between calls."""
    config = NodeConfig(node_id="node-1", kubelet_dir=root / "kubelet", state_dir=root / "state")
    config.kubelet_dir.mkdir(exist_ok=True)
    records = Records(config.state_dir / "volumes")
    records.read()
    drains = Drains(records, NothingLeft())
    volumes = Volumes(records, mounter, drains, inline_max)
    upkeep = Upkeep(records, mounter, drains, volumes)
    requests = Requests(kubelet_dir=config.kubelet_dir)
    node = NodeService(config, requests, records, mounter, volumes, Lifecycle(config, upkeep, ForkServer()))
    server = PluginServer(
        root / "csi.sock", [lambda to: csi_pb2_grpc.add_NodeServicer_to_server(node, to)], Metrics(node)
    )
    server.open_door()
    try:
        yield node
    finally:
        server.stop()


@pytest.fixture
def node(tmp_path: Path, mounter: FakeMounter) -> Iterator[NodeService]:
    with serving(tmp_path, mounter) as found:
        yield found


@pytest.fixture
def kubelet(tmp_path: Path, node: NodeService) -> Caller:
    return Caller(tmp_path / "csi.sock", tmp_path / "kubelet")


OK = StatusCode.OK


def test_the_order_of_a_kubelet(kubelet: Caller, mounter: FakeMounter) -> None:
    assert kubelet.stage() is OK
    assert mounter.mounted[kubelet.staging].source == "s3://b-1/x/"
    assert kubelet.publish("pod-1") is OK
    assert kubelet.publish("pod-2", readonly=True) is OK
    assert mounter.bound == {
        kubelet.kubelet / "pod-1": (kubelet.staging, False),
        kubelet.kubelet / "pod-2": (kubelet.staging, True),
    }
    assert kubelet.unpublish("pod-1") is OK
    assert kubelet.unpublish("pod-2") is OK
    assert kubelet.unstage() is OK
    assert (mounter.mounted, mounter.bound, mounter.ended) == ({}, {}, ["vol"])


def test_every_call_may_be_repeated(kubelet: Caller, mounter: FakeMounter) -> None:
    for call in (kubelet.stage, kubelet.publish, kubelet.unpublish, kubelet.unstage):
        assert [call(), call()] == [OK, OK]
    assert mounter.ended == ["vol"]


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"volume_context": {"bucket": "b-1", "prefix": "y"}}, StatusCode.ALREADY_EXISTS),
        ({"volume_context": {**CONTEXT, "uid": "7"}}, StatusCode.ALREADY_EXISTS),
        ({"volume_capability": capability(Mode.MULTI_NODE_READER_ONLY)}, StatusCode.ALREADY_EXISTS),
        ({"volume_capability": capability(group="7")}, StatusCode.ALREADY_EXISTS),
        ({"secrets": {"accessKey": "B", "secretKey": "b"}}, OK),  # rotated
    ],
)
def test_a_volume_that_is_staged_otherwise(kubelet: Caller, changes: dict[str, Any], code: StatusCode) -> None:
    assert kubelet.stage() is OK
    assert kubelet.stage(**changes) is code


def test_a_volume_is_staged_at_one_place(kubelet: Caller) -> None:
    kubelet.stage()
    assert kubelet.stage(staging_target_path=str(kubelet.kubelet / "other")) is StatusCode.FAILED_PRECONDITION


def test_a_pod_without_fsgroup_is_served_by_a_mount_that_has_one(kubelet: Caller, mounter: FakeMounter) -> None:
    """A kubelet that starts again stages for whichever pod it meets first."""
    assert kubelet.stage(volume_capability=capability(group="7")) is OK
    assert kubelet.stage() is OK
    assert kubelet.stage(volume_capability=capability(group="7")) is OK
    assert kubelet.publish("pod-1", volume_capability=capability(group="7")) is OK
    assert kubelet.publish("pod-2") is OK


def test_no_volume_takes_the_place_of_another(kubelet: Caller, mounter: FakeMounter) -> None:
    kubelet.stage()
    kubelet.publish()
    kubelet.stage("other")
    staged, target = kubelet.staging, kubelet.kubelet / "pod"
    before = dict(mounter.mounted), dict(mounter.bound)
    inline = {"volume_context": {**CONTEXT, EPHEMERAL: "true"}, "secrets": SECRETS}
    other = {"volume_id": "other", "staging_target_path": str(kubelet.kubelet / "other")}
    for path in (str(staged), str(target)):
        codes = [
            kubelet.stage("third", staging_target_path=path),
            kubelet.publish(**{**other, "target_path": path}),
            kubelet.publish(**{**inline, "volume_id": "third", "target_path": path}),
            kubelet.unpublish(volume_id="other", target_path=path),
            kubelet.unstage(volume_id="third", staging_target_path=path),
        ]
        assert codes == [StatusCode.FAILED_PRECONDITION] * 5
    assert kubelet.publish(target_path=str(staged)) is StatusCode.FAILED_PRECONDITION
    assert kubelet.unpublish(target_path=str(staged)) is StatusCode.FAILED_PRECONDITION
    assert (mounter.mounted, mounter.bound) == before


def test_a_target_that_cannot_be_bound_again_stops_no_other(
    kubelet: Caller, mounter: FakeMounter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mount had died with all its targets, and something is in the way of one of them."""
    kubelet.stage()
    for pod in ("bad", "good"):
        kubelet.publish(pod)
    mounter.mounted.clear()
    mounter.bound.clear()
    bind = mounter.bind

    def picky(record: Any, target: Path, *, read_only: bool) -> None:
        if target.name == "bad":
            raise FailedPrecondition(f"{target}: something else is mounted here")
        bind(record, target, read_only=read_only)

    monkeypatch.setattr(mounter, "bind", picky)
    assert kubelet.publish("new") is OK
    assert {path.name for path in mounter.bound} == {"good", "new"}


def test_what_has_to_come_first(kubelet: Caller) -> None:
    assert kubelet.publish() is StatusCode.FAILED_PRECONDITION
    assert kubelet.publish(staging_target_path="") is StatusCode.FAILED_PRECONDITION
    kubelet.stage()
    kubelet.publish()
    assert kubelet.unstage() is StatusCode.FAILED_PRECONDITION


def test_a_target_that_is_published_otherwise(kubelet: Caller) -> None:
    kubelet.stage()
    assert kubelet.publish() is OK
    assert kubelet.publish(readonly=True) is StatusCode.ALREADY_EXISTS


def test_a_volume_of_one_pod_alone(kubelet: Caller) -> None:
    single = {"volume_capability": capability(Mode.SINGLE_NODE_SINGLE_WRITER)}
    assert kubelet.stage(**single) is OK
    assert kubelet.publish("pod-1", **single) is OK
    assert kubelet.publish("pod-1", **single) is OK
    assert kubelet.publish("pod-2", **single) is StatusCode.FAILED_PRECONDITION


def test_an_inline_volume(kubelet: Caller, mounter: FakeMounter) -> None:
    inline = {"volume_context": {**CONTEXT, EPHEMERAL: "true"}, "staging_target_path": ""}
    assert kubelet.publish(**inline) is StatusCode.INVALID_ARGUMENT
    assert kubelet.publish(**inline, secrets=SECRETS) is OK
    assert kubelet.publish(**inline, secrets=SECRETS) is OK
    assert len(mounter.mounted) == 1
    assert kubelet.unpublish() is OK
    assert (mounter.mounted, mounter.bound, mounter.ended) == ({}, {}, ["vol"])


def inline(volume_id: str, **more: str) -> dict[str, Any]:
    context = {**CONTEXT, EPHEMERAL: "true", **more}
    return {"volume_id": volume_id, "volume_context": context, "staging_target_path": "", "secrets": SECRETS}


def test_a_node_has_a_limit_of_inline_volumes(tmp_path: Path, mounter: FakeMounter) -> None:
    kubelet = Caller(tmp_path / "csi.sock", tmp_path / "kubelet")
    with serving(tmp_path, mounter, inline_max=2):
        assert [kubelet.publish(f"pod-{i}", **inline(f"csi-{i}")) for i in (1, 2)] == [OK, OK]
        assert kubelet.publish("pod-3", **inline("csi-3")) is StatusCode.RESOURCE_EXHAUSTED
        assert kubelet.publish("pod-1", **inline("csi-1")) is OK  # the same call again
        assert kubelet.stage() is OK  # no inline volume
        assert kubelet.unpublish("pod-2", volume_id="csi-2") is OK
        assert kubelet.publish("pod-3", **inline("csi-3")) is OK


def test_inline_volumes_that_are_being_mounted_count(tmp_path: Path, mounter: FakeMounter) -> None:
    kubelet = Caller(tmp_path / "csi.sock", tmp_path / "kubelet")
    codes: list[StatusCode] = []
    mounter.before_mount = lambda record: codes.append(kubelet.publish("pod-2", **inline("csi-2")))
    with serving(tmp_path, mounter, inline_max=1):
        assert kubelet.publish("pod-1", **inline("csi-1")) is OK
    assert codes == [StatusCode.RESOURCE_EXHAUSTED]


def test_inline_volumes_can_be_turned_off(tmp_path: Path, mounter: FakeMounter) -> None:
    kubelet = Caller(tmp_path / "csi.sock", tmp_path / "kubelet")
    with serving(tmp_path, mounter, inline_max=0):
        assert kubelet.publish("pod-1", **inline("csi-1")) is StatusCode.FAILED_PRECONDITION
        assert kubelet.stage() is OK


def test_an_unpublish_takes_off_what_the_records_know_alone(kubelet: Caller, mounter: FakeMounter) -> None:
    unbound: list[Path] = []
    mounter.unbind = unbound.append  # type: ignore[method-assign]
    (kubelet.kubelet / "other").mkdir()
    assert kubelet.unpublish("other") is OK
    assert not (kubelet.kubelet / "other").exists()  # empty, and nothing is mounted there
    (kubelet.kubelet / "full" / "x").mkdir(parents=True)
    assert kubelet.unpublish("full") is StatusCode.INTERNAL
    assert unbound == []
    assert [kubelet.stage(), kubelet.publish(), kubelet.unpublish()] == [OK] * 3
    assert unbound == [kubelet.kubelet / "pod"]


def test_what_is_not_there(kubelet: Caller) -> None:
    assert kubelet.unpublish() is OK
    assert kubelet.unstage() is OK
    assert kubelet.stats()[0] is StatusCode.NOT_FOUND
    kubelet.stage()
    assert kubelet.stats(volume_path="some/path")[0] is StatusCode.NOT_FOUND
    expand = csi_pb2.NodeExpandVolumeRequest(volume_id="other", volume_path="some/path")
    assert kubelet.call("NodeExpandVolume", expand)[0] is StatusCode.NOT_FOUND


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("stage", {"volume_id": ""}),
        ("stage", {"staging_target_path": ""}),
        ("stage", {"staging_target_path": "/etc"}),
        ("stage", {"volume_capability": csi_pb2.VolumeCapability()}),
        ("stage", {"volume_context": {"bukcet": "b-1"}}),
        ("stage", {"secrets": {"accessKey": "AKIA"}}),
        ("publish", {"volume_id": ""}),
        ("publish", {"target_path": ""}),
        ("publish", {"target_path": "/etc/cron.d"}),
        ("publish", {"staging_target_path": "/etc"}),
        ("publish", {"volume_capability": csi_pb2.VolumeCapability()}),
        ("unpublish", {"volume_id": ""}),
        ("unpublish", {"target_path": ""}),
        ("unpublish", {"target_path": "/etc"}),
        ("unstage", {"volume_id": ""}),
        ("unstage", {"staging_target_path": ""}),
        ("unstage", {"staging_target_path": "/"}),
    ],
)
def test_calls_that_are_refused_do_nothing(
    kubelet: Caller, mounter: FakeMounter, method: str, changes: dict[str, Any]
) -> None:
    if method != "stage":
        kubelet.stage()
        kubelet.publish("other-pod")
    before = dict(mounter.mounted), dict(mounter.bound)
    fields = {"volume_id": "vol", **changes} if method == "stage" else changes
    assert getattr(kubelet, method)(**fields) is StatusCode.INVALID_ARGUMENT
    assert (mounter.mounted, mounter.bound) == before


def test_a_mount_that_fails_may_be_tried_again(kubelet: Caller, mounter: FakeMounter, node: NodeService) -> None:
    def fail(record: object) -> None:
        raise Unavailable("the store does not answer")

    mounter.before_mount = fail
    assert kubelet.stage() is StatusCode.UNAVAILABLE
    assert node.volumes() == []
    mounter.before_mount = lambda record: None
    assert kubelet.stage() is OK


def test_crossed_calls_on_one_volume_are_aborted_and_others_go_on(kubelet: Caller, mounter: FakeMounter) -> None:
    begun, go_on, codes = threading.Event(), threading.Event(), []

    def wait(record: Any) -> None:
        if record.volume_id == "vol":
            begun.set()
            assert go_on.wait(SECONDS)

    mounter.before_mount = wait
    first = threading.Thread(target=lambda: codes.append(kubelet.stage()))
    first.start()
    assert begun.wait(SECONDS)
    crossed = [kubelet.stage, kubelet.publish, kubelet.unpublish, kubelet.unstage]
    callers = [threading.Thread(target=lambda call=call: codes.append(call())) for call in crossed]
    for caller in callers:
        caller.start()
    assert kubelet.stage("other") is OK
    for caller in callers:
        caller.join(SECONDS)
    assert codes == [StatusCode.ABORTED] * 4
    go_on.set()
    first.join(SECONDS)
    assert codes[4:] == [OK]


def test_a_plugin_that_starts_again_knows_its_volumes(tmp_path: Path, mounter: FakeMounter) -> None:
    kubelet = Caller(tmp_path / "csi.sock", tmp_path / "kubelet")
    with serving(tmp_path, mounter):
        kubelet.stage()
        kubelet.publish()
    with serving(tmp_path, mounter):
        assert kubelet.publish() is OK  # a kubelet that starts again asks for what is mounted
        assert kubelet.stage(volume_context={**CONTEXT, "uid": "7"}) is StatusCode.ALREADY_EXISTS
        assert kubelet.unpublish() is OK
        assert kubelet.unstage() is OK
    assert mounter.mounted == {}


def test_statistics(kubelet: Caller, mounter: FakeMounter, node: NodeService) -> None:
    kubelet.stage()
    kubelet.publish()
    _, found = kubelet.stats()
    assert [(usage.total, usage.used, usage.available) for usage in found.usage] == [(100, 30, 70), (10, 3, 7)]
    assert not found.volume_condition.abnormal
    (told,) = node.volumes()
    assert (told.volume_id, told.state, told.starts) == ("vol", VolumeState.MOUNTED, 1)
    assert (told.pending_files, told.pending_bytes) == (3, 5)
    mounter.answer = None
    assert kubelet.stats()[1].volume_condition.abnormal
    (told,) = node.volumes()
    assert (told.pending_files, told.pending_bytes) == (None, None)
    mounter.mounted.clear()
    found = kubelet.stats()[1]
    assert found.volume_condition.abnormal
    assert [(usage.total, usage.used) for usage in found.usage] == [(100, 30), (10, 3)]  # as it was last seen


def test_statistics_of_a_mount_that_was_never_seen(kubelet: Caller, mounter: FakeMounter) -> None:
    kubelet.stage()
    kubelet.publish()
    mounter.mounted.clear()
    found = kubelet.stats()[1]
    assert found.volume_condition.abnormal
    assert [(usage.unit, usage.total) for usage in found.usage] == [(csi_pb2.VolumeUsage.BYTES, 0)]


def test_what_the_node_says_of_itself(kubelet: Caller) -> None:
    found = kubelet.call("NodeGetCapabilities", csi_pb2.NodeGetCapabilitiesRequest())[1].capabilities
    assert [item.rpc.type for item in found] == list(CAPABILITIES)
    assert kubelet.call("NodeGetInfo", csi_pb2.NodeGetInfoRequest())[1].node_id == "node-1"


def test_no_secret_in_the_log_nor_on_disk_but_in_its_place(
    kubelet: Caller, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = {
        "remote": "s3",
        "remotePath": "b-1",
        "s3-endpoint": "http://minio:9000",
        "s3-access-key-id": "AKIA",
        "s3-secret-access-key": SECRET,
    }
    with caplog.at_level(logging.DEBUG):
        assert kubelet.stage() is OK
        assert kubelet.stage("plain", volume_context=plain, secrets={}) is OK
        assert kubelet.stage("bad", secrets={"secretKey": SECRET}) is StatusCode.INVALID_ARGUMENT
        assert kubelet.publish(secrets=SECRETS) is OK
        kubelet.stats()
        kubelet.unpublish()
        files = [path for path in (tmp_path / "state").rglob("*") if path.is_file()]
        told = [path for path in files if SECRET in path.read_text()]
        assert {path.name for path in told} == {"credentials"}
        assert {path.stat().st_mode & 0o777 for path in told} == {0o600}
        kubelet.unstage()
    assert SECRET not in caplog.text
    assert "NodeStageVolume" in caplog.text
    left = [path for path in (tmp_path / "state").rglob("credentials") if SECRET in path.read_text()]
    assert len(left) == 1  # of the one that is still staged

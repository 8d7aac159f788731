"""The server over a real gRPC socket: codes, log, counters, and who owns the socket."""

from __future__ import annotations

import logging
import os
import stat
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
from grpc import StatusCode

from phfs_csi import errors
from phfs_csi.metrics import Metrics, VolumeState, VolumeStatus, parse_address, serving
from phfs_csi.proto import csi_pb2, csi_pb2_grpc
from phfs_csi.rpc import admission
from phfs_csi.rpc.identity import IdentityService, fuse_problem
from phfs_csi.rpc.server import Node, PluginServer, not_ready
from phfs_csi.rpc.sockets import SocketFile
from phfs_fuse.errors import AccessDenied, ConfigError, LocalStateError, StoreUnavailable, UsageError

SECRET = "s3cr3t-that-nobody-may-see"
SECONDS = 60.0


class FakeNode(csi_pb2_grpc.NodeServicer):
    """Does what the test says."""

    def __init__(self) -> None:
        self.act: Callable[[], None] = lambda: None

    def NodeStageVolume(
        self, request: csi_pb2.NodeStageVolumeRequest, context: Any
    ) -> csi_pb2.NodeStageVolumeResponse:
        self.act()
        return csi_pb2.NodeStageVolumeResponse()

    def volumes(self) -> Sequence[VolumeStatus]:
        mounted = VolumeStatus(
            volume_id="a", state=VolumeState.MOUNTED, pending_files=2, pending_bytes=5, refused=1, starts=3
        )
        draining = VolumeStatus(
            volume_id="b", state=VolumeState.DRAINING, pending_files=None, pending_bytes=9, refused=0, starts=None
        )
        return [mounted, draining]


@pytest.fixture
def node() -> FakeNode:
    return FakeNode()


@pytest.fixture
def metrics(node: FakeNode) -> Metrics:
    return Metrics(node)


@pytest.fixture
def server(tmp_path: Path, node: FakeNode, metrics: Metrics) -> Iterator[PluginServer]:
    with opened(tmp_path, node, metrics) as found:
        yield found


@contextmanager
def opened(tmp_path: Path, node: FakeNode, metrics: Metrics) -> Iterator[PluginServer]:
    about = IdentityService("phfs.test", lambda: found.problem(), controller=True)
    found = PluginServer(
        tmp_path / "csi.sock",
        [
            lambda to: csi_pb2_grpc.add_NodeServicer_to_server(node, to),
            lambda to: csi_pb2_grpc.add_IdentityServicer_to_server(about, to),
        ],
        metrics,
    )
    found.open_door()
    try:
        yield found
    finally:
        found.stop()


@contextmanager
def channel(tmp_path: Path) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(f"unix:{tmp_path / 'csi.sock'}") as found:
        yield found


def stage(tmp_path: Path, **fields: Any) -> tuple[StatusCode, str]:
    request = csi_pb2.NodeStageVolumeRequest(**fields)
    with channel(tmp_path) as to:
        try:
            csi_pb2_grpc.NodeStub(to).NodeStageVolume(request, timeout=SECONDS)
        except grpc.RpcError as exc:
            return exc.code(), exc.details() or ""
    return StatusCode.OK, ""


OUTCOMES: Sequence[tuple[Exception, StatusCode, str]] = [
    (errors.InvalidArgument("a: b"), StatusCode.INVALID_ARGUMENT, "a: b"),
    (errors.NotFound("x"), StatusCode.NOT_FOUND, "x"),
    (errors.AlreadyExists("x"), StatusCode.ALREADY_EXISTS, "x"),
    (errors.Aborted("x"), StatusCode.ABORTED, "x"),
    (errors.FailedPrecondition("x"), StatusCode.FAILED_PRECONDITION, "x"),
    (errors.OutOfRange("x"), StatusCode.OUT_OF_RANGE, "x"),
    (errors.ResourceExhausted("x"), StatusCode.RESOURCE_EXHAUSTED, "x"),
    (errors.DeadlineExceeded("x"), StatusCode.DEADLINE_EXCEEDED, "x"),
    (UsageError("x"), StatusCode.INVALID_ARGUMENT, "x"),
    (LocalStateError("full"), StatusCode.FAILED_PRECONDITION, "full"),
    (AccessDenied("list", "b"), StatusCode.PERMISSION_DENIED, "list b"),
    (StoreUnavailable("list", "b"), StatusCode.UNAVAILABLE, "list b"),
    (
        ValueError("the details of a bug"),
        StatusCode.INTERNAL,
        "internal error of the plugin, its log has the details",
    ),
    (OSError(5, "a bug too"), StatusCode.INTERNAL, "internal error of the plugin, its log has the details"),
]


@pytest.mark.parametrize(("error", "code", "details"), OUTCOMES)
def test_errors_and_their_codes(
    server: PluginServer,
    node: FakeNode,
    metrics: Metrics,
    tmp_path: Path,
    error: Exception,
    code: StatusCode,
    details: str,
) -> None:
    def fail() -> None:
        raise error

    node.act = fail
    assert stage(tmp_path, volume_id="v") == (code, details)
    labels = {"method": "NodeStageVolume", "code": code.name}
    assert metrics.registry.get_sample_value("phfs_csi_requests_total", labels) == 1


def test_a_method_that_is_not_there_is_unimplemented(server: PluginServer, tmp_path: Path) -> None:
    with channel(tmp_path) as to, pytest.raises(grpc.RpcError) as failure:
        csi_pb2_grpc.NodeStub(to).NodeExpandVolume(csi_pb2.NodeExpandVolumeRequest(), timeout=SECONDS)
    assert failure.value.code() is StatusCode.UNIMPLEMENTED
    with channel(tmp_path) as to, pytest.raises(grpc.RpcError) as failure:
        csi_pb2_grpc.ControllerStub(to).CreateVolume(csi_pb2.CreateVolumeRequest(), timeout=SECONDS)
    assert failure.value.code() is StatusCode.UNIMPLEMENTED


def test_the_log_tells_the_call_and_no_secret(
    server: PluginServer, node: FakeNode, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise errors.NotFound("line\nforged")

    fields = {
        "volume_id": "vol\nforged",
        "staging_target_path": "/var/lib/kubelet/x",
        "secrets": {"secretKey": SECRET},
        "volume_context": {"s3-secret-access-key": SECRET},
        "publish_context": {"token": SECRET},
    }
    with caplog.at_level(logging.DEBUG):
        stage(tmp_path, **fields)
        node.act = fail
        stage(tmp_path, **fields)
    lines = [record.getMessage() for record in caplog.records if "NodeStageVolume" in record.getMessage()]
    assert len(lines) == 2
    assert "volume_id='vol\\nforged' staging_target_path=/var/lib/kubelet/x code=OK" in lines[0]
    assert "code=NOT_FOUND" in lines[1]
    assert not any("\n" in line for line in lines)
    assert SECRET not in caplog.text


def test_a_bug_is_told_to_the_log_alone(
    server: PluginServer, node: FakeNode, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise KeyError("where it was")

    node.act = fail
    _, details = stage(tmp_path)
    assert "where it was" not in details
    assert "where it was" in caplog.text


def test_identity(server: PluginServer, tmp_path: Path) -> None:
    with channel(tmp_path) as to:
        about = csi_pb2_grpc.IdentityStub(to)
        assert about.GetPluginInfo(csi_pb2.GetPluginInfoRequest(), timeout=SECONDS).name == "phfs.test"
        found = about.GetPluginCapabilities(csi_pb2.GetPluginCapabilitiesRequest(), timeout=SECONDS).capabilities
        assert [item.WhichOneof("type") for item in found] == ["volume_expansion", "service"]
        assert about.Probe(csi_pb2.ProbeRequest(), timeout=SECONDS).ready.value
        (tmp_path / "csi.sock").unlink()  # the connection is still there
        assert not about.Probe(csi_pb2.ProbeRequest(), timeout=SECONDS).ready.value


def test_fuse_is_usable_or_the_reason_is_told(tmp_path: Path) -> None:
    (tmp_path / "fuse").touch()
    assert fuse_problem(tmp_path / "fuse") == ""
    assert "No such file" in fuse_problem(tmp_path / "none")


def test_the_socket_is_for_its_owner_alone(server: PluginServer, tmp_path: Path) -> None:
    found = (tmp_path / "csi.sock").stat()
    assert stat.S_ISSOCK(found.st_mode)
    assert stat.S_IMODE(found.st_mode) == 0o600
    assert os.listdir(tmp_path) == ["csi.sock"]


def test_a_successor_takes_the_path_and_keeps_it(server: PluginServer, node: FakeNode, tmp_path: Path) -> None:
    server.close_door()
    assert (tmp_path / "csi.sock").exists()  # the kubelet is not to forget the driver
    assert server.problem()
    with opened(tmp_path, node, Metrics()) as successor:
        server.stop()
        assert stage(tmp_path)[0] is StatusCode.OK
        assert successor.problem() == ""
    assert not (tmp_path / "csi.sock").exists()


def test_the_door_opens_again_when_the_successor_does_not_make_it(server: PluginServer, tmp_path: Path) -> None:
    server.close_door()
    assert stage(tmp_path)[0] is StatusCode.UNAVAILABLE
    server.open_door()
    server.open_door()
    assert stage(tmp_path)[0] is StatusCode.OK
    assert server.problem() == ""


def test_a_closing_door_waits_for_the_call_at_work(server: PluginServer, node: FakeNode, tmp_path: Path) -> None:
    begun, go_on, codes = threading.Event(), threading.Event(), []

    def wait() -> None:
        begun.set()
        assert go_on.wait(SECONDS)

    node.act = wait
    caller = threading.Thread(target=lambda: codes.append(stage(tmp_path)[0]))
    caller.start()
    assert begun.wait(SECONDS)
    closing = threading.Thread(target=server.close_door)
    closing.start()
    go_on.set()
    caller.join(SECONDS)
    closing.join(SECONDS)
    assert codes == [StatusCode.OK]


def test_calls_that_wait_for_one_volume_keep_nobody_else_waiting(
    server: PluginServer, node: FakeNode, tmp_path: Path
) -> None:
    begun, go_on, codes = threading.Semaphore(0), threading.Event(), []

    def wait() -> None:
        begun.release()
        assert go_on.wait(SECONDS)

    node.act = wait
    callers = [
        threading.Thread(target=lambda: codes.append(stage(tmp_path)[0])) for _ in range(admission.OF_ONE_VOLUME_MAX)
    ]
    for caller in callers:
        caller.start()
    assert all(begun.acquire(timeout=SECONDS) for _ in callers)
    try:
        assert stage(tmp_path)[0] is StatusCode.ABORTED
        with channel(tmp_path) as to:
            assert csi_pb2_grpc.IdentityStub(to).Probe(csi_pb2.ProbeRequest(), timeout=SECONDS)
    finally:
        go_on.set()
        for caller in callers:
            caller.join(SECONDS)
    assert codes == [StatusCode.OK] * admission.OF_ONE_VOLUME_MAX


class Role:
    """A node as far as its readiness goes."""

    def __init__(self, problem: str = "", *, succeeded: bool = False) -> None:
        self._problem, self._succeeded = problem, succeeded

    def ready(self) -> str:
        return self._problem

    def is_succeeded(self) -> bool:
        return self._succeeded


def test_what_a_readiness_probe_hears(server: PluginServer) -> None:
    def ask(node: Role | None, fuse: str = "") -> str:
        return not_ready(cast("Node | None", node), server, lambda: fuse)

    assert ask(None) == ask(Role()) == ""
    assert ask(Role("starting")) == "starting"
    assert ask(Role(), "no fuse") == "no fuse"
    server.close_door()
    assert "another plugin" in ask(Role())
    assert ask(Role("another pod has taken over", succeeded=True)) == ""  # else its pod would be deleted at once


def test_a_path_where_nobody_can_listen(tmp_path: Path) -> None:
    for path in (tmp_path / "missing" / "csi.sock", tmp_path / ("x" * 120)):
        with pytest.raises(LocalStateError, match=str(path)):
            SocketFile(path).bind(grpc.server(None))
    assert os.listdir(tmp_path) == []


# --- HTTP


def get(port: int, path: str) -> tuple[int, str]:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://127.0.0.1:{port}{path}", timeout=SECONDS) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as exc:
        with exc:
            return exc.code, exc.read().decode()


def test_metrics_and_probes_over_http(metrics: Metrics) -> None:
    reasons = [""]
    metrics.answered("NodeStageVolume", "OK", 0.2)
    with serving("127.0.0.1:0", metrics, lambda: reasons[0]) as port:
        assert get(port, "/healthz") == (200, "ok\n")
        assert get(port, "/readyz") == (200, "ok\n")
        reasons[0] = "/dev/fuse: No such file or directory"
        assert get(port, "/readyz") == (503, "/dev/fuse: No such file or directory\n")
        assert get(port, "/healthz")[0] == 200
        assert get(port, "/other")[0] == 404
        status, text = get(port, "/metrics")
    assert status == 200
    for line in (
        'phfs_csi_volumes{state="mounted"} 1.0',
        'phfs_csi_volumes{state="draining"} 1.0',
        'phfs_csi_pending_files{state="mounted",volume="a"} 2.0',
        'phfs_csi_pending_bytes{state="draining",volume="b"} 9.0',
        'phfs_csi_refused_changes{state="mounted",volume="a"} 1.0',
        'phfs_csi_pending_files{state="draining",volume="b"} NaN',  # not known is not 0
        'phfs_csi_worker_starts_total{volume="a"} 3.0',
        'phfs_csi_requests_total{code="OK",method="NodeStageVolume"} 1.0',
        'phfs_csi_request_seconds_bucket{le="0.25",method="NodeStageVolume"} 1.0',
    ):
        assert line in text.splitlines()


@pytest.mark.parametrize(
    ("text", "address"), [(":9808", ("", 9808)), ("0.0.0.0:1", ("0.0.0.0", 1)), ("[::1]:2", ("::1", 2))]
)
def test_addresses(text: str, address: tuple[str, int]) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize("text", ["9808", "host:", "host:http", "host:70000"])
def test_addresses_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="metrics-address"):
        parse_address(text)

"""The pod of the DaemonSet, run as its manifest says it: what it is given is what it needs.

The kubelet's part (registration, calls, kills) is played here.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

grpc = pytest.importorskip("grpc", reason="grpcio is in the extra `csi`")
pytest.importorskip("phfs_csi.rpc.node", reason="the plugin is not in this checkout")

from phfs_csi.proto import csi_pb2, csi_pb2_grpc, pluginregistration_pb2, pluginregistration_pb2_grpc  # noqa: E402

# isort: split
from phfs_fuse.host.mount_table import mount_table  # noqa: E402
from tests.csi.deploy.test_deploy import DEPLOY, VARIANTS, Object, base, chart, example, of_kind, pods  # noqa: E402
from tests.csi.pod import Pod, a_node  # noqa: E402
from tests.support.mounts import s3_client, shared_server  # noqa: E402

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.skipif(os.geteuid() != 0, reason="namespaces and mounts of a node need root"),
]

SECONDS = 120.0  # of a machine that does other things, too
DRIVER = "phfs.csi.primehub.io"
KUBELET = Path("/var/lib/kubelet")
STAGING = KUBELET / "plugins/kubernetes.io/csi/abc/globalmount"
TARGET = KUBELET / "pods/1/volumes/kubernetes.io~csi/data/mount"
VOLUME = "data"
CAPABILITY = csi_pb2.VolumeCapability(
    mount=csi_pb2.VolumeCapability.MountVolume(),
    access_mode=csi_pb2.VolumeCapability.AccessMode(mode=csi_pb2.VolumeCapability.AccessMode.MULTI_NODE_MULTI_WRITER),
)


@dataclass
class Kubelet:
    """What the kubelet of the node does with the pod."""

    pod: Pod
    bucket: str
    port: int
    driver: str = DRIVER

    def sees(self, path: Path) -> Path:
        return self.pod.on_node(path)

    def wait(self, what: Callable[[], Any]) -> Any:
        """What is found, once it is. Errors of what is not there yet count as not found."""
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            try:
                if found := what():
                    return found
            except (grpc.RpcError, urllib.error.URLError, OSError):
                pass
            time.sleep(0.05)  # the only way to learn of another process's readiness
        raise AssertionError(self.pod.log())

    def register(self) -> Path:
        """As the kubelet does with a socket that it finds; returns where the CSI socket is."""
        path = self.sees(KUBELET / "plugins_registry" / f"{self.driver}-reg.sock")
        self.wait(path.exists)
        with grpc.insecure_channel(f"unix:{path}") as channel:
            stub = pluginregistration_pb2_grpc.RegistrationStub(channel)
            info = self.wait(lambda: stub.GetInfo(pluginregistration_pb2.InfoRequest(), timeout=SECONDS))
            stub.NotifyRegistrationStatus(
                pluginregistration_pb2.RegistrationStatus(plugin_registered=True), timeout=SECONDS
            )
        assert (info.type, info.name, list(info.supported_versions)) == ("CSIPlugin", self.driver, ["1.0.0"])
        return self.sees(Path(info.endpoint))

    def probe(self, path: str) -> int:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=SECONDS) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as exc:
            return exc.code

    def is_ready(self) -> bool:
        return self.probe("/readyz") == 200

    def call(self, name: str, request: Any) -> Any:
        path = self.sees(KUBELET / "plugins" / self.driver / "csi.sock")
        with grpc.insecure_channel(f"unix:{path}") as channel:
            return getattr(csi_pb2_grpc.NodeStub(channel), name)(request, timeout=SECONDS)

    def stage(self, attributes: Mapping[str, str] | None = None) -> None:
        self.sees(STAGING).mkdir(parents=True)
        self.call(
            "NodeStageVolume",
            csi_pb2.NodeStageVolumeRequest(
                volume_id=VOLUME,
                staging_target_path=str(STAGING),
                volume_capability=CAPABILITY,
                volume_context=attributes or {"bucket": self.bucket, "prefix": "groups/research/"},
            ),
        )

    def publish(self) -> Path:
        self.sees(TARGET).parent.mkdir(parents=True)
        self.call(
            "NodePublishVolume",
            csi_pb2.NodePublishVolumeRequest(
                volume_id=VOLUME,
                staging_target_path=str(STAGING),
                target_path=str(TARGET),
                volume_capability=CAPABILITY,
            ),
        )
        return self.sees(TARGET)

    def take_back(self) -> None:
        self.call(
            "NodeUnpublishVolume", csi_pb2.NodeUnpublishVolumeRequest(volume_id=VOLUME, target_path=str(TARGET))
        )
        self.call(
            "NodeUnstageVolume",
            csi_pb2.NodeUnstageVolumeRequest(volume_id=VOLUME, staging_target_path=str(STAGING)),
        )


@dataclass
class Cluster:
    """One node, and the pods that run there. The store comes from the Secret phfs-store."""

    node: Path
    bucket: str
    ends: ExitStack

    def run(self, found: Sequence[Object] = (), kind: str = "DaemonSet", *containers: str) -> Kubelet:
        """Start containers of one more pod, of the base or of other manifests."""
        found = found or base()
        server = shared_server()
        secret = {"accessKey": server.access_key, "secretKey": server.secret_key}
        secret |= {"endpoint": server.endpoint_url, "region": "us-east-1"}
        with closing(socket.create_server(("127.0.0.1", 0))) as listener:
            port = listener.getsockname()[1]
        replaced = {"--metrics-address=0.0.0.0:9808": f"--metrics-address=127.0.0.1:{port}"}
        [spec] = pods(of_kind(found, kind))
        pod = Pod(self.node, spec, {"phfs-store": secret}, replaced)
        self.ends.callback(pod.end)
        for name in containers or ("holder", "plugin"):
            pod.start(name)
        return Kubelet(pod, self.bucket, port)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    bucket = f"pod-{uuid.uuid4().hex[:8]}"
    s3_client(shared_server()).create_bucket(Bucket=bucket)
    with a_node() as node, ExitStack() as ends:
        yield Cluster(node, bucket, ends)


@pytest.fixture
def kubelet(cluster: Cluster) -> Kubelet:
    """A pod that runs and is registered."""
    kubelet = cluster.run()
    kubelet.register()
    return kubelet


def program(script: str, *arguments: Path) -> subprocess.Popen[str]:
    """A program of a pod. It waits for a line on its input where the script says so."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


WRITER = """
import sys
file = open(sys.argv[1], "w")
file.write("before\\n"); file.flush()
print("open", flush=True)
sys.stdin.readline()
file.write("after\\n"); file.close()
print("closed", flush=True)
"""


def test_the_probes_answer(kubelet: Kubelet) -> None:
    assert kubelet.register() == kubelet.sees(KUBELET / "plugins" / DRIVER / "csi.sock")
    kubelet.wait(kubelet.is_ready)
    assert kubelet.probe("/healthz") == 200


def test_a_pod_s_open_file_outlives_the_plugin_s_container(kubelet: Kubelet) -> None:
    """Mounted where the node sees it, with the credentials of the mounted Secret; kill -9 of the container is a
    pause; nothing is left in the end."""
    kubelet.stage()
    target = kubelet.publish()
    assert str(target) in mount_table()
    with program(WRITER, target / "file") as writer:
        assert writer.stdout is not None
        assert writer.stdin is not None
        assert writer.stdout.readline() == "open\n", kubelet.pod.log()
        kubelet.pod.kill("plugin")
        kubelet.pod.start("plugin")
        writer.stdin.write("\n")
        writer.stdin.flush()
        assert writer.stdout.readline() == "closed\n", kubelet.pod.log()
    kubelet.register()
    kubelet.wait(lambda: kubelet.take_back() or True)
    body = s3_client(shared_server()).get_object(Bucket=kubelet.bucket, Key="groups/research/file")["Body"].read()
    assert body == b"before\nafter\n"
    assert {path for path in mount_table() if Path(path).is_relative_to(kubelet.pod.node)} == {str(kubelet.pod.node)}


def test_the_holder_may_be_started_again_too(kubelet: Kubelet) -> None:
    kubelet.stage()
    target = kubelet.publish()
    kubelet.pod.kill("holder")
    kubelet.pod.start("holder")
    with program("open(__import__('sys').argv[1], 'w').write('x')", target / "other") as writer:
        assert writer.wait(SECONDS) == 0, kubelet.pod.log()
    kubelet.wait(lambda: kubelet.take_back() or True)
    assert str(target) not in mount_table()


BUSY = """
import os, select, sys
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
count = 0
print("busy", flush=True)
while not select.select([sys.stdin], [], [], 0.01)[0]:
    assert os.pwrite(fd, b"%06d" % count, 0) == 6
    assert os.pread(fd, 6, 0) == b"%06d" % count
    assert os.path.basename(sys.argv[1]) in os.listdir(os.path.dirname(sys.argv[1]))
    count += 1
os.fsync(fd)
print("done", flush=True)
"""


@contextmanager
def busy_with(path: Path, kubelet: Kubelet) -> Iterator[None]:
    """A program that writes, reads and lists all the time; fails when one of its calls does."""
    with program(BUSY, path) as busy:
        assert busy.stdout is not None
        assert busy.stdin is not None
        assert busy.stdout.readline() == "busy\n", kubelet.pod.log()
        yield
        busy.stdin.write("\n")
        busy.stdin.flush()
        assert busy.stdout.readline() == "done\n", kubelet.pod.log()


def test_an_upgrade_hands_the_mounts_to_the_new_pod(cluster: Cluster, kubelet: Kubelet) -> None:
    """The order of a DaemonSet with maxSurge: a new pod beside the old one, which ends when the new one is ready."""
    kubelet.stage()
    target = kubelet.publish()
    with busy_with(target / "busy", kubelet):
        new = cluster.run()

        def is_ready() -> bool:
            kubelet.pod.keep_running()
            assert kubelet.is_ready(), "Kubernetes deletes an old pod that is not ready"
            return new.is_ready()

        new.wait(is_ready)
        assert kubelet.pod.delete() == [], new.pod.log()
        new.register()
    new.wait(lambda: new.take_back() or True)
    assert str(target) not in mount_table()


@pytest.mark.slow
def test_an_upgrade_that_is_undone_leaves_all_as_it_was(cluster: Cluster, kubelet: Kubelet) -> None:
    """The new plugin does not start at all; its holder has taken the connections already, and ends with its pod. The
    old one holds them again afterwards: the death of its plugin is a pause, as before."""
    kubelet.stage()
    target = kubelet.publish()
    with busy_with(target / "busy", kubelet):
        new = cluster.run(base(), "DaemonSet", "holder")
        new.wait(lambda: "took over mounts=1" in new.pod.log())
        assert new.pod.delete(grace_seconds=5) == ["holder"], "it goes on as long as it may"
        kubelet.wait(lambda: kubelet.pod.log().count("holds name=") >= 2)
        kubelet.pod.kill("plugin")
        kubelet.pod.start("plugin")
    kubelet.register()
    kubelet.wait(lambda: kubelet.take_back() or True)
    assert str(target) not in mount_table()


def test_the_controller_makes_and_deletes_volumes_without_any_right(cluster: Cluster) -> None:
    """As user 1000, without capabilities, on a read-only root, with the credentials of the mounted Secret."""
    controller = cluster.run(base(), "Deployment", "plugin")
    controller.wait(controller.is_ready)
    asked = csi_pb2.CreateVolumeRequest(
        name="pvc-1",
        volume_capabilities=[CAPABILITY],
        capacity_range=csi_pb2.CapacityRange(required_bytes=1 << 30),
        parameters={
            "bucket": cluster.bucket,
            "prefixTemplate": "volumes/${pvc.namespace}/${pvc.name}",
            "csi.storage.k8s.io/pvc/name": "results",
            "csi.storage.k8s.io/pvc/namespace": "default",
            "csi.storage.k8s.io/pv/name": "pvc-1",
        },
    )
    with grpc.insecure_channel(f"unix:{controller.pod.volume('sockets')}/csi.sock") as channel:
        stub = csi_pb2_grpc.ControllerStub(channel)
        made = stub.CreateVolume(asked, timeout=SECONDS).volume
        assert made.volume_context["prefix"] == "volumes/default/results/"
        stub.DeleteVolume(csi_pb2.DeleteVolumeRequest(volume_id=made.volume_id), timeout=SECONDS)
    assert controller.pod.delete() == []


def test_primehub_s_volume_of_csi_rclone_is_served_as_it_is(cluster: Cluster) -> None:
    """The plugin under csi-rclone's name, the attributes of PrimeHub's chart with the keys in them."""
    kubelet = cluster.run(chart(*VARIANTS["csi-rclone"], release="phfs-csi-rclone"))
    kubelet.driver = "csi-rclone"
    kubelet.register()
    server = shared_server()
    [volume] = example(DEPLOY / "examples" / "csi-rclone" / "existing-volume.yaml")
    attributes = {
        **volume["spec"]["csi"]["volumeAttributes"],
        "remotePath": cluster.bucket,
        "s3-endpoint": server.endpoint_url,
        "s3-access-key-id": server.access_key,
        "s3-secret-access-key": server.secret_key,
    }
    kubelet.stage(attributes)
    target = kubelet.publish() / "groups" / "research"
    with program("import os, sys; os.makedirs(sys.argv[1]); open(sys.argv[1] + '/f', 'w').write('x')", target) as pod:
        assert pod.wait(SECONDS) == 0, kubelet.pod.log()
    kubelet.take_back()
    body = s3_client(server).get_object(Bucket=cluster.bucket, Key="groups/research/f")["Body"].read()
    assert body == b"x"

"""The plugin as a process of its own, called over its gRPC socket as the kubelet does it.

Owns the process, its mounts and its folders; nothing of them is left, however the test ended. Nothing here touches a
file of a mount: programs that do are children with a deadline.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc

from phfs_csi.proto import csi_pb2, csi_pb2_grpc
from phfs_fuse.host.locks import keeper_of
from phfs_fuse.host.mount_table import mount_table
from phfs_fuse.host.processes import ended
from tests.support.mounts import s3_client, shared_server
from tests.support.servers import Server

SECONDS = 60.0
DRIVER = "phfs.csi.primehub.io"
WRITER = csi_pb2.VolumeCapability.AccessMode.MULTI_NODE_MULTI_WRITER


def capability(mode: int = WRITER, *, flags: tuple[str, ...] = (), group: str = "") -> csi_pb2.VolumeCapability:
    return csi_pb2.VolumeCapability(
        mount=csi_pb2.VolumeCapability.MountVolume(mount_flags=flags, volume_mount_group=group),
        access_mode=csi_pb2.VolumeCapability.AccessMode(mode=mode),  # type: ignore[arg-type]
    )


class Holder:
    """`phfs-csi hold`."""

    def __init__(self, path: Path, log: Path) -> None:
        self.path, self.log = path, log
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "phfs_csi", "hold", f"--socket={self.path}"], stdout=output, stderr=output
            )
        return process

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(SECONDS)

    def restart(self) -> None:
        self.process = self._start()


class Plugin:
    """One plugin process with a kubelet directory, state and cache of its own. More of them may share these."""

    def __init__(self, root: Path, server: Server, *flags: str) -> None:
        self.root, self.server = root, server
        self.kubelet = root / "kubelet"
        self.state, self.cache, self.run = root / "state", root / "cache", root / "run"
        self.socket = root / "csi.sock"
        self.log_path = root / "plugin.log"
        self.flags = flags
        self.process: subprocess.Popen[bytes] | None = None
        self.kubelet.mkdir(exist_ok=True)

    # --- its process

    def start(self, *flags: str, wait: bool = True) -> None:
        command = [sys.executable, "-m", "phfs_csi", "node", f"--endpoint=unix://{self.socket}", "--node-id=node-1"]
        command += [f"--kubelet-dir={self.kubelet}", f"--state-dir={self.state}", f"--cache-dir={self.cache}"]
        command += ["--no-register", "--cache-size=1G", "--dirty-max=1G", *self.flags, *flags]
        environ = {**os.environ, "PHFS_RUNTIME_DIR": str(self.run), "AWS_EC2_METADATA_DISABLED": "true"}
        before = _inode(self.socket)
        with self.log_path.open("ab") as output:
            self.process = subprocess.Popen(command, env=environ, stdout=output, stderr=output)
        if wait:
            self._wait_for(lambda: _inode(self.socket) not in (None, before))
            self.wait_ready()

    def wait_ready(self) -> None:
        self._wait_for(self.is_ready)

    def is_ready(self) -> bool:
        with suppress(grpc.RpcError):
            return bool(self.call("Probe", csi_pb2.ProbeRequest(), seconds=5).ready.value)
        return False

    def _wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert self.process is not None
            assert self.process.poll() is None, self.log()
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.05)  # the only way to learn of another process's readiness

    def kill(self) -> None:
        """kill -9 the plugin alone."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(SECONDS)

    def kill_container(self) -> None:
        """kill -9 the plugin with all that it has started, as the end of its container does."""
        self.kill()
        for pid in self.keepers():
            for child in children(pid):
                with suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            assert ended(pid, SECONDS)

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(SECONDS)

    def keepers(self) -> list[int]:
        found = (keeper_of(path) for path in self.state.glob("volumes/*/*/mount-*.json"))
        return [pid for pid in found if pid]

    def log(self) -> str:
        logs = [self.log_path, *sorted(self.state.glob("volumes/*/*/log"))]
        return "\n".join(f"--- {path}\n{path.read_text(errors='replace')}" for path in logs if path.exists())

    # --- its calls

    def call(self, name: str, request: Any, *, seconds: float = SECONDS) -> Any:
        kind = "Identity" if name in ("Probe", "GetPluginInfo", "GetPluginCapabilities") else "Node"
        with grpc.insecure_channel(f"unix:{self.socket}") as channel:
            stub = getattr(csi_pb2_grpc, f"{kind}Stub")(channel)
            return getattr(stub, name)(request, timeout=seconds)

    def code(self, name: str, request: Any, *, seconds: float = SECONDS) -> str:
        """The name of the gRPC code of a call."""
        try:
            self.call(name, request, seconds=seconds)
        except grpc.RpcError as exc:
            return str(exc.code().name)  # type: ignore[attr-defined]
        return "OK"


class Volume:
    """A volume and the calls for it, in the kubelet's words."""

    def __init__(self, plugin: Plugin, bucket: str, name: str = "vol", **attributes: str) -> None:
        self.plugin, self.name, self.bucket = plugin, name, bucket
        self.prefix = attributes.get("prefix", f"groups/{name}/")
        self.attributes = {
            "bucket": bucket,
            "prefix": self.prefix,
            "endpoint": plugin.server.endpoint_url,
            "region": "us-east-1",
            **attributes,
        }
        self.secrets = {"accessKey": plugin.server.access_key, "secretKey": plugin.server.secret_key}
        self.staging = plugin.kubelet / "plugins/kubernetes.io/csi" / DRIVER / name / "globalmount"

    def target(self, pod: str) -> Path:
        return self.plugin.kubelet / "pods" / pod / "volumes/kubernetes.io~csi" / self.name / "mount"

    def stage_request(self, **changes: Any) -> csi_pb2.NodeStageVolumeRequest:
        self.staging.mkdir(parents=True, exist_ok=True)
        fields: dict[str, Any] = {
            "volume_id": self.name,
            "staging_target_path": str(self.staging),
            "volume_capability": capability(),
            "secrets": self.secrets,
            "volume_context": self.attributes,
        }
        return csi_pb2.NodeStageVolumeRequest(**fields | changes)

    def publish_request(self, pod: str = "pod-1", **changes: Any) -> csi_pb2.NodePublishVolumeRequest:
        self.target(pod).parent.mkdir(parents=True, exist_ok=True)
        fields: dict[str, Any] = {
            "volume_id": self.name,
            "staging_target_path": str(self.staging),
            "target_path": str(self.target(pod)),
            "volume_capability": capability(),
            "volume_context": self.attributes,
        }
        return csi_pb2.NodePublishVolumeRequest(**fields | changes)

    def unpublish_request(self, pod: str = "pod-1") -> csi_pb2.NodeUnpublishVolumeRequest:
        return csi_pb2.NodeUnpublishVolumeRequest(volume_id=self.name, target_path=str(self.target(pod)))

    def unstage_request(self) -> csi_pb2.NodeUnstageVolumeRequest:
        return csi_pb2.NodeUnstageVolumeRequest(volume_id=self.name, staging_target_path=str(self.staging))

    def stage(self, **changes: Any) -> None:
        self.plugin.call("NodeStageVolume", self.stage_request(**changes))

    def publish(self, pod: str = "pod-1", **changes: Any) -> Path:
        self.plugin.call("NodePublishVolume", self.publish_request(pod, **changes))
        return self.target(pod)

    def unpublish(self, pod: str = "pod-1") -> None:
        self.plugin.call("NodeUnpublishVolume", self.unpublish_request(pod))

    def unstage(self) -> None:
        self.plugin.call("NodeUnstageVolume", self.unstage_request())

    def object(self, name: str) -> bytes:
        body: bytes = (
            s3_client(self.plugin.server).get_object(Bucket=self.bucket, Key=self.prefix + name)["Body"].read()
        )
        return body


def sh(script: str, *arguments: str | Path, seconds: float = SECONDS) -> str:
    """Output of a shell script that must succeed, in a process of its own."""
    done = subprocess.run(
        ["sh", "-euc", script, "sh", *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def mounts_below(root: Path) -> list[str]:
    return [path for path in mount_table() if path.startswith(f"{root}/")]


@contextmanager
def a_plugin(*flags: str, server: Server | None = None, environ: Mapping[str, str] = {}) -> Iterator[Plugin]:
    """A plugin that serves. At the end it and all that it has started is ended."""
    root = Path(tempfile.mkdtemp(prefix="phfs-csi-"))
    plugin = Plugin(root, server or shared_server(), *flags)
    try:
        plugin.start()
        yield plugin
    finally:
        clean_up(plugin)


def clean_up(plugin: Plugin) -> None:
    for process in [plugin.process]:
        if process is not None and process.poll() is None:
            process.terminate()
            try:
                process.wait(SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(SECONDS)
    keepers = plugin.keepers()
    for path in sorted(mounts_below(plugin.root), reverse=True):
        for _ in range(5):
            if path in mount_table():
                with suppress(subprocess.TimeoutExpired):
                    subprocess.run(["umount", "-l", path], timeout=20, capture_output=True)
    for pid in keepers:
        if not ended(pid, 20):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    if not mounts_below(plugin.root):
        shutil.rmtree(plugin.root, ignore_errors=True)


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []

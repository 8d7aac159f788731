"""The command: what it says of itself, and that its environment counts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from phfs_csi.proto import csi_pb2, csi_pb2_grpc
from tests.csi.kubelet import Kubelet, eventually
from tests.support import servers
from tests.support.servers import Server

SECONDS = 60.0
SECRET = "s3cr3t-that-nobody-may-see"


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "phfs_csi", *words]


def run(*words: str, environ: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **(environ or {})}
    return subprocess.run(command(*words), env=env, capture_output=True, text=True, timeout=SECONDS)


@contextmanager
def running(log: Path, words: Sequence[str], environ: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as output:
        process = subprocess.Popen(command(*words), env={**os.environ, **environ}, stdout=output, stderr=output)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def is_ready(endpoint: str) -> bool:
    return run("probe", f"--endpoint={endpoint}").returncode == 0


def test_version() -> None:
    done = run("--version")
    assert done.returncode == 0
    assert done.stdout.startswith("phfs-csi ")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["node", "--cache-size=much"], "--cache-size"),
        (["node", "--drain-timeout=soon"], "--drain-timeout"),
        (["node", "--kubelet-dir=relative"], "--kubelet-dir"),
        (["node", "--driver-name=a/b"], "--driver-name"),
        (["node", "--endpoint=csi.sock"], "--endpoint"),
        (["node", "--log-level=loud"], "--log-level"),
        (["controller", "--log-format=xml"], "--log-format"),
        (["controller", "--metrics-address=here"], "--metrics-address"),
        (["probe", "--endpoint=unix:///nowhere/csi.sock"], "no answer"),
        (["fly"], "fly"),
    ],
)
def test_mistakes_are_one_line_with_the_flag(words: list[str], named: str) -> None:
    done = run(*words)
    assert done.returncode != 0
    assert named in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("phfs-csi: ")


def test_without_the_extra_it_says_what_to_install() -> None:
    code = "import sys; sys.modules['grpc'] = None; from phfs_csi.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "controller"], capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 1
    assert done.stderr == "phfs-csi: grpc is missing: pip install 'phfs-fuse[csi]'\n"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with servers.moto() as found:
        yield found


def test_a_controller_from_start_to_term(tmp_path: Path, server: Server) -> None:
    endpoint, log = f"unix://{tmp_path}/csi.sock", tmp_path / "log"
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    (secrets / "accessKey").write_text("AKIA")
    (secrets / "secretKey").write_text(SECRET)
    environ = {"PHFS_CSI_ENDPOINT": endpoint, "PHFS_CSI_SECRETS_DIR": str(secrets), "PHFS_CSI_LOG_LEVEL": "debug"}
    request = csi_pb2.CreateVolumeRequest(
        name="pvc-1",
        parameters={"bucket": "volumes", "endpoint": server.endpoint_url, "createBucket": "true"},
        secrets={"accessKey": "AKIA", "secretKey": SECRET},
        volume_capabilities=[
            csi_pb2.VolumeCapability(mount=csi_pb2.VolumeCapability.MountVolume(), access_mode={"mode": 5})
        ],
    )
    with running(log, ["controller"], environ) as process:
        eventually(lambda: is_ready(endpoint))
        with grpc.insecure_channel(f"unix:{tmp_path}/csi.sock") as channel:
            stub = csi_pb2_grpc.ControllerStub(channel)
            made = stub.CreateVolume(request, timeout=SECONDS)
            bad = csi_pb2.CreateVolumeRequest(**{"name": "x", "secrets": {"secretKy": SECRET}})
            with pytest.raises(grpc.RpcError):
                stub.CreateVolume(bad, timeout=SECONDS)
            stub.DeleteVolume(csi_pb2.DeleteVolumeRequest(volume_id=made.volume.volume_id), timeout=SECONDS)
        process.terminate()
        assert process.wait(SECONDS) == 0
    assert not (tmp_path / "csi.sock").exists()
    text = log.read_text()
    assert "CreateVolume name=pvc-1 code=OK" in text
    assert SECRET not in text
    assert SECRET not in made.volume.volume_id + str(made.volume.volume_context)


@pytest.mark.fuse
def test_a_node_registers_and_comes_back_after_a_kill(tmp_path: Path) -> None:
    registry = tmp_path / "registry"
    registry.mkdir()
    endpoint = f"unix://{tmp_path}/csi.sock"
    words = ["node", f"--endpoint={endpoint}", "--node-id=n", f"--registration-dir={registry}"]
    words += [f"--kubelet-dir={tmp_path}", f"--state-dir={tmp_path}/state", f"--cache-dir={tmp_path}/cache"]
    words += ["--metrics-address=127.0.0.1:0"]
    kubelet = Kubelet(registry)
    with running(tmp_path / "log", words, {"PHFS_RUNTIME_DIR": str(tmp_path / "run")}) as process:
        eventually(lambda: is_ready(endpoint))
        info = kubelet.register()
        assert info.endpoint == f"{tmp_path}/plugins/phfs.csi.primehub.io/csi.sock"
        process.send_signal(signal.SIGKILL)
        process.wait(SECONDS)
    assert kubelet.sockets() == ["phfs.csi.primehub.io-reg.sock"]
    with running(tmp_path / "log", words, {"PHFS_RUNTIME_DIR": str(tmp_path / "run")}) as process:
        eventually(lambda: is_ready(endpoint))
        assert kubelet.register().name == "phfs.csi.primehub.io"
        process.terminate()
        assert process.wait(SECONDS) == 0
    assert kubelet.sockets() == []

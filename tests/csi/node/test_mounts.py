"""The kubelet's calls over the real socket, with real mounts of a real store: what is mounted, refused and left."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from phfs_csi.proto import csi_pb2
from phfs_fuse.errors import MountpointError
from phfs_fuse.host.mount_table import mount_table
from phfs_fuse.host.registry import MountRecord
from phfs_fuse.launch import client
from phfs_fuse.types import MIB
from tests.csi.plugin import Plugin, Volume, a_plugin, capability, children, mounts_below, sh
from tests.support.mounts import s3_client, shared_server
from tests.support.proxy import Answer, Proxy, forward_all, proxy
from tests.support.servers import silent

pytestmark = [pytest.mark.fuse, pytest.mark.minio]

SECONDS = 60.0
Mode = csi_pb2.VolumeCapability.AccessMode


@pytest.fixture
def plugin() -> Iterator[Plugin]:
    with a_plugin() as found:
        yield found


@pytest.fixture
def bucket(request: pytest.FixtureRequest) -> str:
    name = f"csi-{abs(hash(request.node.nodeid)) % 10**9}-{time.monotonic_ns()}"
    s3_client(shared_server()).create_bucket(Bucket=name)
    return name


@pytest.fixture
def volume(plugin: Plugin, bucket: str) -> Volume:
    return Volume(plugin, bucket)


@pytest.fixture
def store() -> Iterator[Proxy]:
    with proxy(shared_server().endpoint_url) as found:
        yield found


def eventually(condition: Callable[[], bool], why: Callable[[], str] = str) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, why()
        time.sleep(0.1)  # of other processes


def is_forgotten(plugin: Plugin) -> bool:
    return not list((plugin.state / "volumes").glob("*/volume.json"))


# --- the order of the kubelet


def test_two_pods_and_the_end(plugin: Plugin, volume: Volume) -> None:
    volume.stage()
    first, second = volume.publish("a"), volume.publish("b", readonly=True)
    sh('echo hello > "$1/file"', first)
    assert sh('cat "$1/file"', second) == "hello\n"
    assert "Read-only" in sh('touch "$1/other" 2>&1 || true', second)
    assert plugin.code("NodeUnstageVolume", volume.unstage_request()) == "FAILED_PRECONDITION"
    volume.unpublish("a")
    assert not first.exists()
    assert sh('cat "$1/file"', second) == "hello\n"
    volume.unpublish("b")
    volume.unstage()
    assert volume.object("file") == b"hello\n"
    assert mounts_below(plugin.root) == []
    assert plugin.keepers() == []
    assert list((plugin.state / "volumes").iterdir()) == []
    assert volume.staging.is_dir()  # the kubelet's


def test_every_call_may_be_made_again(plugin: Plugin, volume: Volume) -> None:
    for _ in range(2):
        volume.stage()
    for _ in range(2):
        volume.publish()
    assert sum(path == str(volume.target("pod-1")) for path in mount_table()) == 1
    for _ in range(2):
        volume.unpublish()
    for _ in range(2):
        volume.unstage()
    assert mounts_below(plugin.root) == []


def test_the_same_path_asked_for_otherwise(plugin: Plugin, volume: Volume) -> None:
    volume.stage()
    volume.publish()
    other = {**volume.attributes, "prefix": "groups/other/"}
    assert plugin.code("NodeStageVolume", volume.stage_request(volume_context=other)) == "ALREADY_EXISTS"
    reader = capability(Mode.MULTI_NODE_READER_ONLY)
    assert plugin.code("NodeStageVolume", volume.stage_request(volume_capability=reader)) == "ALREADY_EXISTS"
    assert plugin.code("NodePublishVolume", volume.publish_request(readonly=True)) == "ALREADY_EXISTS"


def test_publish_before_stage(plugin: Plugin, volume: Volume) -> None:
    assert plugin.code("NodePublishVolume", volume.publish_request()) == "FAILED_PRECONDITION"
    assert mounts_below(plugin.root) == []


def test_two_volumes_of_one_prefix(plugin: Plugin, bucket: str) -> None:
    first, second = Volume(plugin, bucket, "a", prefix="shared/"), Volume(plugin, bucket, "b", prefix="shared/")
    for volume in (first, second):
        volume.stage()
        volume.publish()
    sh('echo one > "$1/file"; sync -f "$1"', first.target("pod-1"))
    eventually(lambda: "file" in sh('ls "$1"', second.target("pod-1")))


def test_a_sub_path_is_bound_as_the_kubelet_does_it(plugin: Plugin, volume: Volume) -> None:
    volume.stage()
    target, inner = volume.publish(), plugin.kubelet / "sub"
    inner.mkdir()
    sh('mkdir "$1/groups"; mount --bind "$1/groups" "$2"; echo x > "$2/file"; umount "$2"', target, inner)
    volume.unpublish()
    volume.unstage()
    assert volume.object("groups/file") == b"x\n"


# --- modes, groups, inline volumes


def test_one_pod_only(plugin: Plugin, volume: Volume) -> None:
    alone = capability(Mode.SINGLE_NODE_SINGLE_WRITER)
    volume.stage(volume_capability=alone)
    volume.publish("a", volume_capability=alone)
    volume.publish("a", volume_capability=alone)
    assert plugin.code("NodePublishVolume", volume.publish_request("b", volume_capability=alone)) == (
        "FAILED_PRECONDITION"
    )
    volume.unpublish("a")
    volume.publish("b", volume_capability=alone)


def test_a_reader_cannot_write(plugin: Plugin, volume: Volume) -> None:
    reader = capability(Mode.MULTI_NODE_READER_ONLY)
    volume.stage(volume_capability=reader)
    target = volume.publish(volume_capability=reader)
    assert "Read-only" in sh('touch "$1/file" 2>&1 || true', target)
    assert "Read-only" in sh('touch "$1/file" 2>&1 || true', volume.staging)


def test_the_group_of_the_pod_owns_and_writes(plugin: Plugin, volume: Volume) -> None:
    s3_client(plugin.server).put_object(Bucket=volume.bucket, Key=volume.prefix + "theirs", Body=b"x")
    with_group = capability(group="1234")
    volume.stage(volume_capability=with_group)
    target = volume.publish(volume_capability=with_group)
    assert sh('stat -c "%g %a" "$1" "$1/theirs"', target) == "1234 2775\n1234 664\n"
    code = (
        "import os, sys; os.chdir(sys.argv[1]); os.setgroups([1234]); os.setuid(1000); open('ours', 'w').write('x')"
    )
    subprocess.run([sys.executable, "-c", code, str(target)], check=True, timeout=SECONDS)
    request = volume.publish_request("b", volume_capability=capability(group="99"))
    assert plugin.code("NodePublishVolume", request) == "FAILED_PRECONDITION"


def test_an_inline_volume(plugin: Plugin, bucket: str) -> None:
    volume = Volume(plugin, bucket, "inline")
    context = {**volume.attributes, "csi.storage.k8s.io/ephemeral": "true"}
    request = volume.publish_request(staging_target_path="", volume_context=context, secrets=volume.secrets)
    for _ in range(2):
        plugin.call("NodePublishVolume", request)
    sh('echo inline > "$1/file"', volume.target("pod-1"))
    for _ in range(2):
        volume.unpublish()
    assert volume.object("file") == b"inline\n"
    assert mounts_below(plugin.root) == []
    assert not volume.target("pod-1").exists()
    assert list((plugin.state / "volumes").iterdir()) == []


# --- what is in the way


def test_a_mount_of_somebody_else_is_left_alone(plugin: Plugin, volume: Volume) -> None:
    volume.stage()
    target = volume.target("pod-1")
    target.mkdir(parents=True)
    sh('mount -t tmpfs tmpfs "$1"', target)
    assert plugin.code("NodePublishVolume", volume.publish_request()) == "FAILED_PRECONDITION"
    assert plugin.code("NodeUnpublishVolume", volume.unpublish_request()) == "FAILED_PRECONDITION"
    assert mount_table()[str(target)].kind == "tmpfs"
    sh('umount "$1"', target)
    volume.publish()


def test_what_is_in_a_target_is_never_removed(plugin: Plugin, volume: Volume) -> None:
    volume.stage()
    target = volume.target("pod-1")
    target.mkdir(parents=True)
    (target / "kept").touch()
    volume.publish()
    assert plugin.code("NodeUnpublishVolume", volume.unpublish_request()) == "INTERNAL"
    assert (target / "kept").exists()


def test_a_target_through_a_symbolic_link(plugin: Plugin, volume: Volume, tmp_path: Path) -> None:
    volume.stage()
    target = volume.target("pod-1")
    target.parent.mkdir(parents=True)
    target.symlink_to(tmp_path)
    assert plugin.code("NodePublishVolume", volume.publish_request()) == "INVALID_ARGUMENT"
    assert str(tmp_path) not in mount_table()


# --- a store that is not there


def test_a_store_that_hangs(plugin: Plugin, bucket: str) -> None:
    with silent() as url:
        volume = Volume(plugin, bucket, endpoint=url)
        started = time.monotonic()
        assert plugin.code("NodeStageVolume", volume.stage_request(), seconds=15) in (
            "DEADLINE_EXCEEDED",
            "UNAVAILABLE",
        )
        assert time.monotonic() - started < 60
        eventually(lambda: is_forgotten(plugin), plugin.log)
    assert mounts_below(plugin.root) == []
    assert plugin.keepers() == []


def test_a_store_that_is_away(plugin: Plugin, bucket: str, store: Proxy) -> None:
    volume = Volume(plugin, bucket, endpoint=store.endpoint_url)
    store.script = lambda _request: Answer(503)
    assert plugin.code("NodeStageVolume", volume.stage_request()) == "UNAVAILABLE"
    assert mounts_below(plugin.root) == []
    assert list((plugin.state / "volumes").iterdir()) == []
    store.script = forward_all
    volume.stage()


def test_wrong_secrets_say_so(plugin: Plugin, volume: Volume) -> None:
    request = volume.stage_request(secrets={"accessKey": "nobody", "secretKey": "wrong-wrong-wrong"})
    assert plugin.code("NodeStageVolume", request) in ("UNAVAILABLE", "FAILED_PRECONDITION", "PERMISSION_DENIED")
    assert mounts_below(plugin.root) == []
    assert "wrong-wrong-wrong" not in plugin.log()


# --- one call per volume at a time


def test_crossed_calls(plugin: Plugin, bucket: str, store: Proxy) -> None:
    goes_on = threading.Event()

    def held(_request: object) -> Answer:
        goes_on.wait(SECONDS)
        return Answer(503)

    slow, other = Volume(plugin, bucket, "slow", endpoint=store.endpoint_url), Volume(plugin, bucket, "other")
    store.script = held  # type: ignore[assignment]
    codes: list[str] = []
    first = threading.Thread(target=lambda: codes.append(plugin.code("NodeStageVolume", slow.stage_request())))
    first.start()
    eventually(lambda: bool(store.requests))
    assert plugin.code("NodeStageVolume", slow.stage_request()) == "ABORTED"
    assert plugin.code("NodePublishVolume", slow.publish_request()) == "ABORTED"
    assert plugin.code("NodeUnstageVolume", slow.unstage_request()) == "ABORTED"
    other.stage()
    other.publish()
    goes_on.set()
    first.join(SECONDS)
    assert codes == ["UNAVAILABLE"]
    store.script = forward_all
    slow.stage()


# --- the end, and what is left


@pytest.fixture
def left(plugin: Plugin, bucket: str, store: Proxy) -> Volume:
    """Unstaged while the store was away, with a file that the store has not."""
    volume = Volume(plugin, bucket, endpoint=store.endpoint_url, drainTimeout="1s")
    volume.stage()
    target = volume.publish()
    sh('mkdir "$1/folder"', target)  # known to be empty: a file in it needs no answer of the store
    store.script = lambda _request: Answer(503)
    sh('echo precious > "$1/folder/file"', target)
    volume.unpublish()
    volume.unstage()
    return volume


def test_what_is_left_goes_up_in_the_background(plugin: Plugin, left: Volume, store: Proxy) -> None:
    assert mounts_below(plugin.root) == []
    (credentials,) = plugin.state.glob("volumes/*/credentials")
    assert stat.S_IMODE(credentials.stat().st_mode) == 0o600
    store.script = forward_all
    eventually(lambda: is_forgotten(plugin), plugin.log)
    assert left.object("folder/file") == b"precious\n"
    assert not credentials.exists()


def test_what_is_left_goes_up_after_a_restart(plugin: Plugin, left: Volume, store: Proxy) -> None:
    plugin.kill()
    store.script = forward_all
    plugin.start()
    eventually(lambda: is_forgotten(plugin), plugin.log)
    assert left.object("folder/file") == b"precious\n"


def test_a_volume_that_is_staged_again_takes_up_what_is_left(plugin: Plugin, left: Volume, store: Proxy) -> None:
    eventually(lambda: "uploading what is left" in plugin.log())
    store.script = forward_all
    left.stage()
    target = left.publish()
    assert sh('cat "$1/folder/file"', target) == "precious\n"
    left.unpublish()
    left.unstage()
    assert left.object("folder/file") == b"precious\n"


# --- what is told


def test_stats_and_condition(plugin: Plugin, bucket: str, store: Proxy) -> None:
    volume = Volume(plugin, bucket, endpoint=store.endpoint_url)
    volume.stage()
    target = volume.publish()

    def ask(path: Path) -> csi_pb2.NodeGetVolumeStatsResponse:
        request = csi_pb2.NodeGetVolumeStatsRequest(volume_id="vol", volume_path=str(path))
        found: csi_pb2.NodeGetVolumeStatsResponse = plugin.call("NodeGetVolumeStats", request)
        return found

    for path in (target, volume.staging):
        found = ask(path)
        assert [usage.unit for usage in found.usage] == [csi_pb2.VolumeUsage.BYTES, csi_pb2.VolumeUsage.INODES]
        assert all(usage.total >= usage.available > 0 for usage in found.usage)
        assert not found.volume_condition.abnormal
    sh('mkdir "$1/folder"', target)
    store.script = lambda _request: Answer(503)
    sh('echo x > "$1/folder/file"', target)
    eventually(lambda: ask(target).volume_condition.abnormal)
    store.script = forward_all
    elsewhere = csi_pb2.NodeGetVolumeStatsRequest(volume_id="vol", volume_path=str(plugin.kubelet))
    assert plugin.code("NodeGetVolumeStats", elsewhere) == "NOT_FOUND"


def test_the_quota_is_what_the_kubelet_is_told(plugin: Plugin, bucket: str) -> None:
    volume = Volume(plugin, bucket, quota="64M")
    volume.stage()
    target = volume.publish()

    def told() -> tuple[int, int, int]:
        request = csi_pb2.NodeGetVolumeStatsRequest(volume_id="vol", volume_path=str(target))
        usage = plugin.call("NodeGetVolumeStats", request).usage[0]
        return usage.total, usage.used, usage.available

    eventually(lambda: told() == (64 * MIB, 0, 64 * MIB), lambda: str(told()))
    sh('head -c 16M /dev/urandom > "$1/file"', target)
    eventually(lambda: told() == (64 * MIB, 16 * MIB, 48 * MIB), lambda: str(told()))
    assert sh('head -c 60M /dev/zero > "$1/other" || echo refused; rm "$1/other"', target) == "refused\n"
    eventually(lambda: told() == (64 * MIB, 16 * MIB, 48 * MIB), lambda: str(told()))


def test_no_secret_in_any_log(plugin: Plugin, volume: Volume, bucket: str) -> None:
    volume.stage()
    volume.publish()
    wrong = volume.publish_request("b", secrets=volume.secrets, readonly=True, target_path="/etc")
    assert plugin.code("NodePublishVolume", wrong) == "INVALID_ARGUMENT"
    plugin.kill_container()
    plugin.start()
    volume.unpublish()
    volume.unstage()
    logs = plugin.log()
    assert "NodeStageVolume" in logs
    assert plugin.server.secret_key not in logs
    for pid in plugin.keepers():
        assert plugin.server.secret_key.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()


def test_no_descriptor_is_left(plugin: Plugin, volume: Volume) -> None:
    def once() -> int:
        volume.stage()
        volume.publish()
        volume.unpublish()
        volume.unstage()
        assert plugin.process is not None
        return len(os.listdir(f"/proc/{plugin.process.pid}/fd"))

    once()
    before = once()
    assert [once() for _ in range(3)][-1] <= before + 1


def test_limits_follow_the_number_of_volumes(plugin: Plugin, bucket: str) -> None:
    """The node has 1 GiB for the cache and as much for unsaved bytes (see `Plugin.start`)."""
    first, second = Volume(plugin, bucket, "a"), Volume(plugin, bucket, "b", cacheSize="100Mi")

    def limits(volume: Volume) -> tuple[int, int]:
        (path,) = [path for path in plugin.state.glob("volumes/*/volume.json") if volume.prefix in path.read_text()]
        (socket,) = path.parent.glob("*/control.sock")
        record = MountRecord(mountpoint="", control_socket=str(socket), keeper_pid=0, url="")
        status = client.status(record)
        return status["cache"]["limit"] // MIB, status["dirty"]["limit"] // MIB

    first.stage()
    assert limits(first) == (1024, 1024)
    second.stage()
    assert limits(second) == (100, 512)
    eventually(lambda: limits(first) == (512, 512), plugin.log)
    for keeper in plugin.keepers():
        for pid in children(keeper):
            os.kill(pid, signal.SIGKILL)
    eventually(lambda: _is_served(lambda: limits(first)))
    assert limits(first) == (512, 512)


def _is_served(call: Callable[[], object]) -> bool:
    try:
        call()
    except (MountpointError, ValueError):
        return False
    return True

"""Requests of the Node service: what they become, and which are refused."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from phfs_csi.errors import CsiError, FailedPrecondition, InvalidArgument, PermissionDenied
from phfs_csi.proto import csi_pb2
from phfs_csi.request.node_requests import EPHEMERAL, Requests
from phfs_csi.request.params import AccessMode

Mode = csi_pb2.VolumeCapability.AccessMode
OWN = {"accessKey": "AKIA", "secretKey": "s3cr3t"}


def capability(
    mode: Mode.Mode = Mode.MULTI_NODE_MULTI_WRITER, *, group: str = "", flags: tuple[str, ...] = ()
) -> csi_pb2.VolumeCapability:
    mount = csi_pb2.VolumeCapability.MountVolume(mount_flags=flags, volume_mount_group=group)
    return csi_pb2.VolumeCapability(mount=mount, access_mode=Mode(mode=mode))


@pytest.fixture
def kubelet(tmp_path: Path) -> Path:
    (tmp_path / "kubelet" / "pods").mkdir(parents=True)
    return tmp_path / "kubelet"


@pytest.fixture
def requests(kubelet: Path) -> Requests:
    return Requests(kubelet_dir=kubelet, defaults=lambda: {"accessKey": "default", "secretKey": "default"})


def stage_request(path: Path | str, **changes: object) -> csi_pb2.NodeStageVolumeRequest:
    fields: dict[str, object] = {
        "volume_id": "vol",
        "staging_target_path": str(path),
        "volume_capability": capability(),
        "volume_context": {"bucket": "b-1", "prefix": "x"},
    }
    return csi_pb2.NodeStageVolumeRequest(**{**fields, **changes})  # type: ignore[arg-type]


def publish_request(path: Path | str, **changes: object) -> csi_pb2.NodePublishVolumeRequest:
    fields: dict[str, object] = {"volume_id": "vol", "target_path": str(path), "volume_capability": capability()}
    return csi_pb2.NodePublishVolumeRequest(**{**fields, **changes})  # type: ignore[arg-type]


def test_stage(requests: Requests, kubelet: Path) -> None:
    request = stage_request(kubelet / "s", volume_capability=capability(group="2000", flags=("umask=077",)))
    found = requests.stage(request)
    assert found.staging_target_path == kubelet / "s"
    assert found.volume.source == "s3://b-1/x/"
    assert found.volume.settings == {"umask": "077"}
    assert found.volume.credentials.access_key == "default"
    assert (found.mount_group, found.read_only, found.access_mode) == (
        2000,
        False,
        AccessMode.MULTI_NODE_MULTI_WRITER,
    )


@pytest.mark.parametrize(
    ("changes", "read_only"),
    [
        ({}, False),
        ({"volume_capability": capability(Mode.MULTI_NODE_READER_ONLY)}, True),
        ({"volume_capability": capability(Mode.SINGLE_NODE_READER_ONLY)}, True),
        ({"volume_capability": capability(Mode.SINGLE_NODE_SINGLE_WRITER)}, False),
        ({"volume_capability": capability(flags=("ro",))}, True),
        ({"volume_context": {"bucket": "b-1", "readOnly": "yes"}}, True),
        ({"volume_context": {"bucket": "b-1", "readOnly": "no"}}, False),
    ],
)
def test_when_a_whole_mount_is_read_only(
    requests: Requests, kubelet: Path, changes: Mapping[str, object], read_only: bool
) -> None:
    assert requests.stage(stage_request(kubelet / "s", **changes)).read_only is read_only


def test_publish_of_a_staged_volume(requests: Requests, kubelet: Path) -> None:
    found = requests.publish(publish_request(kubelet / "t", staging_target_path=str(kubelet / "s"), readonly=True))
    assert (found.target_path, found.staging_target_path) == (kubelet / "t", kubelet / "s")
    assert found.inline is None
    assert found.read_only


def test_publish_of_an_inline_volume(requests: Requests, kubelet: Path) -> None:
    context = {EPHEMERAL: "true", "bucket": "b-1", "readOnly": "true"}
    found = requests.publish(publish_request(kubelet / "t", volume_context=context, secrets=OWN))
    assert found.inline is not None
    assert found.inline.credentials.access_key == "AKIA"
    assert found.staging_target_path is None
    assert found.read_only


def test_an_inline_volume_never_gets_the_credentials_of_the_plugin(requests: Requests, kubelet: Path) -> None:
    with pytest.raises(InvalidArgument, match="nodePublishSecretRef"):
        requests.publish(publish_request(kubelet / "t", volume_context={EPHEMERAL: "true", "bucket": "b-1"}))


def test_an_inline_volume_connects_to_no_link_local_address(requests: Requests, kubelet: Path) -> None:
    url = "http://169.254.169.254"
    context = {EPHEMERAL: "true", "bucket": "b-1"}
    for attributes in ({"endpoint": url}, {"s3-endpoint": url, "remote": "s3", "remotePath": "b-1"}):
        named = {**context, **attributes} if "endpoint" in attributes else {EPHEMERAL: "true", **attributes}
        with pytest.raises(PermissionDenied, match="inline volumes may use"):
            requests.publish(publish_request(kubelet / "t", volume_context=named, secrets=OWN))
    assert requests.stage(stage_request(kubelet / "s", volume_context={"bucket": "b-1", "endpoint": url}))


STAGED = "plugins/kubernetes.io/csi/phfs/1/globalmount"
PUBLISHED = "pods/uid/volumes/kubernetes.io~csi/vol/mount"


@pytest.mark.parametrize(
    "target",
    [
        "t",
        "pods/uid/volumes/kubernetes.io~csi/vol",
        "pods/uid/volumes/kubernetes.io~csi/vol/mount/x",
        "pods/uid/volumes/kubernetes.io~csi/a/b/mount",
        "pods/uid/volumes/kubernetes.io~secret/vol/mount",
        "pods/a/uid/volumes/kubernetes.io~csi/vol/mount",
        "pods/uid/etc-hosts",
        STAGED,
    ],
)
def test_targets_are_where_a_kubelet_mounts_volumes(kubelet: Path, target: str) -> None:
    strict = Requests(kubelet_dir=kubelet, any_target=False)
    inline = {"volume_context": {EPHEMERAL: "true", "bucket": "b-1"}, "secrets": OWN}
    assert strict.publish(publish_request(kubelet / PUBLISHED, staging_target_path=str(kubelet / STAGED)))
    assert strict.publish(publish_request(kubelet / PUBLISHED, **inline))
    assert strict.stage(stage_request(kubelet / STAGED))
    unpublish = csi_pb2.NodeUnpublishVolumeRequest(volume_id="vol", target_path=str(kubelet / target))
    for call in (
        lambda: strict.publish(publish_request(kubelet / target, staging_target_path=str(kubelet / STAGED))),
        lambda: strict.publish(publish_request(kubelet / target, **inline)),
        lambda: strict.unpublish(unpublish),
    ):
        with pytest.raises(InvalidArgument, match="target_path"):
            call()


@pytest.mark.parametrize("path", ["s", "pods/uid/volumes/kubernetes.io~csi/vol/mount"])
def test_volumes_are_staged_below_the_plugins_of_a_kubelet(kubelet: Path, path: str) -> None:
    strict = Requests(kubelet_dir=kubelet, any_target=False)
    unstage = csi_pb2.NodeUnstageVolumeRequest(volume_id="vol", staging_target_path=str(kubelet / path))
    for call in (lambda: strict.stage(stage_request(kubelet / path)), lambda: strict.unstage(unstage)):
        with pytest.raises(InvalidArgument, match="staging_target_path"):
            call()


def test_a_volume_that_is_not_staged_cannot_be_published(requests: Requests, kubelet: Path) -> None:
    with pytest.raises(FailedPrecondition):
        requests.publish(publish_request(kubelet / "t"))


BLOCK = csi_pb2.VolumeCapability(
    block=csi_pb2.VolumeCapability.BlockVolume(), access_mode=Mode(mode=Mode.SINGLE_NODE_WRITER)
)


@pytest.mark.parametrize(
    ("named", "changes"),
    [
        ("volume_id", {"volume_id": ""}),
        ("volume_id", {"volume_id": "a\nb"}),
        ("volume_id", {"volume_id": "a" * 2000}),
        ("volume_capability", {"volume_capability": csi_pb2.VolumeCapability()}),
        ("block", {"volume_capability": BLOCK}),
        ("access mode", {"volume_capability": capability(Mode.UNKNOWN)}),
        ("volume_mount_group", {"volume_capability": capability(group="wheel")}),
        ("volume_mount_group", {"volume_capability": capability(group="4294967295")}),
        ("volume_mount_group", {"volume_capability": capability(group="-1")}),
        ("mountOptions", {"volume_capability": capability(flags=("state-dir=/etc",))}),
        ("bukcet", {"volume_context": {"bukcet": "b-1"}}),
    ],
)
def test_fields_that_are_refused(
    requests: Requests, kubelet: Path, named: str, changes: Mapping[str, object]
) -> None:
    with pytest.raises(InvalidArgument, match=named):
        requests.stage(stage_request(kubelet / "s", **changes))


@pytest.mark.parametrize(
    "path", ["", "relative", "/", "/etc", "{}", "{}/", "{}/../etc", "{}/pods/../../etc", "{}/a\nb", "{}-evil/x"]
)
def test_paths_that_are_refused(requests: Requests, kubelet: Path, path: str) -> None:
    text = path.format(kubelet)
    with pytest.raises(InvalidArgument, match="staging_target_path"):
        requests.stage(stage_request(text))
    with pytest.raises(InvalidArgument, match="staging_target_path"):
        requests.unstage(csi_pb2.NodeUnstageVolumeRequest(volume_id="v", staging_target_path=text))
    with pytest.raises(InvalidArgument, match="target_path"):
        requests.publish(publish_request(text, staging_target_path=str(kubelet / "s")))
    with pytest.raises(InvalidArgument, match="target_path"):
        requests.unpublish(csi_pb2.NodeUnpublishVolumeRequest(volume_id="v", target_path=text))


@pytest.mark.parametrize("target", ["/etc", "nowhere", "."])
def test_no_path_goes_through_a_symlink(requests: Requests, kubelet: Path, target: str) -> None:
    (kubelet / "pods" / "link").symlink_to(target)
    for path in (kubelet / "pods" / "link", kubelet / "pods" / "link" / "below"):
        with pytest.raises(InvalidArgument, match="symbolic link"):
            requests.stage(stage_request(path))


def test_the_kubelets_directory_itself_may_be_a_link(tmp_path: Path, kubelet: Path) -> None:
    (tmp_path / "var").symlink_to(kubelet)
    found = Requests(kubelet_dir=tmp_path / "var").stage(stage_request(tmp_path / "var" / "pods" / "s"))
    assert found.staging_target_path == tmp_path / "var" / "pods" / "s"


@pytest.mark.parametrize("path", ["some/path", "/etc", "/nowhere"])
def test_statistics_may_be_asked_for_any_path(requests: Requests, path: str) -> None:
    request = csi_pb2.NodeGetVolumeStatsRequest(volume_id="v", volume_path=path)
    assert requests.stats(request) == ("v", Path(path))
    wish = csi_pb2.CapacityRange(required_bytes=5)
    expand = csi_pb2.NodeExpandVolumeRequest(volume_id="v", volume_path=path, capacity_range=wish)
    assert requests.expand(expand) == ("v", Path(path), 5)


PIECES = st.sampled_from(["..", ".", "", "pods", "link", "x", "a b", "\n", "etc"])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pieces=st.lists(PIECES, max_size=6), start=st.sampled_from(["", "/", "{}", "{}/"]))
def test_whatever_the_path_it_stays_below_the_kubelet(
    requests: Requests, kubelet: Path, pieces: list[str], start: str
) -> None:
    link = kubelet / "pods" / "link"
    if not link.is_symlink():
        link.symlink_to("/etc")
    text = start.format(kubelet) + "/".join(pieces)
    try:
        found = requests.unstage(csi_pb2.NodeUnstageVolumeRequest(volume_id="v", staging_target_path=text))[1]
    except CsiError:
        return
    assert os.path.realpath(found) == os.path.normpath(found)
    assert Path(os.path.normpath(found)).is_relative_to(kubelet)

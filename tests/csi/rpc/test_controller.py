"""The Controller service against a store that answers as S3 does."""

from __future__ import annotations

import json
import logging
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import boto3
import grpc
import pytest

from phfs_csi.errors import Aborted, AlreadyExists, CsiError, DeadlineExceeded, InvalidArgument, NotFound, OutOfRange
from phfs_csi.proto import csi_pb2
from phfs_csi.provision import catalog
from phfs_csi.provision.catalog import quota_now
from phfs_csi.provision.id_keys import IdKeys
from phfs_csi.request.params import Credentials, VolumeParams
from phfs_csi.request.volume_id import parse_volume_id
from phfs_csi.rpc.controller import ControllerService
from phfs_fuse.errors import AccessDenied, BucketNotFound
from phfs_fuse.store.s3 import S3Store
from tests.support import servers
from tests.support.servers import Server

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

GIB = 1 << 30
BUCKET = "volumes"
Mode = csi_pb2.VolumeCapability.AccessMode
SHARED = csi_pb2.VolumeCapability(
    mount=csi_pb2.VolumeCapability.MountVolume(), access_mode=Mode(mode=Mode.MULTI_NODE_MULTI_WRITER)
)
CLAIM = {
    "csi.storage.k8s.io/pvc/name": "data",
    "csi.storage.k8s.io/pvc/namespace": "hub",
    "csi.storage.k8s.io/pv/name": "pvc-1",
}


class Context:
    """Of a call without a deadline."""

    def time_remaining(self) -> float | None:
        return None


CONTEXT = cast("grpc.ServicerContext", Context())


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with servers.moto() as found:
        yield found


@pytest.fixture
def s3(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Client]:
    """An empty bucket."""
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3", endpoint_url=server.endpoint_url)
    client.create_bucket(Bucket=BUCKET)
    yield client
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET):
        for item in page.get("Contents", []):
            client.delete_object(Bucket=BUCKET, Key=item["Key"])
    client.delete_bucket(Bucket=BUCKET)
    client.close()


@pytest.fixture
def service(s3: S3Client) -> ControllerService:
    return a_service()


KEYS = "1" * 32, "2" * 32


def a_service(keys: Sequence[str] = KEYS, told: list[tuple[str, str]] | None = None) -> ControllerService:
    return ControllerService(
        annotations=lambda namespace, name: {"primehub.io/group": f"{namespace}_{name}"},
        keys=lambda: IdKeys(keys),
        tell=lambda volume, text: None if told is None else told.append((volume, text)),
    )


@pytest.fixture
def parameters(server: Server) -> dict[str, str]:
    return {"bucket": BUCKET, "endpoint": server.endpoint_url, **CLAIM}


def create_request(parameters: Mapping[str, str], name: str = "pvc-1", **changes: Any) -> csi_pb2.CreateVolumeRequest:
    fields: dict[str, Any] = {
        "name": name,
        "parameters": parameters,
        "volume_capabilities": [SHARED],
        "capacity_range": csi_pb2.CapacityRange(required_bytes=GIB),
    }
    return csi_pb2.CreateVolumeRequest(**{**fields, **changes})


def create(
    service: ControllerService, parameters: Mapping[str, str], name: str = "pvc-1", **changes: Any
) -> csi_pb2.Volume:
    return service.CreateVolume(create_request(parameters, name, **changes), CONTEXT).volume


def delete(service: ControllerService, volume_id: str) -> None:
    service.DeleteVolume(csi_pb2.DeleteVolumeRequest(volume_id=volume_id), CONTEXT)


def keys(s3: S3Client) -> list[str]:
    return [item["Key"] for item in s3.list_objects_v2(Bucket=BUCKET).get("Contents", [])]


def put(s3: S3Client, *names: str) -> None:
    for name in names:
        s3.put_object(Bucket=BUCKET, Key=name, Body=b"x")


def test_a_claim_becomes_a_prefix_with_a_quota(
    service: ControllerService, parameters: dict[str, str], server: Server
) -> None:
    volume = create(service, {**parameters, "prefixTemplate": "groups/${pvc.namespace}/${pvc.name}", "uid": "1000"})
    assert re.fullmatch(
        re.escape(f"phfs://{BUCKET}/pvc-1?endpoint={server.endpoint_url}&mac=") + "[0-9a-f]{64}", volume.volume_id
    )
    assert volume.capacity_bytes == GIB
    assert volume.volume_context == {
        "bucket": BUCKET,
        "endpoint": server.endpoint_url,
        "prefix": "groups/hub/data/",
        "uid": "1000",
        "quota": str(GIB),
    }


@pytest.mark.parametrize(
    ("template", "prefix"),
    [
        ({}, "volumes/pvc-1/"),
        ({"prefixTemplate": "volumes/${pv.name}/"}, "volumes/pvc-1/"),
        ({"prefixTemplate": "groups/${pvc.annotations['primehub.io/group']}"}, "groups/hub_data/"),
        ({"groupAnnotation": "primehub.io/group"}, "groups/hub-data/"),
    ],
)
def test_templates(
    service: ControllerService, parameters: dict[str, str], template: dict[str, str], prefix: str
) -> None:
    assert create(service, {**parameters, **template}).volume_context["prefix"] == prefix


def test_the_same_call_again_gives_the_same_volume(service: ControllerService, parameters: dict[str, str]) -> None:
    assert create(service, parameters) == create(service, parameters)


@pytest.mark.parametrize(
    "changes",
    [
        {"capacity_range": csi_pb2.CapacityRange(required_bytes=2 * GIB)},
        {"capacity_range": csi_pb2.CapacityRange(limit_bytes=GIB // 2)},
        {"parameters": {"uid": "7"}},
        {"parameters": {"onDelete": "delete"}},
        {"parameters": {"prefixTemplate": "elsewhere/${pvc.name}"}},
    ],
)
def test_the_same_name_with_other_parameters(
    service: ControllerService, parameters: dict[str, str], changes: dict[str, Any]
) -> None:
    create(service, parameters)
    other = {**changes, "parameters": {**parameters, **changes.get("parameters", {})}}
    with pytest.raises(AlreadyExists):
        create(service, **{"parameters": parameters, **other})


REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("name", {"name": ""}),
    ("name", {"name": "a" * 300}),
    ("name", {"name": "a\nb"}),
    ("volume_capabilities", {"volume_capabilities": []}),
    ("block", {"volume_capabilities": [csi_pb2.VolumeCapability(block=csi_pb2.VolumeCapability.BlockVolume())]}),
    ("onDelete", {"parameters": {"onDelete": "purge"}}),
    ("prefixTemplate", {"parameters": {"prefix": "x"}}),
    ("groupAnnotation", {"parameters": {"group": "x"}}),
    ("size of the claim", {"parameters": {"quota": "1G"}}),
    ("exclude", {"parameters": {"groupAnnotation": "primehub.io/group", "prefixTemplate": "x"}}),
    ("no annotation", {"parameters": {"groupAnnotation": "other"}}),
    ("not known", {"parameters": {"prefixTemplate": "x/${pvc.uid}"}}),
    ("begins no", {"parameters": {"prefixTemplate": "x/$pvc"}}),
    ("prefix", {"parameters": {"prefixTemplate": "../${pvc.name}"}}),
    ("prefix", {"parameters": {"prefixTemplate": "/"}}),
    ("prefix", {"parameters": {"prefixTemplate": ".phfs/volumes/"}}),
    ("folder", {"parameters": {"csi.storage.k8s.io/pvc/name": "../../x", "prefixTemplate": "x/${pvc.name}"}}),
    ("extra-create-metadata", {"parameters": {"csi.storage.k8s.io/pvc/name": "", "prefixTemplate": "${pvc.name}"}}),
    ("prefixTemplat", {"parameters": {"prefixTemplat": "x"}}),
    ("credentials", {"parameters": {"secretKey": "x"}}),
    ("snapshots", {"volume_content_source": csi_pb2.VolumeContentSource(volume={"volume_id": "x"})}),
]


@pytest.mark.parametrize(("named", "changes"), REFUSED)
def test_what_is_refused_leaves_nothing(
    service: ControllerService, s3: S3Client, parameters: dict[str, str], named: str, changes: dict[str, Any]
) -> None:
    with pytest.raises(InvalidArgument, match=named):
        create(service, **{**changes, "parameters": {**parameters, **changes.get("parameters", {})}})
    assert keys(s3) == []


def test_a_limit_below_the_size(service: ControllerService, parameters: dict[str, str]) -> None:
    with pytest.raises(OutOfRange):
        create(service, parameters, capacity_range=csi_pb2.CapacityRange(required_bytes=2, limit_bytes=1))


def test_a_bucket_that_is_not_there(service: ControllerService, s3: S3Client, parameters: dict[str, str]) -> None:
    with pytest.raises(BucketNotFound):
        create(service, {**parameters, "bucket": "missing"})
    create(service, {**parameters, "bucket": "made-here", "createBucket": "true"})
    s3.delete_object(Bucket="made-here", Key=".phfs/volumes/pvc-1.json")
    s3.delete_bucket(Bucket="made-here")


def test_delete_retains_unless_told(service: ControllerService, s3: S3Client, parameters: dict[str, str]) -> None:
    volume = create(service, parameters)
    put(s3, "volumes/pvc-1/a", "volumes/pvc-1/b/c")
    delete(service, volume.volume_id)
    assert keys(s3) == ["volumes/pvc-1/a", "volumes/pvc-1/b/c"]
    delete(service, volume.volume_id)  # again


def test_delete_removes_exactly_the_prefix(
    service: ControllerService, s3: S3Client, parameters: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog, "PAGE", 4)
    volume = create(service, {**parameters, "onDelete": "delete"})
    put(s3, "volumes/pvc-1/", *(f"volumes/pvc-1/{number}" for number in range(10)), "volumes/pvc-1/b/c")
    put(s3, "volumes/pvc-10/a", "volumes/pvc-1", "volumes/pvc", "other")
    s3.create_multipart_upload(Bucket=BUCKET, Key="volumes/pvc-1/begun")
    delete(service, volume.volume_id)
    assert keys(s3) == ["other", "volumes/pvc", "volumes/pvc-1", "volumes/pvc-10/a"]
    assert s3.list_multipart_uploads(Bucket=BUCKET).get("Uploads", []) == []


def test_what_was_there_before_the_volume_stays(
    service: ControllerService, s3: S3Client, parameters: dict[str, str]
) -> None:
    put(s3, "groups/hub-data/old")
    volume = create(service, {**parameters, "onDelete": "delete", "groupAnnotation": "primehub.io/group"})
    put(s3, "groups/hub-data/new")
    delete(service, volume.volume_id)
    assert keys(s3) == ["groups/hub-data/new", "groups/hub-data/old"]


@pytest.mark.parametrize("shared", ["volumes", "volumes/x", "volumes/x/y"])
def test_what_another_volume_shares_stays(
    service: ControllerService, s3: S3Client, parameters: dict[str, str], shared: str
) -> None:
    volume = create(service, {**parameters, "onDelete": "delete", "prefixTemplate": "volumes/x"})
    other = create(service, {**parameters, "prefixTemplate": shared}, "pvc-2")
    put(s3, "volumes/x/y/a")
    delete(service, volume.volume_id)
    assert "volumes/x/y/a" in keys(s3)
    delete(service, other.volume_id)


@pytest.mark.parametrize(
    "volume_id",
    [
        "data-id",
        "phfs://volumes/never-made",
        "phfs://volumes/",
        "phfs://volumes/a/b",
        "phfs://volumes/..%2F..",
        "phfs://volumes/pvc-1?prefix=groups/",
        "phfs://volumes/pvc-1?endpoint=file:///etc",
        "phfs://u:p@volumes/pvc-1",
    ],
)
def test_ids_that_somebody_made_up_delete_nothing(
    service: ControllerService, s3: S3Client, server: Server, volume_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint_url)
    put(s3, "a", "groups/b")
    delete(service, volume_id)
    assert keys(s3) == ["a", "groups/b"]


@pytest.mark.parametrize(
    "forged",
    [
        {"prefix": ""},
        {"prefix": "groups"},
        {"prefix": "../"},
        {"prefix": "/"},
        {"name": "pvc-2"},
        {"version": 2},
        {"quota_bytes": "many"},
        {"on_delete": "all"},
        {"more": 1},
    ],
)
def test_records_that_somebody_wrote_into_the_bucket_delete_nothing(
    service: ControllerService, s3: S3Client, parameters: dict[str, str], forged: dict[str, Any]
) -> None:
    volume = create(service, {**parameters, "onDelete": "delete"})
    key = ".phfs/volumes/pvc-1.json"
    record = json.loads(s3.get_object(Bucket=BUCKET, Key=key)["Body"].read())
    s3.put_object(Bucket=BUCKET, Key=key, Body=json.dumps({**record, **forged}).encode())
    put(s3, "groups/b")
    with pytest.raises(CsiError, match="record"):
        delete(service, volume.volume_id)
    assert keys(s3) == [key, "groups/b"]


@pytest.mark.parametrize(
    "forged",
    [
        {"prefix": "groups/victim/"},
        {"prefix": "groups/victim/", "on_delete": "delete"},
        {"prefix": "groups/victim/", "on_delete": "delete", "had_objects": False},
        {"on_delete": "delete"},
        {"prefix": "volumes/"},
    ],
)
@pytest.mark.parametrize("policy", ["retain", "delete"])
def test_a_record_that_a_user_changed_directs_no_deletion(
    service: ControllerService, s3: S3Client, parameters: dict[str, str], forged: dict[str, Any], policy: str
) -> None:
    told: list[tuple[str, str]] = []
    volume = create(service, {**parameters, "onDelete": policy})
    key = ".phfs/volumes/pvc-1.json"
    record = json.loads(s3.get_object(Bucket=BUCKET, Key=key)["Body"].read())
    before = (record["prefix"], record["on_delete"])
    record |= forged
    s3.put_object(Bucket=BUCKET, Key=key, Body=json.dumps(record).encode())
    put(s3, "groups/victim/a", "volumes/other/b")
    delete(a_service(told=told), volume.volume_id)
    assert {"groups/victim/a", "volumes/other/b"} <= set(keys(s3))
    assert [name for name, _ in told] == ["pvc-1"] * ((record["prefix"], record["on_delete"]) != before)


def test_what_was_there_when_the_record_says_otherwise_stays(
    service: ControllerService, s3: S3Client, parameters: dict[str, str]
) -> None:
    """Also by the second of two calls that make the volume, when the record was changed between them."""
    wanted = {**parameters, "onDelete": "delete", "prefixTemplate": "groups/victim"}
    put(s3, "groups/victim/a")
    create(service, wanted)
    key = ".phfs/volumes/pvc-1.json"
    record = json.loads(s3.get_object(Bucket=BUCKET, Key=key)["Body"].read())
    s3.put_object(Bucket=BUCKET, Key=key, Body=json.dumps({**record, "had_objects": False}).encode())
    delete(service, create(service, wanted).volume_id)
    assert "groups/victim/a" in keys(s3)


def test_an_id_without_a_mac_is_released_with_an_event(
    service: ControllerService, s3: S3Client, parameters: dict[str, str]
) -> None:
    told: list[tuple[str, str]] = []
    volume = create(a_service(keys=()), {**parameters, "onDelete": "delete"})
    assert "mac" not in volume.volume_id
    put(s3, "volumes/pvc-1/a")
    delete(a_service(told=told), volume.volume_id)
    assert keys(s3) == [".phfs/volumes/pvc-1.json", "volumes/pvc-1/a"]
    ((name, text),) = told
    assert (name, "no MAC" in text) == ("pvc-1", True)


def test_a_mac_of_another_volume_or_key_deletes_nothing(
    service: ControllerService, s3: S3Client, parameters: dict[str, str]
) -> None:
    wanted = {**parameters, "onDelete": "delete"}
    one = create(service, wanted)
    other = create(service, {**wanted, "csi.storage.k8s.io/pv/name": "pvc-2"}, "pvc-2")
    put(s3, "volumes/pvc-1/a", "volumes/pvc-2/a")
    mac = one.volume_id.rpartition("=")[2]
    delete(service, other.volume_id.rpartition("=")[0] + "=" + mac)
    delete(a_service(keys=["3" * 32]), one.volume_id)
    assert {"volumes/pvc-1/a", "volumes/pvc-2/a"} <= set(keys(s3))


def test_keys_rotate(service: ControllerService, s3: S3Client, parameters: dict[str, str]) -> None:
    volume = create(service, {**parameters, "onDelete": "delete"})
    new = "9" * 32
    rotated = create(a_service([new, *KEYS]), {**parameters, "onDelete": "delete"}).volume_id
    assert rotated != volume.volume_id  # the first key signs
    put(s3, "volumes/pvc-1/a")
    delete(a_service([new, *KEYS]), volume.volume_id)
    assert "volumes/pvc-1/a" not in keys(s3)


def expand(
    service: ControllerService, volume_id: str, size: int, limit: int = 0
) -> csi_pb2.ControllerExpandVolumeResponse:
    wanted = csi_pb2.CapacityRange(required_bytes=size, limit_bytes=limit)
    request = csi_pb2.ControllerExpandVolumeRequest(volume_id=volume_id, capacity_range=wanted)
    return service.ControllerExpandVolume(request, CONTEXT)


def test_expand_raises_the_quota_that_nodes_read(
    service: ControllerService, server: Server, parameters: dict[str, str]
) -> None:
    made = create(service, parameters)
    credentials = Credentials(access_key=server.access_key, secret_key=server.secret_key)
    volume = VolumeParams(volume_id=made.volume_id, source="", credentials=credentials)
    assert quota_now(volume, 60) == GIB
    answer = expand(service, made.volume_id, 3 * GIB)
    assert (answer.capacity_bytes, answer.node_expansion_required) == (3 * GIB, True)
    assert expand(service, made.volume_id, 2 * GIB).capacity_bytes == 3 * GIB
    assert quota_now(volume, 60) == 3 * GIB
    assert create(service, parameters).capacity_bytes == 3 * GIB  # a repeated call after it
    with pytest.raises(OutOfRange):
        expand(service, made.volume_id, GIB, limit=2 * GIB)


def test_expand_of_what_is_not_there(service: ControllerService, server: Server) -> None:
    for volume_id in ("data-id", f"phfs://{BUCKET}/never?endpoint={server.endpoint_url}"):
        with pytest.raises(NotFound):
            expand(service, volume_id, GIB)


def test_nodes_go_on_without_the_record(caplog: pytest.LogCaptureFixture) -> None:
    assert quota_now(VolumeParams(volume_id="data-id", source="")) is None
    with servers.unreachable() as url:
        credentials = Credentials(access_key="a", secret_key="b")
        volume = VolumeParams(volume_id=f"phfs://{BUCKET}/x?endpoint={url}", source="", credentials=credentials)
        with caplog.at_level(logging.WARNING):
            assert quota_now(volume, 0.5) is None
    assert "taken from its context" in caplog.text


def test_validate(service: ControllerService, parameters: dict[str, str]) -> None:
    volume = create(service, parameters)

    def ask(**fields: Any) -> csi_pb2.ValidateVolumeCapabilitiesResponse:
        request = csi_pb2.ValidateVolumeCapabilitiesRequest(**{"volume_capabilities": [SHARED], **fields})
        return service.ValidateVolumeCapabilities(request, CONTEXT)

    assert ask(volume_id=volume.volume_id).HasField("confirmed")
    assert ask(volume_id="static", volume_context={"bucket": "b-1"}).HasField("confirmed")
    block = csi_pb2.VolumeCapability(block=csi_pb2.VolumeCapability.BlockVolume())
    assert not ask(volume_id=volume.volume_id, volume_capabilities=[block]).HasField("confirmed")
    with pytest.raises(NotFound):
        ask(volume_id="static")
    with pytest.raises(InvalidArgument):
        ask(volume_id="static", volume_context={"bukcet": "b-1"})
    with pytest.raises(InvalidArgument):
        ask(volume_id=volume.volume_id, volume_capabilities=[])
    with pytest.raises(InvalidArgument):
        ask()


def test_of_two_controllers_one_makes_the_volume(
    service: ControllerService, parameters: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = create(service, parameters)
    find, looks = catalog.find, []

    async def too_early(*arguments: Any) -> Any:
        """The first look is before the other one has written."""
        looks.append(arguments)
        return None if len(looks) == 1 else await find(*arguments)

    monkeypatch.setattr(catalog, "find", too_early)
    assert create(service, parameters) == made
    looks.clear()
    with pytest.raises(AlreadyExists):
        create(service, {**parameters, "uid": "7"})


def test_a_deletion_that_was_cut_off_goes_on_with_the_next_call(
    service: ControllerService, s3: S3Client, parameters: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    volume = create(service, {**parameters, "onDelete": "delete"})
    put(s3, *(f"volumes/pvc-1/{number}" for number in range(5)))
    monkeypatch.setattr(catalog, "PAGE", 2)
    whole, calls = S3Store.delete_many, []

    async def fails_later(store: S3Store, names: Any) -> Any:
        calls.append(names)
        return (
            await whole(store, names)
            if len(calls) == 1
            else {(key := next(iter(names))): AccessDenied("delete", key)}
        )

    monkeypatch.setattr(S3Store, "delete_many", fails_later)
    with pytest.raises(AccessDenied):
        delete(service, volume.volume_id)
    assert len(keys(s3)) == 4  # the record too
    monkeypatch.setattr(S3Store, "delete_many", whole)
    delete(service, volume.volume_id)
    assert keys(s3) == []


def test_the_deadline_of_the_caller_is_kept(service: ControllerService) -> None:
    class Hurried:
        def time_remaining(self) -> float:
            return 1.0

    hurried = cast("grpc.ServicerContext", Hurried())
    with servers.silent() as url:
        request = create_request({"bucket": BUCKET, "endpoint": url})
        with pytest.raises(DeadlineExceeded):
            service.CreateVolume(request, hurried)


def test_a_second_call_for_a_volume_at_work_is_aborted(s3: S3Client, parameters: dict[str, str]) -> None:
    asked, go_on = threading.Event(), threading.Event()

    def slow(namespace: str, name: str) -> Mapping[str, str]:
        asked.set()
        assert go_on.wait(60)
        return {"g": "x"}

    service = ControllerService(annotations=slow)
    with_annotation = {**parameters, "groupAnnotation": "g"}
    first = threading.Thread(target=create, args=(service, with_annotation))
    first.start()
    assert asked.wait(60)
    with pytest.raises(Aborted):
        create(service, with_annotation)
    go_on.set()
    first.join(60)
    assert create(service, with_annotation).volume_context["prefix"] == "groups/x/"


@pytest.mark.parametrize("name", ["pvc-1", "a b", "ä/../x", "%2F", "x" * 250, "?&=#"])
def test_ids_come_back_as_they_went(service: ControllerService, parameters: dict[str, str], name: str) -> None:
    volume = create(
        service, {**parameters, "prefixTemplate": "volumes/x", "region": "eu-west-1", "pathStyle": "true"}, name
    )
    found = parse_volume_id(volume.volume_id)
    assert found is not None
    assert (found.name, found.region, str(found)) == (name, "eu-west-1", volume.volume_id)
    delete(service, volume.volume_id)

"""The Controller service: a claim gets a prefix, its size becomes the quota.

State: the volumes that a call is at work on. What there is of a volume is in its record
(`phfs_csi.provision.catalog`).
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final, TypeVar

import grpc

from phfs_csi.errors import AlreadyExists, CsiError, InvalidArgument, NotFound, OutOfRange
from phfs_csi.proto import csi_pb2, csi_pb2_grpc
from phfs_csi.provision import catalog
from phfs_csi.provision.catalog import OnDelete, Record
from phfs_csi.provision.cluster import Cluster
from phfs_csi.provision.id_keys import IdKeys
from phfs_csi.request.attributes import Given, group_prefix, parse_volume
from phfs_csi.request.node_requests import access_mode, capacity, volume_id_of
from phfs_csi.request.params import VolumeParams
from phfs_csi.request.prefix_template import DEFAULT, METADATA, Annotations, Claim, filled
from phfs_csi.request.volume_id import NAME_BYTES_MAX, VolumeId, parse_volume_id
from phfs_csi.volume_locks import VolumeLocks
from phfs_fuse.errors import BucketNotFound, VersionChanged
from phfs_fuse.store.base import ObjectStore
from phfs_fuse.types import ETag

log = logging.getLogger(__name__)
T = TypeVar("T")

CALL_SECONDS: Final = 60.0  # where the caller names no deadline
_MARGIN: Final = 0.9  # of the caller's time, so that our answer is the one that arrives
RELEASED: Final = "VolumeReleased"  # the reason of an event
_PROVISIONING: Final = ("prefixTemplate", "groupAnnotation", "onDelete")
_OF_THE_CLAIM: Final = {  # not for a StorageClass, and what is
    "prefix": "use prefixTemplate",
    "group": "use groupAnnotation or prefixTemplate",
    "quota": "the size of the claim is the quota",
}
_Capability = csi_pb2.ControllerServiceCapability
_RPC = _Capability.RPC


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """A CreateVolume that was checked."""

    record: Record
    id: VolumeId
    volume: VolumeParams
    limit_bytes: int  # 0: none

    @property
    def creates_bucket(self) -> bool:
        return self.volume.settings.get("create-bucket", "false").lower() in ("true", "yes", "on", "1")


Tell = Callable[[str, str], None]
"""(name of a PersistentVolume, what happened): an event for its user."""


def _in_cluster(namespace: str, name: str) -> Mapping[str, str]:
    return Cluster.around().annotations(namespace, name)


def _event(volume: str, text: str) -> None:
    try:
        Cluster.around().warn_volume(volume, RELEASED, text)
    except CsiError as exc:
        log.info("no event for volume %s: %s", volume, exc)


class ControllerService(csi_pb2_grpc.ControllerServicer):
    """`defaults` is the plugin's secret, for classes that name none; `keys` sign the ids of volumes."""

    def __init__(
        self,
        defaults: Callable[[], Mapping[str, str]] = dict,
        annotations: Annotations = _in_cluster,
        keys: Callable[[], IdKeys] = IdKeys,
        tell: Tell = _event,
    ) -> None:
        self._defaults = defaults
        self._annotations = annotations
        self._keys = keys
        self._tell = tell
        self._busy = VolumeLocks()

    def CreateVolume(
        self, request: csi_pb2.CreateVolumeRequest, context: grpc.ServicerContext
    ) -> csi_pb2.CreateVolumeResponse:
        """The same call again gives the same volume. Raises: AlreadyExists for the name with other parameters."""
        with self._busy.hold(request.name):
            wish = self._wish(request)

            keys = self._keys()

            async def work(store: ObjectStore) -> tuple[Record, OnDelete]:
                return await _create(store, wish)

            record, policy = catalog.with_store(wish.id.store, wish.volume.credentials, _seconds(context), work)
            volume_id = keys.signed(wish.id, record.prefix, policy.value)
            if policy is OnDelete.DELETE and not volume_id.mac:
                log.warning(
                    "volume %s: there is no key for its id (--id-keys): nothing of it will be deleted", wish.id
                )
        return csi_pb2.CreateVolumeResponse(volume=_volume(volume_id, record))

    def DeleteVolume(
        self, request: csi_pb2.DeleteVolumeRequest, context: grpc.ServicerContext
    ) -> csi_pb2.DeleteVolumeResponse:
        """A volume that is not there is deleted. Data goes only where the record of the volume says so, and the id by
        its MAC the same; else the volume is released, and all that belongs to it stays."""
        text = volume_id_of(request)
        if (found := _known(text)) is None:
            log.info("nothing to delete, not a volume of this plugin: %s", ascii(text))
            return csi_pb2.DeleteVolumeResponse()
        with self._busy.hold(found.name):
            keys = self._keys()

            async def work(store: ObjectStore) -> str:
                return await _delete(store, found, keys)

            if kept := self._with_store(found, request.secrets, context, work):
                text = f"released, and nothing of it is deleted: {kept}"
                log.warning("volume %s: %s", found, text)
                self._tell(found.name, text)
        return csi_pb2.DeleteVolumeResponse()

    def ValidateVolumeCapabilities(
        self, request: csi_pb2.ValidateVolumeCapabilitiesRequest, context: grpc.ServicerContext
    ) -> csi_pb2.ValidateVolumeCapabilitiesResponse:
        text = volume_id_of(request)
        if not request.volume_capabilities:
            raise InvalidArgument("volume_capabilities are missing")
        self._require(text, request, context)
        try:
            for wanted in request.volume_capabilities:
                access_mode(wanted)
        except InvalidArgument as exc:
            return csi_pb2.ValidateVolumeCapabilitiesResponse(message=str(exc))
        return csi_pb2.ValidateVolumeCapabilitiesResponse(
            confirmed=csi_pb2.ValidateVolumeCapabilitiesResponse.Confirmed(
                volume_context=request.volume_context,
                volume_capabilities=request.volume_capabilities,
                parameters=request.parameters,
            )
        )

    def ControllerExpandVolume(
        self, request: csi_pb2.ControllerExpandVolumeRequest, context: grpc.ServicerContext
    ) -> csi_pb2.ControllerExpandVolumeResponse:
        """Raise the quota in the record; nodes that have the volume are told by NodeExpandVolume."""
        text = volume_id_of(request)
        required, limit = capacity(request.capacity_range)
        if not required and not limit:
            raise InvalidArgument("capacity_range is missing")
        if (found := _known(text)) is None:
            raise NotFound("volume_id: not a volume that this plugin has made, its size is an attribute")
        with self._busy.hold(found.name):

            async def work(store: ObjectStore) -> Record:
                return await _expand(store, found, required, limit)

            record = self._with_store(found, request.secrets, context, work)
        return csi_pb2.ControllerExpandVolumeResponse(capacity_bytes=record.quota_bytes, node_expansion_required=True)

    def ControllerGetCapabilities(
        self, request: csi_pb2.ControllerGetCapabilitiesRequest, context: grpc.ServicerContext
    ) -> csi_pb2.ControllerGetCapabilitiesResponse:
        kinds = (_RPC.CREATE_DELETE_VOLUME, _RPC.EXPAND_VOLUME, _RPC.SINGLE_NODE_MULTI_WRITER)
        return csi_pb2.ControllerGetCapabilitiesResponse(
            capabilities=[_Capability(rpc=_RPC(type=kind)) for kind in kinds]
        )

    # --- what is asked for

    def _wish(self, request: csi_pb2.CreateVolumeRequest) -> Wish:
        """Everything is checked here, before anything is done."""
        name = _name(request.name)
        if not request.volume_capabilities:
            raise InvalidArgument("volume_capabilities are missing")
        for wanted in request.volume_capabilities:
            access_mode(wanted)
        if request.volume_content_source.WhichOneof("type"):
            raise InvalidArgument("volume_content_source: there are no snapshots and clones here")
        required, limit = capacity(request.capacity_range)
        parameters = {key: text for key, text in request.parameters.items() if not key.startswith(METADATA)}
        for key in sorted(set(parameters) & set(_OF_THE_CLAIM)):
            raise InvalidArgument(f"StorageClass parameter {key!r}: {_OF_THE_CLAIM[key]}")
        on_delete = _on_delete(parameters.get("onDelete", "retain"))
        attributes = {key: text for key, text in parameters.items() if key not in _PROVISIONING}
        attributes["prefix"] = self._prefix(parameters, self._claim(name, request.parameters))
        given = Given(attributes=attributes, secrets=request.secrets, defaults=self._defaults())
        volume = parse_volume(name, given)
        bucket, prefix = _place(volume)
        record = Record(
            name=name, prefix=prefix, quota_bytes=required or limit, on_delete=on_delete,
            context={**attributes, "bucket": bucket, "prefix": prefix},
        )  # fmt: skip
        return Wish(record=record, id=catalog.id_of(volume, bucket, name), volume=volume, limit_bytes=limit)

    def _claim(self, name: str, parameters: Mapping[str, str]) -> Claim:
        return Claim(
            pv_name=parameters.get(f"{METADATA}pv/name", name),
            namespace=parameters.get(f"{METADATA}pvc/namespace", ""),
            name=parameters.get(f"{METADATA}pvc/name", ""),
            annotations=self._annotations,
        )

    def _prefix(self, parameters: Mapping[str, str], claim: Claim) -> str:
        """Ends in "/". Raises: InvalidArgument."""
        if "groupAnnotation" in parameters:
            if "prefixTemplate" in parameters:
                raise InvalidArgument(
                    "StorageClass parameters 'prefixTemplate' and 'groupAnnotation' exclude each other"
                )
            return group_prefix(claim.annotation(parameters["groupAnnotation"]))
        prefix = filled(parameters.get("prefixTemplate", DEFAULT), claim)
        prefix = prefix if prefix.endswith("/") else prefix + "/"
        if prefix == "/" or prefix.startswith(catalog.FOLDER):
            raise InvalidArgument("prefixTemplate: gives no prefix of the volume's own")
        return prefix

    # --- the store

    def _with_store(
        self,
        found: VolumeId,
        secrets: Mapping[str, str],
        context: grpc.ServicerContext,
        work: Callable[[ObjectStore], Awaitable[T]],
    ) -> T:
        given = Given(attributes=found.attributes, secrets=secrets, defaults=self._defaults())
        credentials = parse_volume(str(found), given).credentials
        return catalog.with_store(found.store, credentials, _seconds(context), work)

    def _require(
        self, text: str, request: csi_pb2.ValidateVolumeCapabilitiesRequest, context: grpc.ServicerContext
    ) -> None:
        """Raises: NotFound unless it is a volume of ours, or a static one whose attributes are right."""
        if (found := _known(text)) is None:
            if not request.volume_context:
                raise NotFound("volume_id: there is no such volume")
            parse_volume(
                text, Given(attributes=request.volume_context, secrets=request.secrets, defaults=self._defaults())
            )
            return

        async def work(store: ObjectStore) -> Record:
            return (await _found(store, found))[0]

        self._with_store(found, request.secrets, context, work)


def _name(text: str) -> str:
    if not text:
        raise InvalidArgument("name is missing")
    if len(text.encode()) > NAME_BYTES_MAX or not text.isprintable():
        raise InvalidArgument("name: unprintable, or too long")
    return text


def _on_delete(text: str) -> OnDelete:
    try:
        return OnDelete(text)
    except ValueError:
        raise InvalidArgument(
            f"StorageClass parameter 'onDelete': {text[:80]!r} is neither retain nor delete"
        ) from None


def _place(volume: VolumeParams) -> tuple[str, str]:
    bucket, _, prefix = volume.source.removeprefix("s3://").partition("/")
    return bucket, prefix


def _known(text: str) -> VolumeId | None:
    """None: not one of ours, also when it looks like one."""
    try:
        return parse_volume_id(text)
    except InvalidArgument:
        return None


def _seconds(context: grpc.ServicerContext) -> float:
    left = context.time_remaining()
    return min(CALL_SECONDS if left is None else left * _MARGIN, 600.0)


def _volume(volume_id: VolumeId, record: Record) -> csi_pb2.Volume:
    quota = {"quota": str(record.quota_bytes)} if record.quota_bytes else {}
    return csi_pb2.Volume(
        volume_id=str(volume_id), capacity_bytes=record.quota_bytes, volume_context={**record.context, **quota}
    )


# --- the work on one volume


async def _create(store: ObjectStore, wish: Wish) -> tuple[Record, OnDelete]:
    """The record, and what is to become of the objects: of those that are not the volume's own nothing."""
    want = wish.record
    await store.check_bucket(create=wish.creates_bucket)
    if (found := await catalog.find(store, wish.id.bucket, want.name)) is None:
        record = replace(want, had_objects=await catalog.has_objects(store, want.prefix))
        try:
            await catalog.save(store, record, None)
        except VersionChanged:  # another controller was faster
            found = await _found(store, wish.id)
        else:
            log.info("volume %s: made at s3://%s/%s", wish.id, wish.id.bucket, want.prefix)
            return record, _policy(record)
    record = replace(found[0], had_objects=found[0].had_objects or await catalog.has_objects(store, want.prefix))
    if (record.prefix, record.on_delete, record.context) != (want.prefix, want.on_delete, want.context):
        raise AlreadyExists("name: there is a volume of that name with other parameters")
    if record.quota_bytes < want.quota_bytes or 0 < wish.limit_bytes < record.quota_bytes:
        raise AlreadyExists(f"name: there is a volume of that name with {record.quota_bytes} bytes")
    return record, _policy(record)


def _policy(record: Record) -> OnDelete:
    return OnDelete.RETAIN if record.had_objects else record.on_delete


async def _delete(store: ObjectStore, volume_id: VolumeId, keys: IdKeys) -> str:
    """Why the volume is only released, with all that belongs to it; "": it is deleted, as its policy is."""
    try:
        found = await catalog.find(store, volume_id.bucket, volume_id.name)
    except BucketNotFound:
        return ""
    if found is None:
        return ""
    record = found[0]
    if not volume_id.mac:
        return "its id has no MAC: it was made by an older version, or without a key for ids"
    if not keys.has_signed(volume_id, record.prefix, _policy(record).value):
        return "its record in the bucket, or the key for ids, is another one than when it was made"
    if reason := await _reason_to_retain(store, volume_id.bucket, record):
        log.info("volume %s: s3://%s/%s is left as it is: %s", volume_id, volume_id.bucket, record.prefix, reason)
    else:
        count = await catalog.delete_tree(store, record.prefix)
        log.info("volume %s: deleted %d objects below %s", volume_id, count, record.prefix)
    await catalog.remove(store, volume_id.name)
    return ""


async def _reason_to_retain(store: ObjectStore, bucket: str, record: Record) -> str:
    if record.on_delete is OnDelete.RETAIN:
        return "onDelete is retain"
    if record.had_objects:
        return "it had objects before the volume was made"
    others = await catalog.sharers(store, bucket, record)
    return f"it is shared with {others[0]}" if others else ""


async def _expand(store: ObjectStore, volume_id: VolumeId, required: int, limit: int) -> Record:
    record, etag = await _found(store, volume_id)
    if 0 < limit < record.quota_bytes:
        raise OutOfRange(f"capacity_range: the volume has {record.quota_bytes} bytes already")
    if required <= record.quota_bytes:
        return record
    bigger = replace(record, quota_bytes=required)
    await catalog.save(store, bigger, etag)
    log.info("volume %s: may have %d bytes", volume_id, required)
    return bigger


async def _found(store: ObjectStore, volume_id: VolumeId) -> tuple[Record, ETag]:
    found = await catalog.find(store, volume_id.bucket, volume_id.name)
    if found is None:
        raise NotFound(f"there is no volume {volume_id}")
    return found

"""Records of provisioned volumes, objects in the volume's own bucket: `.phfs/volumes/NAME.json`.

A record says which prefix the volume is, how big it may get, and what its deletion may delete. It is written under a
condition, so that of two controllers one wins. Nodes read the quota from it, since the context of a volume never
changes. Owns no state; what is read from the bucket is as hostile as a request.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from functools import cache
from typing import Any, Final, TypeVar
from urllib.parse import quote, unquote

import botocore.loaders
import botocore.session
import trio

from phfs_csi.errors import CsiError, DeadlineExceeded, FailedPrecondition
from phfs_csi.request.attributes import checked_prefix
from phfs_csi.request.params import Credentials, VolumeParams
from phfs_csi.request.volume_id import VolumeId, parse_volume_id
from phfs_fuse.config import json_text
from phfs_fuse.config.model import StoreConfig
from phfs_fuse.errors import NotFound, PhfsError
from phfs_fuse.store.base import Expect, ObjectStore
from phfs_fuse.store.boto import BotoTransport
from phfs_fuse.store.s3 import S3Store
from phfs_fuse.types import SIZE_BYTES_MAX, ETag, ObjectKey

log = logging.getLogger(__name__)
T = TypeVar("T")

FOLDER: Final = ".phfs/"
RECORDS: Final = f"{FOLDER}volumes/"
VERSION: Final = 1
PAGE = 1000  # keys of one request to delete
RECORD_BYTES_MAX: Final = 64 << 10
QUOTA_SECONDS: Final = 5.0  # a stage waits this long for the size, then takes the one it was made with
_CLOSE_SECONDS: Final = 5.0


class OnDelete(Enum):
    RETAIN = "retain"
    DELETE = "delete"


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    name: str
    prefix: str  # ends in "/", never ""
    quota_bytes: int  # 0: none
    on_delete: OnDelete = OnDelete.RETAIN
    had_objects: bool = False  # before the volume was made: they are not the volume's to delete
    context: Mapping[str, str] = field(default_factory=dict)  # of the volume, without its quota

    def dump(self) -> bytes:
        return json.dumps({"version": VERSION, **asdict(self), "on_delete": self.on_delete.value}).encode()


def load_record(bucket: str, name: str, text: bytes) -> Record:
    """Raises: FailedPrecondition when it is no record of that name, or one of a newer plugin."""
    try:
        data: Any = json_text.parse(text)
        if data.pop("version") != VERSION or data["name"] != name or not data["prefix"].endswith("/"):
            raise ValueError
        context = {str(key): str(value) for key, value in data.pop("context").items()}
        found = Record(**{**data, "on_delete": OnDelete(data["on_delete"])}, context=context)
        if (
            type(found.quota_bytes) is not int
            or not 0 <= found.quota_bytes <= SIZE_BYTES_MAX
            or type(found.had_objects) is not bool
        ):
            raise ValueError
        checked_prefix(bucket, found.prefix)
    except (ValueError, KeyError, TypeError, AttributeError, CsiError):
        raise FailedPrecondition(f"s3://{bucket}/{record_key(name)}: not a record that this plugin knows") from None
    return found


def record_key(name: str) -> ObjectKey:
    return ObjectKey(f"{RECORDS}{quote(name, safe='')}.json")


# --- calls to the store, from a thread of the server


def with_store(
    config: StoreConfig, credentials: Credentials, seconds: float, work: Callable[[ObjectStore], Awaitable[T]]
) -> T:
    """Blocks. Raises: DeadlineExceeded, and what `work` raises."""

    within = replace(config, prefix=FOLDER)  # what the store tries out is tried out there

    async def main(core: botocore.session.Session) -> T:
        store = S3Store(within, BotoTransport(within, core))
        try:
            with trio.fail_after(seconds):
                return await work(store)
        finally:
            with trio.move_on_after(_CLOSE_SECONDS, shield=True):
                await store.aclose()

    try:
        with _session(credentials) as core:
            return trio.run(main, core)
    except trio.TooSlowError:
        raise DeadlineExceeded(f"{config.url}: the store did not answer in time") from None


@cache
def _model_loader() -> botocore.loaders.Loader:
    """The description of S3 is a megabyte of JSON: read once, not at each call."""
    return botocore.loaders.create_loader()


@contextmanager
def _session(credentials: Credentials) -> Iterator[botocore.session.Session]:
    """With the credentials of the volume, in memory alone; without any the environment's."""
    core = botocore.session.get_session()
    core.register_component("data_loader", _model_loader())
    if credentials.access_key:
        core.set_credentials(credentials.access_key, credentials.secret_key, credentials.session_token or None)
    if not credentials.ca_bundle:
        yield core
        return
    with tempfile.NamedTemporaryFile("w", prefix="phfs-ca-", suffix=".pem") as file:
        file.write(credentials.ca_bundle)
        file.flush()
        core.set_config_variable("ca_bundle", file.name)
        yield core


async def find(store: ObjectStore, bucket: str, name: str) -> tuple[Record, ETag] | None:
    """The record and its version; None: there is no such volume."""
    try:
        info = await store.head(record_key(name))
        if info.size > RECORD_BYTES_MAX:
            raise FailedPrecondition(f"s3://{bucket}/{info.key}: too big for a record")
        text = bytearray()
        await store.get(info.key, 0, info.size, etag=info.etag, sink=lambda _offset, chunk: text.extend(chunk))
    except NotFound:
        return None
    return load_record(bucket, name, bytes(text)), info.etag


async def save(store: ObjectStore, record: Record, etag: ETag | None) -> None:
    """`etag` is of the version that it replaces; None: a new one. Raises: VersionChanged."""
    await store.put(record_key(record.name), record.dump(), {}, expect=Expect(etag))


async def remove(store: ObjectStore, name: str) -> None:
    await store.delete(record_key(name))


async def has_objects(store: ObjectStore, prefix: str) -> bool:
    page = await store.list(prefix, delimiter=False, count_max=1)
    return bool(page.objects)


async def sharers(store: ObjectStore, bucket: str, record: Record) -> Sequence[str]:
    """Names of other volumes whose prefix is within that of `record`, or the other way round."""
    found, token = [], None
    while True:
        page = await store.list(RECORDS, delimiter=False, token=token)
        for info in (info for info in page.objects if info.key.endswith(".json")):
            other = await _other(store, bucket, info.key)
            if other is None or (other.name != record.name and _overlap(other.prefix, record.prefix)):
                found.append(other.name if other else info.key)
        if (token := page.next_token) is None:
            return found


async def _other(store: ObjectStore, bucket: str, key: ObjectKey) -> Record | None:
    """None: one that cannot be read, which may be of any prefix."""
    name = unquote(key.removeprefix(RECORDS).removesuffix(".json"))
    try:
        found = await find(store, bucket, name)
    except FailedPrecondition:
        return None
    return found[0] if found else Record(name=name, prefix="\0", quota_bytes=0)  # went meanwhile: overlaps nothing


def _overlap(one: str, other: str) -> bool:
    return one.startswith(other) or other.startswith(one)


async def delete_tree(store: ObjectStore, prefix: str) -> int:
    """Delete every object whose key begins with `prefix`, a thousand at a time; returns how many.

    Uploads that were begun there are aborted first. Raises: PhfsError for the first that cannot be deleted; called
    again it goes on.
    """
    assert prefix.endswith("/")
    for upload in await store.list_multipart(prefix):
        await store.abort_multipart(upload.key, upload.upload_id)
    count = 0
    while True:
        page = await store.list(prefix, delimiter=False, count_max=PAGE)
        keys = [info.key for info in page.objects if info.key.startswith(prefix)]
        if not keys:
            return count
        for failure in (await store.delete_many(dict.fromkeys(keys))).values():
            raise failure
        count += len(keys)


# --- for nodes


def quota_now(volume: VolumeParams, seconds: float = QUOTA_SECONDS) -> int | None:
    """Bytes that a provisioned volume may have now, 0: any; None: not one, or the store does not tell."""
    try:
        if (found := parse_volume_id(volume.volume_id)) is None:
            return None
        record = with_store(
            found.store, volume.credentials, seconds, lambda store: find(store, found.bucket, found.name)
        )
    except (CsiError, PhfsError) as exc:
        log.warning("volume %s: its size is taken from its context: %s", volume.volume_id, exc)
        return None
    return record[0].quota_bytes if record is not None else None


def id_of(volume: VolumeParams, bucket: str, name: str) -> VolumeId:
    return VolumeId(
        bucket=bucket,
        name=name,
        endpoint=volume.settings.get("endpoint-url", "").rstrip("/"),
        region=volume.settings.get("region", ""),
        path_style=volume.settings.get("path-style", ""),
    )

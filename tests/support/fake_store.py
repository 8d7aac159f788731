"""An `ObjectStore` in memory with the semantics of S3. Owns the objects and a count of the requests.

The contract suite runs on it and on real servers, so that what is tested over it can be trusted.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf

import trio

from phfs_fuse.errors import (
    BadAnswer,
    BucketNotFound,
    CredentialsRefused,
    InvalidArgument,
    NameTooLong,
    NotFound,
    NotSupported,
    PhfsError,
    StoreUnavailable,
    TooLarge,
    VersionChanged,
)
from phfs_fuse.store.base import (
    LOOK_SECONDS,
    Body,
    Expect,
    Listener,
    Listing,
    ObjectInfo,
    Part,
    Properties,
    Sink,
    StoreEvent,
    Upload,
    content_type,
    metadata_bytes,
)
from phfs_fuse.store.bodies import md5_etag, multipart_etag
from phfs_fuse.store.error_codes import check_key, check_metadata, check_text
from phfs_fuse.store.limits import USUAL, longest_segments
from phfs_fuse.types import S3_PART_BYTES_MIN, ETag, ObjectKey

SECOND_NS = 1_000_000_000
CHUNK_BYTES = 64 * 1024
Entries = list[tuple[str, bool]]  # named here: in the class `list` is the method


@dataclass(frozen=True, slots=True)
class StoredObject:
    data: bytes
    etag: ETag
    metadata: Mapping[str, str]
    modified_ns: int
    headers: Mapping[str, str] = field(default_factory=dict)  # content type and the like
    tags: str = ""


@dataclass(slots=True)
class OpenUpload:
    key: ObjectKey
    metadata: Mapping[str, str]
    started_ns: int
    initiator: str
    properties: Properties | None = None
    parts: dict[int, bytes] = field(default_factory=dict)
    touched_ns: int | None = None


def body_bytes(body: Body) -> bytes:
    if isinstance(body, bytes):
        return body
    data = os.pread(body.fd, body.length, body.offset)
    if len(data) != body.length:
        raise BadAnswer("put", "body", f"{len(data)} of {body.length} bytes in the file")
    return data


class FakeStore:
    """One bucket in memory.

    `objects` may be read and changed by tests at will (`seed` and `data` are short for it); `requests` counts
    the calls by method name; `clock` gives nanoseconds since the epoch.
    """

    def __init__(
        self,
        *,
        lists_metadata: bool = True,
        bucket_exists: bool = True,
        part_bytes_min: int = S3_PART_BYTES_MIN,
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        self.objects: dict[ObjectKey, StoredObject] = {}
        self.uploads: dict[str, OpenUpload] = {}
        self.requests: Counter[str] = Counter()
        self.bucket_exists = bucket_exists
        self.denied = False  # True: every call is refused, as with wrong credentials
        self.is_away = False  # True: no call is answered
        self._lists_metadata = lists_metadata
        self._part_bytes_min = part_bytes_min
        self._clock = clock
        self._upload_count = 0
        self.half_deleted: set[str] = set()  # keys that a listing shows as folders, as MinIO's does for a moment
        self.segment_bytes_max = 1024  # between two slashes of a key; MinIO: 255, and 9 less for a marker
        self.marker_extra_bytes = 0
        self.limits = USUAL
        self.has_events = True
        self.is_prepared = False
        self.identity = "a user"  # of who asks; begins multipart uploads
        self._listeners: list[tuple[str, Listener]] = []
        self._cut = trio.Event()

    def seed(
        self,
        key: str,
        data: bytes = b"",
        metadata: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        tags: str = "",
    ) -> ETag:
        """Store an object as another client would; not counted as a request."""
        properties = Properties(headers=headers or {}, metadata={}, tags=tags)
        return self._store(ObjectKey(key), data, md5_etag(data), metadata or {}, properties).etag

    def remove(self, key: str) -> None:
        """Remove an object as another client would."""
        self._remove(ObjectKey(key))

    def data(self, key: str) -> bytes:
        return self.objects[ObjectKey(key)].data

    @property
    def keys(self) -> list[str]:
        return sorted(self.objects, key=str.encode)

    # -- the protocol

    def tell_new_credentials(self, call: Callable[[], None]) -> None:
        """Nobody has any."""

    @property
    def lists_metadata(self) -> bool:
        return self._lists_metadata

    @property
    def hides_below(self) -> bool:
        return False

    @property
    def lists_ghosts(self) -> bool:
        return False

    async def check_bucket(self, *, create: bool = False) -> None:
        self.bucket_exists = self.bucket_exists or create
        await self._request("check_bucket", "bucket")

    async def prepare(self) -> None:
        self.is_prepared = True

    async def require_key(self, key: ObjectKey) -> None:
        check_key("name", key)
        self._check_length("name", key)

    async def tidy(self) -> None:
        await trio.lowlevel.checkpoint()

    async def head(self, key: ObjectKey, *, surely: bool = False) -> ObjectInfo:
        await self._request("head", key)
        return self._info(key, self._existing("head", key))

    async def properties(self, key: ObjectKey, etag: ETag | None) -> Properties:
        await self._request("properties", key)
        if etag is None and (there := self.objects.get(key)) is not None:
            etag = there.etag
        found = self._version("properties", key, etag or ETag(""))
        return Properties(
            headers=found.headers, metadata=found.metadata, tags=found.tags, etag=found.etag, size=len(found.data)
        )

    async def get(self, key: ObjectKey, start: int, end: int, *, etag: ETag | None, sink: Sink) -> None:
        if start >= end:
            return
        await self._request("get", key)
        found = self.objects.get(key)
        if etag is not None and (found is None or found.etag != etag):
            raise VersionChanged("get", key, "the version is gone")
        found = self._existing("get", key)
        if end > len(found.data):
            raise BadAnswer("get", key, f"[{start}, {end}) of {len(found.data)} bytes")
        for offset in range(start, end, CHUNK_BYTES):
            sink(offset, found.data[offset : min(offset + CHUNK_BYTES, end)])
            await trio.lowlevel.checkpoint()

    async def list(
        self,
        prefix: str,
        *,
        delimiter: bool,
        token: str | None = None,
        start_after: str = "",
        count_max: int = 1000,
    ) -> Listing:
        await self._request("list", prefix)
        after = (token or start_after).encode()
        objects: list[ObjectInfo] = []
        prefixes: list[str] = []
        last = ""
        for name, rolled_up in self._entries(prefix, delimiter):
            if name.encode() <= after:
                continue
            if len(objects) + len(prefixes) == min(count_max, 1000):
                return Listing(objects=objects, prefixes=prefixes, next_token=last)
            last = name
            if rolled_up:
                prefixes.append(name)
            else:
                objects.append(self._listed(ObjectKey(name)))
        return Listing(objects=objects, prefixes=prefixes, next_token=None)

    async def put(
        self,
        key: ObjectKey,
        body: Body,
        metadata: Mapping[str, str],
        *,
        expect: Expect | None,
        properties: Properties | None = None,
    ) -> ObjectInfo:
        await self._request("put", key)
        self._check("put", key, metadata, properties)
        data = body_bytes(body)
        self._require("put", key, expect)
        return self._info(key, self._store(key, data, md5_etag(data), metadata, properties))

    async def look(self, keys: Sequence[ObjectKey]) -> Mapping[ObjectKey, ETag]:
        if keys:
            await self._request("look", keys[0])
        return {key: self.objects[key].etag for key in keys if key in self.objects}

    async def copy(
        self,
        source: ObjectKey,
        source_etag: ETag,
        key: ObjectKey,
        size: int,
        metadata: Mapping[str, str] | None,
        *,
        expect: Expect | None,
        seen_at: float = -inf,
        properties: Properties | None = None,
    ) -> ObjectInfo:
        await self._request("copy", key)
        self._check("copy", key, metadata or {}, properties)
        found = self._version("copy", source, source_etag)
        if trio.current_time() > seen_at + LOOK_SECONDS:
            self._require("copy", key, expect)
        told = found.headers if metadata is None else properties.headers if properties else {}
        kept = Properties(headers=told, metadata={}, tags=found.tags)
        metadata = found.metadata if metadata is None else metadata
        return self._info(key, self._store(key, found.data, found.etag, metadata, kept))

    async def delete(self, key: ObjectKey, *, expect: Expect | None = None) -> None:
        await self._request("delete", key)
        if key in self.objects:
            self._require("delete", key, expect)
            self._remove(key)

    async def delete_many(self, versions: Mapping[ObjectKey, ETag | None]) -> Mapping[ObjectKey, PhfsError]:
        if not versions:
            return {}
        await self._request("delete_many", next(iter(versions)))
        failed: dict[ObjectKey, PhfsError] = {}
        for key, etag in versions.items():
            found = self.objects.get(key)
            if etag is not None and found is not None and found.etag != etag:
                failed[key] = VersionChanged("delete", key, f"is {found.etag}")
            else:
                self._remove(key)
        return failed

    async def create_multipart(
        self, key: ObjectKey, metadata: Mapping[str, str], properties: Properties | None = None
    ) -> str:
        await self._request("create_multipart", key)
        self._check("create_multipart", key, metadata, properties)
        self._upload_count += 1
        upload_id = f"upload-{self._upload_count}"
        self.uploads[upload_id] = OpenUpload(key, dict(metadata), self._clock(), self.identity, properties)
        return upload_id

    async def upload_part(self, key: ObjectKey, upload_id: str, part_no: int, body: Body) -> Part:
        await self._request("upload_part", key)
        return self._store_part("upload_part", key, upload_id, part_no, body_bytes(body))

    async def upload_part_copy(
        self,
        key: ObjectKey,
        upload_id: str,
        part_no: int,
        source: ObjectKey,
        source_etag: ETag,
        start: int,
        end: int,
    ) -> Part:
        await self._request("upload_part_copy", key)
        found = self._version("upload_part_copy", source, source_etag)
        if not 0 <= start < end <= len(found.data):
            raise InvalidArgument("upload_part_copy", source, f"[{start}, {end}) of {len(found.data)} bytes")
        return self._store_part("upload_part_copy", key, upload_id, part_no, found.data[start:end])

    async def complete_multipart(
        self, key: ObjectKey, upload_id: str, parts: Sequence[Part], *, expect: Expect | None
    ) -> ObjectInfo:
        await self._request("complete_multipart", key)
        if (found := self.objects.get(key)) is not None and found.etag == multipart_etag(parts):
            return self._info(key, found)  # repeated, perhaps by a process that follows a dead one
        upload = self._upload("complete_multipart", key, upload_id)
        parts = sorted(parts, key=lambda part: part.part_no)
        chunks = [self._uploaded(key, upload, part) for part in parts]
        if not chunks or any(len(chunk) < self._part_bytes_min for chunk in chunks[:-1]):
            raise InvalidArgument("complete_multipart", key, "no parts, or too small ones")
        self._require("complete_multipart", key, expect)
        del self.uploads[upload_id]
        etag = multipart_etag(parts)
        assert etag is not None  # the parts' ETags are those that this store gave
        return self._info(key, self._store(key, b"".join(chunks), etag, upload.metadata, upload.properties))

    async def abort_multipart(self, key: ObjectKey, upload_id: str) -> None:
        await self._request("abort_multipart", key)
        self.uploads.pop(upload_id, None)

    async def list_multipart(self, prefix: str) -> Sequence[Upload]:
        await self._request("list_multipart", prefix)
        return [upload for upload in self._open_uploads() if upload.key.startswith(prefix)]

    async def uploads_of(self, key: ObjectKey) -> Sequence[Upload]:
        await self._request("uploads_of", key)
        return [upload for upload in self._open_uploads() if upload.key == key]

    async def last_part_ns(self, key: ObjectKey, upload_id: str) -> int | None:
        await self._request("last_part_ns", key)
        return self._upload("last_part_ns", key, upload_id).touched_ns

    async def time_ns(self) -> int:
        return self._clock()

    async def listen(self, prefix: str, listener: Listener) -> None:
        """Tells only while `has_events`; a test ends it by `cut_events`."""
        await self._request("listen", prefix)
        if not self.has_events:
            raise NotSupported("listen", prefix, "no stream of events")
        self._listeners.append((prefix, listener))
        listener.opened()
        self._cut = trio.Event()
        await self._cut.wait()
        raise StoreUnavailable("listen", prefix, "cut")

    def cut_events(self) -> None:
        """The streams end; what changes until they are opened again is told to nobody."""
        self._listeners.clear()
        self._cut.set()

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()

    # -- inside

    async def _request(self, method: str, key: str) -> None:
        self.requests[method] += 1
        await trio.lowlevel.checkpoint()
        if method in ("list", "list_multipart"):
            check_text(method, key)
        else:
            check_key(method, key)
        if self.is_away:
            raise StoreUnavailable(method, key, "ConnectionRefused")
        if self.denied:
            raise CredentialsRefused(method, key, "SignatureDoesNotMatch")
        if not self.bucket_exists:
            raise BucketNotFound(method, key, "NoSuchBucket")

    def _check(self, op: str, key: ObjectKey, metadata: Mapping[str, str], properties: Properties | None) -> None:
        check_metadata(op, key, metadata, properties)
        self._check_length(op, key)
        if metadata_bytes(metadata) > self.limits.metadata_bytes_max:
            raise TooLarge(op, key, "MetadataTooLarge")

    def _check_length(self, op: str, key: ObjectKey) -> None:
        for length, is_marker in longest_segments(key):
            if length + self.marker_extra_bytes * is_marker > self.segment_bytes_max:
                raise NameTooLong(op, key, "XMinioInvalidObjectName")

    def _store(
        self,
        key: ObjectKey,
        data: bytes,
        etag: ETag,
        metadata: Mapping[str, str],
        properties: Properties | None = None,
    ) -> StoredObject:
        modified_ns = self._clock() // SECOND_NS * SECOND_NS  # stores answer whole seconds in HEAD
        names = {name.lower(): value for name, value in metadata.items()}
        told = {"content-type": content_type(key), **(properties.headers if properties else {})}
        tags = properties.tags if properties else ""
        self.objects[key] = StoredObject(bytes(data), etag, names, modified_ns, told, tags)
        self._tell(StoreEvent(key=key, etag=etag, size=len(data), metadata=names))
        return self.objects[key]

    def _remove(self, key: ObjectKey) -> None:
        self.objects.pop(key, None)
        self._tell(StoreEvent(key=key, etag=None, size=0, metadata={}))

    def _tell(self, event: StoreEvent) -> None:
        for prefix, listener in self._listeners:
            if event.key.startswith(prefix):
                listener.heard([event])

    def _existing(self, op: str, key: ObjectKey) -> StoredObject:
        if (found := self.objects.get(key)) is None:
            raise NotFound(op, key)
        return found

    def _version(self, op: str, key: ObjectKey, etag: ETag) -> StoredObject:
        found = self.objects.get(key)
        if found is None or found.etag != etag:
            raise VersionChanged(op, key, "the source is another version")
        return found

    def _require(self, op: str, key: ObjectKey, expect: Expect | None) -> None:
        found = self.objects.get(key)
        if expect is not None and expect.etag != (found.etag if found else None):
            raise VersionChanged(op, key, f"is {found.etag if found else 'not there'}, not {expect.etag}")

    def _open_uploads(self) -> Sequence[Upload]:
        return [Upload(u.key, upload_id, u.started_ns, u.initiator) for upload_id, u in self.uploads.items()]

    def _upload(self, op: str, key: ObjectKey, upload_id: str) -> OpenUpload:
        upload = self.uploads.get(upload_id)
        if upload is None or upload.key != key:
            raise NotFound(op, key, "NoSuchUpload")
        return upload

    def _store_part(self, op: str, key: ObjectKey, upload_id: str, part_no: int, data: bytes) -> Part:
        upload = self._upload(op, key, upload_id)
        upload.parts[part_no], upload.touched_ns = data, self._clock()
        return Part(part_no, md5_etag(data), len(data))

    def _uploaded(self, key: ObjectKey, upload: OpenUpload, part: Part) -> bytes:
        data = upload.parts.get(part.part_no)
        if data is None or md5_etag(data) != part.etag:
            raise InvalidArgument("complete_multipart", key, f"part {part.part_no} is not there")
        return data

    def _info(self, key: ObjectKey, found: StoredObject) -> ObjectInfo:
        return ObjectInfo(
            key=key,
            etag=found.etag,
            size=len(found.data),
            modified_ns=found.modified_ns,
            metadata=dict(found.metadata),
        )

    def _listed(self, key: ObjectKey) -> ObjectInfo:
        found = self.objects[key]
        metadata = dict(found.metadata) if self._lists_metadata else None
        return ObjectInfo(
            key=key,
            etag=found.etag,
            size=len(found.data),
            modified_ns=found.modified_ns,
            metadata=metadata,
        )

    def _entries(self, prefix: str, delimiter: bool) -> Entries:
        """(key or common prefix, whether it is a prefix) under `prefix`, in order of UTF-8 bytes."""
        names = {self._rolled(key, prefix, delimiter) for key in self.objects if key.startswith(prefix)}
        if delimiter:
            names |= {self._rolled(f"{key}/", prefix, True) for key in self.half_deleted if key.startswith(prefix)}
        return sorted(names, key=lambda entry: entry[0].encode())

    @staticmethod
    def _rolled(key: str, prefix: str, delimiter: bool) -> tuple[str, bool]:
        cut = key.find("/", len(prefix)) if delimiter else -1
        return (key, False) if cut < 0 else (key[: cut + 1], True)

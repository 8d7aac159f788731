"""The seam to the object store: what the layers above may ask of it. Owns no state.

Every method awaits the network, has a deadline, and raises only `PhfsError`s (besides what a `Sink` raises,
and an OSError where a `FileRange` cannot be read): `NotFound` (ENOENT), `BucketNotFound` (EIO),
`AccessDenied` (EACCES), `VersionChanged` (a condition failed), `StoreUnavailable`/`StoreTimeout` (retries are
used up), `BadAnswer` (the answer contradicts the request), `IllegalName`/`NameTooLong` (the key cannot be
sent), `TooLarge`, `NotSupported`, `InvalidArgument` (a wrong setting, part or upload), and where a limit of
the store is in the way `NotADirectory`, `IsADirectory`, `NoSpace`, `QuotaExceeded`.
"""

from __future__ import annotations

import mimetypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from types import MappingProxyType
from typing import Final, Protocol

from phfs_fuse.errors import IllegalName, NameTooLong, NotFound, PhfsError
from phfs_fuse.types import COPY_BYTES_MAX, COPY_ONTO_ITSELF_BYTES_MAX, ETag, ObjectKey

NO_HEADERS: Final[Mapping[str, str]] = MappingProxyType({})

Sink = Callable[[int, bytes | memoryview], None]
"""Takes (offset in the object, chunk): called in ascending order without gaps, on a thread of the store."""


META_PREFIX: Final = "x-amz-meta-"
_TYPES: Final = mimetypes.MimeTypes()  # the built-in table: the same on every machine


def metadata_bytes(metadata: Mapping[str, str]) -> int:
    """The size of user metadata as MinIO counts it, which is the strictest way: with the prefix of each name."""
    return sum(len(META_PREFIX) + len(name.encode()) + len(value.encode()) for name, value in metadata.items())


def content_type(key: str) -> str:
    """What browsers and consoles shall take the object for; by its name, as rclone does it."""
    if key.endswith("/"):
        return "application/x-directory"
    return _TYPES.guess_type(f"/{key}")[0] or "application/octet-stream"


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectInfo:
    """One version of one object. `metadata` is None where the answer (a listing) does not carry it."""

    key: ObjectKey
    etag: ETag
    size: int
    modified_ns: int  # the store's Last-Modified, nanoseconds since the epoch
    metadata: Mapping[str, str] | None  # user metadata, names in lower case without `x-amz-meta-`
    headers: Mapping[str, str] = field(
        default_factory=lambda: NO_HEADERS
    )  # of the answer, those of `Properties`; a listing tells few
    is_sealed: bool = False  # nobody without its owner's key can read, copy or ask for it (SSE-C)


@dataclass(frozen=True, slots=True, kw_only=True)
class Properties:
    """Everything that the store keeps with an object beside its bytes, to be given to its next version.

    `headers` are those in which HEAD told content type, content encoding, storage class, encryption and the like;
    `metadata` is user metadata; `tags` the tags as the query string that a request carries, "" for none.
    """

    headers: Mapping[str, str]
    metadata: Mapping[str, str]
    tags: str = ""
    etag: ETag | None = None  # of the version that has them, and how many bytes that has
    size: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """One page. `objects` and `prefixes` are each in ascending order of UTF-8 bytes."""

    objects: Sequence[ObjectInfo]
    prefixes: Sequence[str]  # common prefixes, each ends in "/"
    next_token: str | None  # None: last page
    unreadable: Sequence[ObjectKey] = ()  # objects of which the page says what cannot be


@dataclass(frozen=True, slots=True)
class FileRange:
    """`length` bytes at `offset` of an open file. Read by pread while the request runs; the caller keeps it
    unchanged and open until the request ended."""

    fd: int
    offset: int
    length: int


Body = bytes | FileRange

NAME_REFUSED: Final = (IllegalName, NameTooLong)  # the store can keep nothing under such a key
NOT_THERE: Final = (NotFound, *NAME_REFUSED)  # answers by which nothing is under a key

LOOK_SECONDS: Final = 1.0  # for which a `look` stands in for the look just before a copy


@dataclass(frozen=True, slots=True)
class Expect:
    """The condition of a write: `etag` None asks that no object is there, else that it has this version.

    Kept also on stores without (or with broken) conditional writes, there by a HEAD just before.
    """

    etag: ETag | None


def fits_copy(source: ObjectKey, key: ObjectKey, size: int) -> bool:
    """Whether one request copies `size` bytes in time: else they are copied in parts."""
    return size <= (COPY_ONTO_ITSELF_BYTES_MAX if source == key else COPY_BYTES_MAX)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Sizes that a store takes."""

    object_bytes_max: int
    metadata_bytes_max: int = 2048  # names with their prefix, and values


@dataclass(frozen=True, slots=True)
class Part:
    part_no: int  # from 1
    etag: ETag
    length: int = 0  # in bytes; how long the store may take to put parts together follows from it


@dataclass(frozen=True, slots=True)
class Upload:
    """A multipart upload that was begun and neither completed nor aborted."""

    key: ObjectKey
    upload_id: str
    started_ns: int
    initiator: str  # the identity that began it, "" where the store does not tell


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreEvent:
    """An object was stored, or removed (`etag` None), by whomever. `metadata` as in `ObjectInfo`."""

    key: ObjectKey
    etag: ETag | None
    size: int
    metadata: Mapping[str, str]


class Listener(Protocol):
    """Is told of changes, on the trio thread. Its methods do not await."""

    def opened(self) -> None:
        """Changes that follow are told."""

    def heard(self, events: Sequence[StoreEvent]) -> None:
        """In the order of the store, some of them maybe twice."""

    def missed(self) -> None:
        """Changes may have been left out."""


class ObjectStore(Protocol):
    """One bucket. Keys are whole keys."""

    def tell_new_credentials(self, call: Callable[[], None]) -> None:
        """Have `call` called, on the trio thread, when requests are signed with other credentials from then on."""

    @property
    def lists_metadata(self) -> bool:
        """Whether listings carry user metadata (MinIO's extension), known after `check_bucket`."""

    @property
    def limits(self) -> Limits:
        """Sizes that the store takes, as far as is known who it is."""

    @property
    def hides_below(self) -> bool:
        """Whether keys below that of an object are not listed (MinIO), known after `check_bucket`."""

    @property
    def lists_ghosts(self) -> bool:
        """Whether a common prefix may have nothing but removed objects below it (MinIO, with versions), known after
        `check_bucket`."""

    async def require_key(self, key: ObjectKey) -> None:
        """Return if the store takes an object of this name. A name out of the ordinary costs one request, once.
        Raises: IllegalName, NameTooLong."""

    async def check_bucket(self, *, create: bool = False) -> None:
        """Return if the bucket can be listed; probe what the store can do. Creates it if asked to. Raises also
        NotADirectory where the prefix lies below an object, and the store would not list what is stored there."""

    async def prepare(self) -> None:
        """Find out what conditional writes rest on; the first one does otherwise."""

    async def tidy(self) -> None:
        """Remove what trials of the store have left in it, those of an earlier process too. Costs nothing if nothing
        is left."""

    async def head(self, key: ObjectKey, *, surely: bool = False) -> ObjectInfo:
        """NotFound also for a name that the store does not take. With `surely` not for a bucket that is not there
        (BucketNotFound), which an answer to HEAD does not tell apart: one more request where nothing is found."""

    async def properties(self, key: ObjectKey, etag: ETag | None) -> Properties:
        """What the store keeps with version `etag` (None: any). VersionChanged if it has another, or none."""

    async def get(self, key: ObjectKey, start: int, end: int, *, etag: ETag | None, sink: Sink) -> None:
        """Send bytes [start, end) of version `etag` (None: any) to `sink` while they arrive; exactly these or
        an error. A retry within goes on where the last try ended. VersionChanged if the version is gone."""

    async def list(
        self,
        prefix: str,
        *,
        delimiter: bool,
        token: str | None = None,
        start_after: str = "",
        count_max: int = 1000,
    ) -> Listing:
        """A page of the keys under `prefix`; with `delimiter` those beyond the next "/" are rolled up. A page
        without any key is the last one. Under a name that the store does not take there are none."""

    async def put(
        self,
        key: ObjectKey,
        body: Body,
        metadata: Mapping[str, str],
        *,
        expect: Expect | None,
        properties: Properties | None = None,
    ) -> ObjectInfo:
        """Store a whole object. Atomic. `expect` None: whatever is there. `properties`: of the version that it
        takes the place of, where that shall stay (its metadata is not looked at); None: the type of its name."""

    async def look(self, keys: Sequence[ObjectKey]) -> Mapping[ObjectKey, ETag]:
        """The versions of those of `keys` that are there: with one request where many lie close together."""

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
        """Server-side copy in one request: for the sizes of `fits_copy`. `metadata` None: the copy has all that the
        source has; else it has this metadata and `properties`, as with `put` (and the source may be `key`); tags are
        copied in any case. VersionChanged if the source is not `source_etag` or `expect` fails. `seen_at`: when
        (trio's clock) a `look` that found `expect` to hold was asked for; within LOOK_SECONDS it does where the store
        keeps no condition of copies."""

    async def delete(self, key: ObjectKey, *, expect: Expect | None = None) -> None:
        """Remove; a key that is not there, or that the store does not take, is a success. VersionChanged if another
        version is."""

    async def delete_many(self, versions: Mapping[ObjectKey, ETag | None]) -> Mapping[ObjectKey, PhfsError]:
        """Remove up to 1000 keys in one request (two or more, where the store has no conditions), each if it has
        that version (None: whatever is there); returns those that failed. VersionChanged: another version."""

    async def create_multipart(
        self, key: ObjectKey, metadata: Mapping[str, str], properties: Properties | None = None
    ) -> str:
        """Begin an upload; returns its id. One try: each try may begin an upload of its own, also one without an
        answer. Whoever begins one notes that first (`writeback.multipart_uploads`)."""

    async def upload_part(self, key: ObjectKey, upload_id: str, part_no: int, body: Body) -> Part: ...

    async def upload_part_copy(
        self,
        key: ObjectKey,
        upload_id: str,
        part_no: int,
        source: ObjectKey,
        source_etag: ETag,
        start: int,
        end: int,
    ) -> Part: ...

    async def complete_multipart(
        self, key: ObjectKey, upload_id: str, parts: Sequence[Part], *, expect: Expect | None
    ) -> ObjectInfo: ...

    async def abort_multipart(self, key: ObjectKey, upload_id: str) -> None:
        """Drop the upload and its parts; one that is not there is a success."""

    async def list_multipart(self, prefix: str) -> Sequence[Upload]:
        """Uploads under way below `prefix`. MinIO lists those of one whole key only."""

    async def uploads_of(self, key: ObjectKey) -> Sequence[Upload]:
        """Uploads under way of just this key, by any client."""

    async def last_part_ns(self, key: ObjectKey, upload_id: str) -> int | None:
        """Time at which the newest part of an upload was stored; None: it has none. Raises: NotFound."""

    async def time_ns(self) -> int:
        """The store's clock, as of its answers so far; at most some seconds late."""

    async def listen(self, prefix: str, listener: Listener) -> None:
        """Tell `listener` of the changes below `prefix`. Never returns. Raises: StoreUnavailable (the stream is
        lost), NotSupported, AccessDenied or NotFound (this store has none, or not for us)."""

    async def aclose(self) -> None: ...

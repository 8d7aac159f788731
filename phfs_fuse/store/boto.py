"""One try of each call to the store, by boto3 on a bounded thread. Owns the access to the bucket and the limiters.

Answers are checked, nothing is repeated (that is `store.s3`). Reads may be abandoned when cancelled; a write
goes on until its thread ends.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any, Final, TypeVar
from urllib.parse import quote, unquote_plus, urlencode

import trio
from botocore.session import Session

from phfs_fuse import metrics
from phfs_fuse.config.model import StoreConfig
from phfs_fuse.errors import InvalidArgument, PhfsError, StoreTimeout
from phfs_fuse.store.access import Access
from phfs_fuse.store.base import Body, Expect, FileRange, Listing, ObjectInfo, Part, Properties, Upload
from phfs_fuse.store.bodies import FileBody, Receiver, body_length
from phfs_fuse.store.checksums import Algorithm, Checksums, check_stored, checksum_headers
from phfs_fuse.store.clients import DEFAULT_REGION, HEADERS, PAGE, SILENCE, Clients, translated
from phfs_fuse.store.clock import StoreClock
from phfs_fuse.store.error_codes import NO_SUCH_KEY, error_of, reading
from phfs_fuse.store.headers import (
    copy_headers,
    etag_of,
    info_of,
    object_headers,
    quoted,
    stored_info,
    tag_header,
    whole_seconds,
)
from phfs_fuse.types import MIB, ETag, ObjectKey

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

T = TypeVar("T")

CONTROL_MAX: Final = 16  # calls that move no data, at a time
CHUNK_BYTES: Final = MIB  # per hand-over of the interpreter's lock
XML_ILLEGAL: Final = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")  # Source: XML 1.0, 2.2 Characters


def answer_headers(answer: Mapping[str, Any]) -> Mapping[str, str]:
    """The HTTP headers of boto3's answer, names in lower case."""
    headers: Mapping[str, str] = answer["ResponseMetadata"]["HTTPHeaders"]
    return headers


class BotoTransport:
    """Opened by its first call."""

    def __init__(self, config: StoreConfig, core: Session | None = None) -> None:
        self.config = config
        self.access = Access(config, core)
        self._bucket = config.bucket
        self._reads = trio.CapacityLimiter(config.reads_max)
        self._writes = trio.CapacityLimiter(config.writes_max)
        self._control = trio.CapacityLimiter(CONTROL_MAX)
        self.clock = StoreClock()
        self._checksums = Checksums()

    async def clients(self) -> Clients:
        return await self.access.clients()

    async def aclose(self) -> None:
        await self.access.aclose()

    async def create_bucket(self) -> None:
        clients = await self.clients()
        extra: dict[str, Any] = {}
        if clients.is_aws and clients.region != DEFAULT_REGION:
            extra["CreateBucketConfiguration"] = {"LocationConstraint": clients.region}
        await self._run(
            "create bucket",
            self._bucket,
            lambda: clients.plain.create_bucket(Bucket=self._bucket, **extra),
            self._control,
        )

    async def keeps_versions(self) -> bool:
        """Whether the bucket does, or did."""
        s3 = (await self.clients()).plain
        answer = await self._run(
            "versioning", self._bucket, lambda: s3.get_bucket_versioning(Bucket=self._bucket), self._control
        )
        return bool(answer.get("Status"))

    async def head(self, key: ObjectKey) -> ObjectInfo:
        s3 = (await self.clients()).plain
        answer = await self._run(
            "head",
            key,
            lambda: s3.head_object(Bucket=self._bucket, Key=key),
            self._control,
            is_read=True,
        )
        self.clock.heard(answer_headers(answer))
        return info_of(key, answer_headers(answer))

    async def tags(self, key: ObjectKey) -> str:
        """As the query string in which a request carries them; "" for none."""
        s3 = (await self.clients()).plain
        answer = await self._run(
            "tags", key, lambda: s3.get_object_tagging(Bucket=self._bucket, Key=key), self._control, is_read=True
        )
        return urlencode(sorted((tag["Key"], tag["Value"]) for tag in answer["TagSet"]), quote_via=quote)

    async def get(self, receiver: Receiver) -> None:
        """Bytes from where `receiver` stands to its end."""
        s3 = (await self.clients()).plain
        bodies: list[Any] = []
        try:
            await self._run(
                "get",
                receiver.key,
                lambda: self._get(s3, receiver, bodies),
                self._reads,
                is_read=True,
                moved_bytes=receiver.missing,
            )
        finally:
            if receiver.missing:  # given up: the thread that waits for a byte is let go
                for body in bodies:
                    _let_go(body)

    def _get(self, s3: S3Client, receiver: Receiver, bodies: list[Any]) -> None:
        condition: dict[str, Any] = {} if receiver.etag is None else {"IfMatch": quoted(receiver.etag)}
        answer = s3.get_object(Bucket=self._bucket, Key=receiver.key, Range=receiver.range_header, **condition)
        with closing(answer["Body"]) as body:
            bodies.append(body)
            receiver.begin(answer_headers(answer))
            while chunk := body.read(CHUNK_BYTES):
                if not receiver.feed(chunk):
                    return
        receiver.finish()

    async def list_page(
        self, prefix: str, count_max: int, options: Mapping[str, Any], *, metadata: bool
    ) -> tuple[Listing, str]:
        """A page, and the name of the server's software. `options` as of ListObjectsV2."""
        clients = await self.clients()
        s3 = clients.listing if metadata else clients.plain
        answer: Mapping[str, Any] = await self._run(
            "list",
            f"s3://{self._bucket}/{prefix}",
            lambda: s3.list_objects_v2(Bucket=self._bucket, Prefix=prefix, MaxKeys=count_max, **options),
            self._control,
            is_read=True,
        )
        self.clock.heard(answer_headers(answer))
        return answer[PAGE], answer_headers(answer).get("server", "")

    async def put(
        self,
        key: ObjectKey,
        body: Body,
        metadata: Mapping[str, str],
        expect: Expect | None,
        properties: Properties | None = None,
    ) -> ObjectInfo:
        """`expect` is sent as a condition and nothing else is done about it."""
        headers = object_headers(key, metadata, properties) | tag_header(properties)
        s3 = (await self.clients()).plain

        def put(algorithm: Algorithm | None) -> Mapping[str, str]:
            answer = s3.put_object(
                Bucket=self._bucket,
                Key=key,
                Body=_payload(body),
                ContentLength=body_length(body),
                **_condition(expect),
                **_sent("put", key, headers | checksum_headers(algorithm, body)),
            )
            check_stored("put", key, body, answer_headers(answer))
            return answer_headers(answer)

        answer = await self._storing("put", key, put)
        return stored_info(key, body_length(body), metadata, answer)

    async def copy(
        self,
        source: ObjectKey,
        source_etag: ETag | None,
        key: ObjectKey,
        size: int,
        metadata: Mapping[str, str] | None,
        properties: Properties | None = None,
    ) -> ObjectInfo:
        """`source_etag` is sent as a condition and nothing else is done about it. `metadata` None: that of the
        source; of `properties` only what no copy takes along."""
        headers = copy_headers(key, metadata, properties)
        s3 = (await self.clients()).plain
        answer = await self._run(
            "copy",
            key,
            lambda: s3.copy_object(
                Bucket=self._bucket,
                Key=key,
                CopySource={"Bucket": self._bucket, "Key": source},
                **_source_condition(source_etag),
                **_sent("copy", key, headers),
                **self._patience(size),
            ),
            self._control,
        )
        result = answer.get("CopyObjectResult", {})
        return stored_info(key, size, metadata, {**answer_headers(answer), "etag": result.get("ETag", "")})

    async def delete(self, key: ObjectKey, expect: Expect | None) -> None:
        """`expect` is sent as a condition and nothing else is done about it."""
        clients = await self.clients()
        await self._run(
            "delete",
            key,
            lambda: clients.plain.delete_object(Bucket=self._bucket, Key=key, **_condition(expect)),
            self._control,
        )

    async def delete_many(self, versions: Mapping[ObjectKey, ETag | None]) -> Mapping[ObjectKey, PhfsError]:
        """Keys that failed. Versions are sent as conditions and nothing else is done about them."""
        s3 = (await self.clients()).plain
        objects: Any = [{"Key": key, **({"ETag": quoted(etag)} if etag else {})} for key, etag in versions.items()]
        answer = await self._run(
            "delete",
            f"{len(versions)} objects",
            lambda: s3.delete_objects(Bucket=self._bucket, Delete={"Objects": objects, "Quiet": True}),
            self._control,
        )
        with reading("delete", f"{len(versions)} objects"):
            failed = {ObjectKey(error["Key"]): error.get("Code", "") for error in answer.get("Errors", ())}
        return {key: error_of("delete", key, code, 400) for key, code in failed.items() if code != NO_SUCH_KEY}

    async def create_multipart(
        self, key: ObjectKey, metadata: Mapping[str, str], properties: Properties | None = None
    ) -> str:
        s3 = (await self.clients()).plain
        headers = object_headers(key, metadata, properties) | tag_header(properties)
        answer = await self._run(
            "create multipart",
            key,
            lambda: s3.create_multipart_upload(
                Bucket=self._bucket, Key=key, **_sent("create multipart", key, headers)
            ),
            self._control,
        )
        with reading("create multipart", key):
            return answer["UploadId"]

    async def upload_part(self, key: ObjectKey, upload_id: str, part_no: int, body: Body) -> Part:
        s3 = (await self.clients()).plain

        def upload(algorithm: Algorithm | None) -> Mapping[str, str]:
            answer = s3.upload_part(
                Bucket=self._bucket,
                Key=key,
                UploadId=upload_id,
                PartNumber=part_no,
                Body=_payload(body),
                ContentLength=body_length(body),
                **_sent("upload part", key, checksum_headers(algorithm, body)),
            )
            check_stored("upload part", key, body, answer_headers(answer))
            return answer_headers(answer)

        answer = await self._storing("upload part", key, upload)
        return Part(part_no, etag_of(answer.get("etag"), "upload part", key), body_length(body))

    async def upload_part_copy(
        self,
        key: ObjectKey,
        upload_id: str,
        part_no: int,
        source: ObjectKey,
        source_etag: ETag | None,
        start: int,
        end: int,
    ) -> Part:
        s3 = (await self.clients()).plain
        answer = await self._run(
            "copy part",
            key,
            lambda: s3.upload_part_copy(
                Bucket=self._bucket,
                Key=key,
                UploadId=upload_id,
                PartNumber=part_no,
                CopySource={"Bucket": self._bucket, "Key": source},
                CopySourceRange=f"bytes={start}-{end - 1}",
                **_source_condition(source_etag),
                **self._patience(end - start),
            ),
            self._control,
        )
        etag = etag_of(answer.get("CopyPartResult", {}).get("ETag"), "copy part", key)
        return Part(part_no, etag, end - start)

    async def complete_multipart(
        self, key: ObjectKey, upload_id: str, parts: Sequence[Part], expect: Expect | None
    ) -> ETag:
        s3 = (await self.clients()).plain
        listed: Any = [{"PartNumber": part.part_no, "ETag": quoted(part.etag)} for part in parts]
        answer = await self._run(
            "complete multipart",
            key,
            lambda: s3.complete_multipart_upload(
                Bucket=self._bucket,
                Key=key,
                UploadId=upload_id,
                MultipartUpload={"Parts": listed},
                **_condition(expect),
                **self._patience(sum(part.length for part in parts)),
            ),
            self._control,
        )
        return etag_of(answer.get("ETag"), "complete multipart", key)

    async def abort_multipart(self, key: ObjectKey, upload_id: str) -> None:
        s3 = (await self.clients()).plain
        await self._run(
            "abort multipart",
            key,
            lambda: s3.abort_multipart_upload(Bucket=self._bucket, Key=key, UploadId=upload_id),
            self._control,
        )

    async def list_multipart(self, prefix: str, *, whole: bool = False) -> Sequence[Upload]:
        """`whole`: `prefix` is a key, and only its uploads are wanted."""
        s3 = (await self.clients()).plain
        return await self._run(
            "list multipart", prefix, lambda: self._list_multipart(s3, prefix, whole), self._control, is_read=True
        )

    def _list_multipart(self, s3: S3Client, prefix: str, whole: bool) -> Sequence[Upload]:
        pages = s3.get_paginator("list_multipart_uploads").paginate(
            Bucket=self._bucket, Prefix=prefix, EncodingType="url"
        )
        found: list[Upload] = []
        for page in pages:
            decode = unquote_plus if page.get("EncodingType") == "url" else str
            for row in page.get("Uploads", ()):
                if whole and decode(row["Key"]) != prefix:
                    return found  # its own come first
                found.append(
                    Upload(
                        key=ObjectKey(decode(row["Key"])),
                        upload_id=row["UploadId"],
                        started_ns=whole_seconds(row["Initiated"]),
                        initiator=row.get("Initiator", {}).get("ID", ""),
                    )
                )
        return found

    async def last_part_ns(self, key: ObjectKey, upload_id: str) -> int | None:
        s3 = (await self.clients()).plain
        return await self._run(
            "list parts", key, lambda: self._last_part_ns(s3, key, upload_id), self._control, is_read=True
        )

    def _last_part_ns(self, s3: S3Client, key: ObjectKey, upload_id: str) -> int | None:
        pages = s3.get_paginator("list_parts").paginate(Bucket=self._bucket, Key=key, UploadId=upload_id)
        parts = (part for page in pages for part in page.get("Parts", ()))
        return max((whole_seconds(part["LastModified"]) for part in parts), default=None)

    async def _storing(self, op: str, key: ObjectKey, call: Callable[[Algorithm | None], T]) -> T:
        """What `call`, which sends a body, returns on a thread; see `Checksums.sending`."""
        return await self._checksums.sending(
            op, lambda algorithm: self._run(op, key, lambda: call(algorithm), self._writes)
        )

    def _patience(self, copied_bytes: int) -> dict[str, Any]:
        """For a call by boto3 that has the store copy so much before it answers."""
        return {SILENCE: self.config.silent_seconds(copied_bytes)}

    async def _run(
        self,
        op: str,
        subject: str,
        call: Callable[[], T],
        limiter: trio.CapacityLimiter,
        *,
        is_read: bool = False,
        moved_bytes: int = 0,
    ) -> T:
        """What `call` returns on a thread. A read ends at its deadline, which counts from the start of the thread."""
        metrics.STORE_REQUESTS.add(1, op)
        metrics.HOPS.add(1, "store")
        token = trio.lowlevel.current_trio_token()
        total_seconds = self.config.total_seconds(moved_bytes)
        scope = trio.CancelScope()

        def begin() -> None:
            scope.deadline = trio.current_time() + total_seconds

        def work() -> T:
            if is_read:
                token.run_sync_soon(begin)
            with reading(op, subject), translated(op, subject):
                return call()

        with scope:
            return await trio.to_thread.run_sync(work, limiter=limiter, abandon_on_cancel=is_read)
        raise StoreTimeout(op, subject, "the answer comes too slowly to end in time")


def _let_go(body: Any) -> None:
    """End a read of `body` that another thread waits in. botocore has no call for it, urllib3 below has."""
    with suppress(ValueError, OSError, RuntimeError, AttributeError):  # ended by itself, or urllib3 before 2.3
        body._raw_stream.shutdown()


def _payload(body: Body) -> Any:
    return FileBody(body) if isinstance(body, FileRange) else body


def _condition(expect: Expect | None) -> dict[str, Any]:
    if expect is None:
        return {}
    return {"IfNoneMatch": "*"} if expect.etag is None else {"IfMatch": quoted(expect.etag)}


def _sent(op: str, key: ObjectKey, headers: Mapping[str, str]) -> dict[str, Any]:
    """Raises: InvalidArgument for text that botocore would not sign as it sends it."""
    for name, value in headers.items():
        if not value.isascii():
            raise InvalidArgument(op, key, f"header {name} is not ASCII, and is not sent by boto3")
    return {HEADERS: headers}


def _source_condition(etag: ETag | None) -> dict[str, Any]:
    return {} if etag is None else {"CopySourceIfMatch": quoted(etag)}

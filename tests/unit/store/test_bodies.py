"""A download checks what comes; a lost upload is known again; retries wait and end."""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
from collections.abc import Iterator

import pytest
import trio
from botocore.awsrequest import AWSPreparedRequest, AWSResponse
from trio.testing import MockClock

from phfs_fuse.config.model import StoreConfig
from phfs_fuse.errors import AccessDenied, BadAnswer, StoreUnavailable, VersionChanged
from phfs_fuse.store.base import Expect, FileRange, ObjectInfo, Part
from phfs_fuse.store.bodies import FileBody, Receiver, holds, md5_etag, multipart_etag, read_body
from phfs_fuse.store.clients import open_clients
from phfs_fuse.store.conditions import Conditions, probe_conditions
from phfs_fuse.store.error_codes import OutOfRange
from phfs_fuse.store.retry import BACKOFF_SECONDS_MAX, backoff_seconds, retrying
from phfs_fuse.types import MIB, ETag, ObjectKey

HELLO_MD5 = ETag("5d41402abc4b2a76b9719d911017c592")


class Sink:
    def __init__(self) -> None:
        self.got: list[tuple[int, bytes]] = []

    def __call__(self, offset: int, chunk: bytes | memoryview) -> None:
        self.got.append((offset, bytes(chunk)))


def receiver(start: int = 0, end: int = 10, etag: ETag | None = None) -> tuple[Receiver, Sink]:
    sink = Sink()
    return Receiver(ObjectKey("key"), start, end, etag, sink), sink


def headers(content_range: str | None, etag: str = '"e"', length: str = "10") -> dict[str, str]:
    found = {"etag": etag, "content-length": length}
    return found if content_range is None else {**found, "content-range": content_range}


def test_a_download_in_two_tries() -> None:
    download, sink = receiver(5, 12)
    download.begin(headers("bytes 5-11/20"))
    assert download.feed(b"abc")
    with pytest.raises(BadAnswer):
        download.finish()
    assert (download.range_header, download.etag) == ("bytes=8-11", "e")
    download.begin(headers("bytes 8-11/20"))
    assert download.feed(memoryview(b"defg"))
    download.finish()
    assert sink.got == [(5, b"abc"), (8, b"defg")]


def test_a_second_try_of_another_version() -> None:
    download, _ = receiver()
    download.begin(headers("bytes 0-9/20"))
    with pytest.raises(VersionChanged):
        download.begin(headers("bytes 0-9/20", etag='"f"'))


@pytest.mark.parametrize(
    ("content_range", "length", "error"),
    [
        ("bytes 1-9/20", "9", BadAnswer),
        ("bytes 0-8/20", "9", BadAnswer),
        ("bytes 0-9/9", "10", OutOfRange),
        ("bytes 0-4/5", "5", OutOfRange),
        ("lines 0-9/20", "10", BadAnswer),
        (None, "11", BadAnswer),
        (None, "9", OutOfRange),
        (None, "", BadAnswer),
    ],
)
def test_heads_of_wrong_answers(content_range: str | None, length: str, error: type[BadAnswer]) -> None:
    download, _ = receiver()
    with pytest.raises(BadAnswer) as caught:
        download.begin(headers(content_range, length=length))
    assert type(caught.value) is error


@pytest.mark.parametrize("content_range", ["bytes 0-9/20", "bytes 0-9/*", None])
def test_heads_of_right_answers(content_range: str | None) -> None:
    download, _ = receiver()
    download.begin(headers(content_range))


def test_too_many_bytes() -> None:
    download, sink = receiver()
    with pytest.raises(BadAnswer):
        download.feed(bytes(11))
    assert sink.got == []


def test_a_closed_download_passes_nothing_on() -> None:
    download, sink = receiver()
    download.close()
    assert not download.feed(b"x")
    assert sink.got == []


@pytest.fixture
def file() -> Iterator[int]:
    with tempfile.TemporaryFile() as opened:
        opened.write(b"0123456789")
        opened.flush()
        yield opened.fileno()


def test_a_part_of_a_file_is_a_file(file: int) -> None:
    body = FileBody(FileRange(file, 2, 5))
    assert (len(body), body.read(3), body.tell(), body.read(), body.read()) == (5, b"234", 3, b"56", b"")
    assert body.seek(-2, os.SEEK_END) == 3
    assert body.read(10) == b"56"
    assert read_body(FileRange(file, 9, 1)) == b"9"
    assert read_body(FileRange(file, 10, 0)) == b""


def test_a_part_that_the_file_does_not_have(file: int) -> None:
    with pytest.raises(OSError, match="shorter") as caught:
        FileBody(FileRange(file, 8, 3))
    assert caught.value.errno == errno.EIO


def info(size: int = 5, etag: ETag = HELLO_MD5, metadata: dict[str, str] | None = None) -> ObjectInfo:
    return ObjectInfo(key=ObjectKey("key"), etag=etag, size=size, modified_ns=0, metadata=metadata or {})


def test_what_a_lost_put_has_stored() -> None:
    assert md5_etag(b"hello") == HELLO_MD5
    assert holds(info(), b"hello", {})
    assert not holds(info(), b"hallo", {})
    assert not holds(info(size=6), b"hello", {})
    assert not holds(info(metadata={"mode": "1"}), b"hello", {})
    assert holds(info(metadata={"mode": "1"}), b"hello", {"mode": "1"})


def test_what_a_lost_completion_has_stored() -> None:
    assert multipart_etag([Part(1, HELLO_MD5)]) == ETag("62109206880d38a4010a98e11243924a-1")
    assert multipart_etag([Part(1, ETag("no-md5"))]) is None


class Attempts:
    def __init__(self, *outcomes: Exception | str) -> None:
        self.outcomes = list(outcomes)
        self.numbers: list[int] = []

    async def __call__(self, attempt_no: int) -> str:
        self.numbers.append(attempt_no)
        await trio.lowlevel.checkpoint()
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


AWAY = StoreUnavailable("head", "key")


async def test_a_passing_failure_is_repeated(autojump_clock: MockClock) -> None:
    attempts = Attempts(AWAY, AWAY, "done")
    assert await retrying(5, attempts) == "done"
    assert attempts.numbers == [0, 1, 2]


async def test_the_last_failure_comes_through(autojump_clock: MockClock) -> None:
    last = StoreUnavailable("head", "key", "last")
    attempts = Attempts(AWAY, AWAY, last)
    with pytest.raises(StoreUnavailable) as caught:
        await retrying(3, attempts)
    assert caught.value is last
    assert attempts.numbers == [0, 1, 2]


@pytest.mark.parametrize("error", [AccessDenied("head", "key"), OutOfRange("get", "key"), ValueError()])
async def test_what_is_final_is_not_repeated(error: Exception) -> None:
    attempts = Attempts(error, "never")
    with pytest.raises(type(error)):
        await retrying(5, attempts)
    assert attempts.numbers == [0]


def test_waits_grow_to_a_limit() -> None:
    for attempt_no in (0, 3, 20, 2000):
        waits = [backoff_seconds(attempt_no) for _ in range(100)]
        assert min(waits) >= 0
        assert max(waits) <= min(BACKOFF_SECONDS_MAX, 0.2 * 2 ** min(attempt_no, 20))


KEPT = Conditions(absent=True, match=True, match_absent=True, copy_source=True, delete=True, delete_many=True)
NO_MATCH = Conditions(absent=True, match=False, match_absent=False, copy_source=False)
FORGETS = Conditions(absent=True, match=True, match_absent=False, copy_source=True)
SINGLE = Conditions(absent=True, match=True, match_absent=True, copy_source=True, delete=True)
ABSENT, VERSION = Expect(None), Expect(ETag("e"))


@pytest.mark.parametrize(
    ("conditions", "expect", "sent", "needs_head"),
    [
        (KEPT, None, None, False),
        (KEPT, ABSENT, ABSENT, False),
        (KEPT, VERSION, VERSION, False),
        (NO_MATCH, ABSENT, ABSENT, False),
        (NO_MATCH, VERSION, None, True),
        (FORGETS, VERSION, VERSION, True),
    ],
)
def test_how_a_condition_is_kept(
    conditions: Conditions, expect: Expect | None, sent: Expect | None, needs_head: bool
) -> None:
    assert conditions.sends(expect) == sent
    assert conditions.needs_head(expect) == needs_head


class ProbedStore:
    """Keeps the conditions that `keeps` names."""

    def __init__(self, keeps: Conditions) -> None:
        self.keeps = keeps
        self.is_there = False

    async def put(self, expect: Expect | None) -> object:
        await trio.lowlevel.checkpoint()
        if expect is not None and self._refuses(expect):
            raise VersionChanged("put", "probe")
        self.is_there = True
        return None

    def _refuses(self, expect: Expect) -> bool:
        if expect.etag is None:
            return self.keeps.absent and self.is_there
        return self.keeps.match if self.is_there else self.keeps.match_absent

    async def copy(self, source_etag: ETag) -> object:
        await trio.lowlevel.checkpoint()
        if self.keeps.copy_source:
            raise VersionChanged("copy", "probe")
        return None

    async def delete(self, etag: ETag) -> None:
        await trio.lowlevel.checkpoint()
        if self.keeps.delete and self.is_there:
            raise VersionChanged("delete", "probe")
        self.is_there = False

    async def delete_many(self, etag: ETag) -> None:
        await trio.lowlevel.checkpoint()
        if not self.is_there:
            raise AssertionError("nothing to be refused")
        if self.keeps.delete_many:
            raise VersionChanged("delete", "probe")
        self.is_there = False


@pytest.mark.parametrize("keeps", [KEPT, NO_MATCH, FORGETS, SINGLE])
async def test_what_a_store_keeps_is_found_out(keeps: Conditions) -> None:
    assert await probe_conditions(ProbedStore(keeps)) == keeps


class CountedBody(FileBody):
    """How often it is read."""

    reads = 0

    def read(self, size: int | None = -1) -> bytes:
        self.reads += 1
        return super().read(size)

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        self.reads += 1
        return super().readinto(buffer)


class NoBody:
    def stream(self, *_: object, **__: object) -> Iterator[bytes]:
        yield b""


def test_a_body_is_read_in_big_pieces_when_it_is_signed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is a call under the interpreter's lock, and all of them run on the machine of whoever waits."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    clients = open_clients(StoreConfig(bucket="bucket", endpoint_url="http://127.0.0.1:9", region="us-east-1"))
    sent: list[str] = []

    def answer(request: AWSPreparedRequest, **_: object) -> AWSResponse:
        sent.append(request.headers["X-Amz-Content-SHA256"].decode())
        return AWSResponse(request.url, 200, {"ETag": '"e"'}, NoBody())

    clients.plain.meta.events.register("before-send.s3", answer)
    try:
        with tempfile.TemporaryFile() as file:
            file.truncate(8 * MIB)
            body = CountedBody(FileRange(file.fileno(), 0, 8 * MIB))
            clients.plain.upload_part(Bucket="bucket", Key="key", UploadId="u", PartNumber=1, Body=body)
    finally:
        clients.close()
    assert sent == [hashlib.sha256(bytes(8 * MIB)).hexdigest()]
    assert body.reads <= 40

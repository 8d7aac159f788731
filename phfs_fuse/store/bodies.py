"""Bytes on their way: the body of an upload, the state of a download. Each object owns its own position."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from phfs_fuse.errors import BadAnswer, VersionChanged
from phfs_fuse.store.base import Body, FileRange, ObjectInfo, Part, Sink
from phfs_fuse.store.error_codes import OutOfRange
from phfs_fuse.store.headers import etag_of, size_of
from phfs_fuse.types import KIB, MIB, ETag, ObjectKey

PIECE_BYTES: Final = 256 * KIB  # to be hashed or sent at once: as many uploads as there are hold one each
_CONTENT_RANGE: Final = re.compile(r"bytes ([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19}|\*)")
_MD5: Final = re.compile(r"[0-9a-f]{32}")


def body_length(body: Body) -> int:
    return body.length if isinstance(body, FileRange) else len(body)


def read_body(body: Body) -> bytes:
    """All of it, in memory. Raises: OSError (EIO) if the file is shorter."""
    return body if isinstance(body, bytes) else FileBody(body).readall()


class FileBody(io.RawIOBase):
    """A `FileRange` as a readable, seekable file; read by pread, so that many can share one descriptor.

    Raises: OSError (EIO) if the file is shorter than the range: to send less would leave the store waiting.
    """

    def __init__(self, body: FileRange) -> None:
        super().__init__()
        if os.fstat(body.fd).st_size < body.offset + body.length:
            raise OSError(errno.EIO, "the file is shorter than the range to send")
        self._body = body
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def read(self, size: int | None = -1) -> bytes:
        if size is None or size < 0:
            return self.readall()
        return self._take(min(size, PIECE_BYTES))

    def readall(self) -> bytes:
        return b"".join(iter(lambda: self._take(MIB), b""))

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        data = self._take(len(buffer))
        memoryview(buffer)[: len(data)] = data
        return len(data)

    def _take(self, size: int) -> bytes:
        room = min(size, self._body.length - self._position)
        if room <= 0:
            return b""
        data = os.pread(self._body.fd, room, self._body.offset + self._position)
        if not data:
            raise OSError(errno.EIO, "the file shrank while it was sent")
        self._position += len(data)
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._body.length}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def __len__(self) -> int:
        return self._body.length


def chunks(body: Body) -> Iterator[bytes]:
    if isinstance(body, bytes):
        yield body
        return
    reader = FileBody(body)
    while chunk := reader.read(MIB):
        yield chunk


def md5_etag(body: Body) -> ETag:
    """The ETag that most stores give to `body` put in one request."""
    digest = hashlib.md5(usedforsecurity=False)
    for chunk in chunks(body):
        digest.update(chunk)
    return ETag(digest.hexdigest())


def multipart_etag(parts: Sequence[Part]) -> ETag | None:
    """The ETag that most stores give to an object of these parts; None if it cannot be told."""
    if not all(_MD5.fullmatch(part.etag) for part in parts):
        return None
    joined = b"".join(bytes.fromhex(part.etag) for part in parts)
    return ETag(f"{hashlib.md5(joined, usedforsecurity=False).hexdigest()}-{len(parts)}")


def holds(found: ObjectInfo, body: Body, metadata: Mapping[str, str]) -> bool:
    """Whether `found` is surely what a put of `body` with `metadata` would store.

    For a put whose answer was lost: the next try meets its own object and is told that the version changed.
    """
    same = found.size == body_length(body) and found.metadata == dict(metadata)
    return same and found.etag == md5_etag(body)


class Receiver:
    """One download: checks each answer, hands the bytes to the sink, knows where a retry has to go on.

    Used by one thread at a time; `close` may be called from another.
    """

    def __init__(self, key: ObjectKey, start: int, end: int, etag: ETag | None, sink: Sink) -> None:
        self.key, self.start, self.end = key, start, end
        self.etag = etag  # once an answer has come: of that answer, so that a retry cannot mix versions
        self.position = start
        self._sink = sink
        self._lock = threading.Lock()
        self._closed = False

    @property
    def missing(self) -> int:
        """Bytes that have not come yet."""
        return self.end - self.position

    @property
    def range_header(self) -> str:
        return f"bytes={self.position}-{self.end - 1}"

    def begin(self, headers: Mapping[str, str]) -> None:
        """Check the head of an answer, names in lower case. Raises: VersionChanged, BadAnswer."""
        etag = etag_of(headers.get("etag"), "get", self.key)
        if self.etag not in (None, etag):
            raise VersionChanged("get", self.key, "the store sent another version")
        start, end, size = self._sent_range(headers)
        if size is not None and size < self.end:
            raise OutOfRange("get", self.key, f"the object has {size} bytes, {self.end} were asked for")
        if (start, end) != (self.position, self.end):
            raise BadAnswer("get", self.key, f"other bytes than {self.range_header}")
        self.etag = etag

    def _sent_range(self, headers: Mapping[str, str]) -> tuple[int, int, int | None]:
        """The half-open range that an answer says it holds, and the size of the object if it says that."""
        text = headers.get("content-range")
        if text is None:
            size = size_of(headers.get("content-length"), "get", self.key)
            return 0, size, size
        if found := _CONTENT_RANGE.fullmatch(text):
            size_text = found[3]
            return int(found[1]), int(found[2]) + 1, None if size_text == "*" else int(size_text)
        raise BadAnswer("get", self.key, "no readable range in the answer")

    def feed(self, chunk: bytes | memoryview) -> bool:
        """Pass a chunk on; False once `close` was called: nothing is passed on any more."""
        if self.position + len(chunk) > self.end:
            raise BadAnswer("get", self.key, "more bytes than announced")
        with self._lock:
            if self._closed:
                return False
            self._sink(self.position, chunk)
            self.position += len(chunk)
        return True

    def finish(self) -> None:
        if self.position != self.end:
            raise BadAnswer("get", self.key, f"{self.missing} bytes are missing")

    def close(self) -> None:
        """The caller no longer wants bytes; waits for a call of the sink under way."""
        with self._lock:
            self._closed = True

"""Checksums of bodies that are stored. Owns which of them one store wants, as its refusals tell.

A bucket whose objects are locked by default (AWS) refuses a body without a checksum; other stores get none, and some
would refuse it. The first refusal is answered by the first of `ALGORITHMS` that the store takes, for each operation
by itself: a part may have no other CRC than its upload was begun for, MD5 is taken in any case.

Measured (two shared cores), 4 KiB and 8 MiB: CRC-64/NVME 1 and 1100 µs, CRC-32C 1 and 1800 µs, MD5 12 and 13 900 µs,
beside 270 µs for the whole PUT of 4 KiB.

The ETag of an answer is not compared: it is an MD5 for some stores and some ways of encryption only.
Source: S3 user guide, "Checking object integrity"; S3 API reference, PutObject and UploadPart.
"""

from __future__ import annotations

import base64
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Final, TypeVar

from awscrt import checksums as crt

from phfs_fuse.errors import BadAnswer, InvalidArgument, NotSupported
from phfs_fuse.store.base import Body
from phfs_fuse.store.bodies import chunks, md5_etag

log = logging.getLogger(__name__)

T = TypeVar("T")

_WANTING: Final = ("InvalidRequest", "MissingContentMD5")  # codes by which stores ask for a checksum


@dataclass(frozen=True, slots=True)
class Algorithm:
    header: str  # in lower case
    digest: Callable[[Body], bytes]

    def headers(self, body: Body) -> dict[str, str]:
        """Reads all of `body`. Raises: OSError."""
        return {self.header: base64.b64encode(self.digest(body)).decode()}


def _crc64(body: Body) -> bytes:
    return reduce(lambda crc, chunk: crt.crc64nvme(chunk, crc), chunks(body), 0).to_bytes(8, "big")


def _crc32(body: Body) -> bytes:
    return reduce(lambda crc, chunk: crt.crc32c(chunk, crc), chunks(body), 0).to_bytes(4, "big")


def _md5(body: Body) -> bytes:
    return bytes.fromhex(md5_etag(body))


CRC64: Final = Algorithm("x-amz-checksum-crc64nvme", _crc64)
CRC32: Final = Algorithm("x-amz-checksum-crc32c", _crc32)
MD5: Final = Algorithm("content-md5", _md5)
ALGORITHMS: Final = (CRC64, CRC32, MD5)


def checksum_headers(algorithm: Algorithm | None, body: Body) -> dict[str, str]:
    return algorithm.headers(body) if algorithm else {}


def check_stored(op: str, key: str, body: Body, headers: Mapping[str, str]) -> None:
    """Compare the checksums that an answer names (AWS does unasked), names of `headers` in lower case, with `body`.
    Raises: BadAnswer if the store has other bytes."""
    for algorithm in (CRC64, CRC32):
        if algorithm.header in headers and algorithm.headers(body)[algorithm.header] != headers[algorithm.header]:
            raise BadAnswer(op, key, "the store has other bytes than were sent")


class Checksums:
    """Those that one store wants."""

    def __init__(self) -> None:
        self._wanted: dict[str, Algorithm] = {}  # by operation

    async def sending(self, op: str, send: Callable[[Algorithm | None], Awaitable[T]]) -> T:
        """What `send` returns, which is given the checksum to send; it is called again where the store asks for one.
        Raises: what `send` raises."""
        known = self._wanted.get(op)
        try:
            return await send(known)
        except InvalidArgument as exc:
            if known is not None or exc.code not in _WANTING:
                raise
            refusal = exc
        for algorithm in ALGORITHMS:
            try:
                sent = await send(algorithm)
            except (InvalidArgument, NotSupported) as exc:
                log.debug("%s with %s: %s", op, algorithm.header, exc)
                continue
            self._wanted[op] = algorithm
            log.info("the store wants a checksum: %s has %s from now on", op, algorithm.header)
            return sent
        raise refusal

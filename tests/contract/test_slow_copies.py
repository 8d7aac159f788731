"""Stores that say nothing while they copy within themselves, for longer than they may be silent otherwise."""

from __future__ import annotations

import time

import pytest

from phfs_fuse.errors import StoreTimeout
from phfs_fuse.store.base import Expect, Part
from phfs_fuse.store.s3 import S3Store
from phfs_fuse.types import MIB, ETag
from tests.contract.faulty import opened
from tests.support.proxy import Answer, Request, proxy

pytestmark = pytest.mark.usefixtures("credentials")
E = ETag("e")
SIZE = 64 * MIB
SILENT_SECONDS = 1.5
COPIED = Answer(200, {}, b'<CopyObjectResult><ETag>"e"</ETag></CopyObjectResult>')
PART_COPIED = Answer(200, {}, b'<CopyPartResult><ETag>"e"</ETag></CopyPartResult>')
COMPLETED = Answer(200, {}, b'<CompleteMultipartUploadResult><ETag>"e"</ETag></CompleteMultipartUploadResult>')


def slow(request: Request) -> Answer:
    if request.method == "HEAD":
        return Answer(200, {"ETag": '"e"', "Content-Length": str(SIZE)})
    time.sleep(SILENT_SECONDS)
    if request.method == "POST":
        return COMPLETED
    return PART_COPIED if "partNumber" in request.path else COPIED


async def test_a_copy_may_be_silent_as_long_as_its_size_allows(kind: type[S3Store]) -> None:
    with proxy() as front:
        front.script = slow
        async with opened(kind, front.endpoint_url, attempts_max=1, read_seconds=0.5) as place:
            key, source = place.key("x"), place.key("source")
            calls = place.store._calls  # type: ignore[attr-defined]
            await calls.copy(source, E, key, SIZE, {})
            part = await calls.upload_part_copy(key, "upload", 1, source, E, 0, SIZE)
            assert part == Part(1, E, SIZE)
            await calls.complete_multipart(key, "upload", [part], Expect(None))


async def test_a_small_copy_may_not(kind: type[S3Store]) -> None:
    with proxy() as front:
        front.script = slow
        async with opened(kind, front.endpoint_url, attempts_max=1, read_seconds=0.5) as place:
            key, source = place.key("x"), place.key("source")
            calls = place.store._calls  # type: ignore[attr-defined]
            with pytest.raises(StoreTimeout):
                await calls.copy(source, E, key, 1, {})
            with pytest.raises(StoreTimeout):
                await calls.upload_part_copy(key, "upload", 1, source, E, 0, 1)
            with pytest.raises(StoreTimeout):
                await calls.complete_multipart(key, "upload", [Part(1, E, 1)], None)

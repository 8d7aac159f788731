"""Stores that want a checksum with each body get one, others none; what an answer says of the bytes is compared."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Awaitable, Callable

import pytest

from phfs_fuse.errors import BadAnswer, InvalidArgument
from phfs_fuse.store.base import Expect
from phfs_fuse.store.s3 import S3Store
from tests.contract.faulty import BIG, SMALL, opened, through
from tests.contract.place import Place
from tests.support.proxy import Action, Answer, Forward, Proxy, Request

pytestmark = pytest.mark.usefixtures("credentials")
CRC64, CRC32, MD5 = "x-amz-checksum-crc64nvme", "x-amz-checksum-crc32c", "content-md5"
ALL = {CRC64, CRC32, MD5}
Store = Callable[[Place, bytes], Awaitable[object]]


def refusal(code: str) -> Answer:
    return Answer(400, {"Content-Type": "application/xml"}, f"<Error><Code>{code}</Code></Error>".encode())


def wants(*headers: str, code: str = "InvalidRequest") -> Callable[[Request], Action]:
    """A store behind which each body needs one of `headers`."""

    def script(request: Request) -> Action:
        is_body = request.method == "PUT" and "x-amz-copy-source" not in request.headers
        if not is_body or any(name in request.headers for name in headers):
            return Forward()
        return refusal(code)

    return script


async def put(place: Place, data: bytes) -> None:
    await place.put("x", data)
    assert await place.read("x", 0, len(data)) == data


async def put_if_absent(place: Place, data: bytes) -> None:
    await place.store.delete(place.key("x"))
    await place.put("x", data, expect=Expect(None))


async def put_parts(place: Place, data: bytes) -> None:
    key = place.key("x")
    upload_id = await place.store.create_multipart(key, {})
    part = await place.store.upload_part(key, upload_id, 1, data)
    info = await place.store.complete_multipart(key, upload_id, [part], expect=None)
    assert await place.read("x", 0, len(data), info.etag) == data


def summed(front: Proxy) -> list[set[str]]:
    """The checksums of each body that was sent."""
    return [ALL & request.headers.keys() for request in front.requests if request.method == "PUT"]


@pytest.mark.parametrize("data", [b"", SMALL * 20_000, BIG], ids=["empty", "small", "big"])
@pytest.mark.parametrize("store", [put, put_if_absent, put_parts])
@pytest.mark.parametrize("wanted", [CRC64, CRC32, MD5])
async def test_the_checksum_that_the_store_takes(
    kind: type[S3Store], front: Proxy, store: Store, data: bytes, wanted: str
) -> None:
    if store is put_parts and not data:
        pytest.skip("an upload of no bytes has no parts")
    async with through(kind, front) as place:
        await place.store.prepare()
        front.requests.clear()
        front.script = wants(wanted)
        await store(place, data)
        tried = summed(front)
        assert tried == [set(), {CRC64}, {CRC32}, {MD5}][: len(tried)]
        assert tried[-1] == {wanted}
        front.requests.clear()
        await store(place, data)
        assert summed(front) == [{wanted}]  # it is known


async def test_every_kind_of_body(kind: type[S3Store], front: Proxy) -> None:
    """Also those by which a store is tried out, from the first request on."""
    async with through(kind, front) as place:
        front.script = wants(CRC64, CRC32, MD5, code="MissingContentMD5")
        await place.store.prepare()
        await place.put("folder/", b"")
        info = await place.put("x", SMALL, expect=Expect(None))
        copied = await place.store.copy(info.key, info.etag, place.key("y"), info.size, {"a": "b"}, expect=None)
        await place.store.delete(copied.key, expect=Expect(copied.etag))
        assert await place.store.delete_many({info.key: info.etag, place.key("folder/"): None}) == {}
        assert await place.names() == []


async def test_a_store_that_wants_none_gets_none(kind: type[S3Store], front: Proxy) -> None:
    async with through(kind, front) as place:
        for data in (SMALL, BIG):
            await put(place, data)
            await put_parts(place, data)
        assert summed(front) == [set()] * 4


@pytest.mark.parametrize("store", [put, put_parts])
async def test_a_request_that_is_refused_for_another_reason(kind: type[S3Store], front: Proxy, store: Store) -> None:
    async with through(kind, front) as place:
        front.script = lambda request: refusal("InvalidRequest") if request.method == "PUT" else Forward()
        with pytest.raises(InvalidArgument):
            await store(place, SMALL)
        front.script = lambda request: refusal("InvalidTag") if request.method == "PUT" else Forward()
        front.requests.clear()
        with pytest.raises(InvalidArgument):
            await store(place, SMALL)
        assert summed(front) == [set()]


@pytest.mark.parametrize("data", [SMALL, BIG], ids=["small", "big"])
@pytest.mark.parametrize("store", [put, put_if_absent, put_parts])
@pytest.mark.parametrize("name", [CRC64, CRC32])
async def test_an_answer_that_tells_of_other_bytes(
    kind: type[S3Store], front: Proxy, store: Store, data: bytes, name: str
) -> None:
    """The body is sent again."""
    told = iter([{name: base64.b64encode(b"another!"[: 8 if name == CRC64 else 4]).decode()}])

    def edit(answer: Answer) -> Answer:
        return Answer(answer.status, {**answer.headers, **next(told, {})}, answer.body)

    async with through(kind, front) as place:
        await place.store.prepare()
        front.script = lambda request: Forward(edit=edit) if request.method == "PUT" else Forward()
        front.requests.clear()
        await store(place, data)
        assert len(summed(front)) == 2
        assert await place.read("x", 0, len(data)) == data


async def test_answers_that_always_tell_of_other_bytes(kind: type[S3Store], front: Proxy) -> None:
    headers = {"ETag": f'"{hashlib.md5(SMALL).hexdigest()}"', CRC64: "AAAAAAAAAAA="}
    async with opened(kind, front.endpoint_url, attempts_max=2) as place:
        front.script = lambda _: Answer(200, headers)
        with pytest.raises(BadAnswer):
            await place.put("x", SMALL)

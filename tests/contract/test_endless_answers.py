"""Answers and listings without end: each request and each walk ends, on both ways to the store."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import pytest
import trio

from phfs_fuse.errors import BadAnswer, StoreTimeout, StoreUnavailable
from phfs_fuse.store import paging
from phfs_fuse.store.s3 import S3Store
from phfs_fuse.types import MIB, ObjectKey
from tests.contract.faulty import opened
from tests.support.proxy import Answer, Request, proxy

pytestmark = pytest.mark.usefixtures("credentials")
MODIFIED = "<LastModified>2024-01-01T00:00:00Z</LastModified>"
ENTRY = f"<Contents><Key>p/{{}}</Key>{MODIFIED}<ETag>e</ETag><Size>1</Size></Contents>"


def page(*names: str, token: str) -> Answer:
    entries = "".join(ENTRY.format(name) for name in names)
    more = f"<IsTruncated>true</IsTruncated><NextContinuationToken>{token}</NextContinuationToken>"
    return Answer(200, {}, f"<ListBucketResult>{more}{entries}</ListBucketResult>".encode())


async def walk(store: S3Store) -> int:
    """Count the pages of a listing."""
    token, pages = None, 0
    while True:
        found = await store.list("p/", delimiter=True, token=token)
        pages += 1
        if (token := found.next_token) is None:
            return pages


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda _: page("a", token="same"), "again and again"),
        (lambda no: page(token=f"t{no}"), "empty pages"),
        (lambda no: page(f"n{no:09}", token=f"t{no}"), "more than 300 pages"),
    ],
    ids=["the same page", "empty pages", "ever new pages"],
)
async def test_a_walk_ends(
    kind: type[S3Store], answer: Callable[[int], Answer], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paging, "PAGES_MAX", 300)
    numbers = count()
    with proxy() as front:
        front.script = lambda _: answer(next(numbers))
        async with opened(kind, front.endpoint_url) as place:
            with trio.fail_after(60), pytest.raises(BadAnswer, match=reason):
                await walk(place.store)  # type: ignore[arg-type]


async def test_empty_pages_within_a_listing_are_passed_over(kind: type[S3Store]) -> None:
    """As AWS answers where much was deleted."""
    numbers = count()

    def script(_: Request) -> Answer:
        no = next(numbers)
        if no == 120:
            return Answer(200, {}, b"<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>")
        return page(*([f"n{no:09}"] if no % 60 == 0 else []), token=f"t{no}")

    with proxy() as front:
        front.script = script
        async with opened(kind, front.endpoint_url) as place:
            assert await walk(place.store) == 3  # type: ignore[arg-type]


@pytest.mark.parametrize("names", [(), tuple(f"n{no:02}" for no in range(30))], ids=["nothing", "keys"])
async def test_an_empty_page_says_nothing_of_what_follows(kind: type[S3Store], names: tuple[str, ...]) -> None:
    """Neither that a folder is there, nor that an object is not."""

    def script(request: Request) -> Answer:
        if "continuation-token" not in request.path:
            return page(token="t")
        entries = "".join(ENTRY.format(name) for name in names)
        return Answer(200, {}, f"<ListBucketResult>{entries}</ListBucketResult>".encode())

    with proxy() as front:
        front.script = script
        async with opened(kind, front.endpoint_url) as place:
            wanted = [ObjectKey(f"p/{name}") for name in names]
            found = await place.store.list("p/", delimiter=False, count_max=1)
            assert [info.key for info in found.objects] == wanted
            assert found.next_token is None
            assert list(await place.store.look(wanted)) == wanted


@pytest.mark.parametrize("size", [1000, 3 * MIB], ids=["small", "big"])
async def test_a_dripping_body(kind: type[S3Store], size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phfs_fuse.config.model.SLOWEST_BYTES_PER_SECOND", 10 * MIB)
    headers = {"ETag": '"e"', "Content-Range": f"bytes 0-{size - 1}/{size}"}
    with proxy() as front:
        front.script = lambda _: Answer(206, headers, b"x" * size, drip=0.2)
        async with opened(kind, front.endpoint_url, attempts_max=1, read_seconds=1) as place:
            with trio.fail_after(30), pytest.raises(StoreTimeout):
                await place.read("x", 0, size)


async def test_a_body_longer_than_asked_for(kind: type[S3Store]) -> None:
    headers = {"ETag": '"e"', "Content-Range": "bytes 0-9/10"}
    with proxy() as front:
        front.script = lambda _: Answer(206, headers, b"x" * MIB)
        async with opened(kind, front.endpoint_url, attempts_max=1) as place:
            with pytest.raises(BadAnswer):
                await place.read("x", 0, 10)


async def test_a_listing_over_its_length(kind: type[S3Store]) -> None:
    with proxy() as front:
        front.script = lambda _: Answer(200, {}, b"<ListBucketResult>" + b" " * (20 * MIB) + b"</ListBucketResult>")
        async with opened(kind, front.endpoint_url, attempts_max=1) as place:
            with pytest.raises(StoreUnavailable):
                await place.list()

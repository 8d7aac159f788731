"""Places behind a proxy that answers as the test wants it, and what was sent to it."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from phfs_fuse.config.model import StoreConfig
from phfs_fuse.store.s3 import S3Store
from phfs_fuse.types import MIB, ETag
from tests.contract.conftest import BUCKET
from tests.contract.place import Place
from tests.support.proxy import Answer, Forward, Proxy, Request, Script

OTHER = ETag("0123456789abcdef0123456789abcdef")
SMALL = b"0123456789"
BIG = os.urandom(3 * MIB)  # by the other data path
SLOW_DOWN = Answer(503, {"Content-Type": "application/xml"}, b"<Error><Code>SlowDown</Code></Error>")
DENIED = Answer(403, {"Content-Type": "application/xml"}, b"<Error><Code>AccessDenied</Code></Error>")


@asynccontextmanager
async def opened(
    kind: type[S3Store], url: str, *, bucket: str = BUCKET, attempts_max: int = 3, read_seconds: float = 10
) -> AsyncIterator[Place]:
    config = StoreConfig(
        bucket=bucket,
        endpoint_url=url,
        connect_seconds=2,
        read_seconds=read_seconds,
        attempts_max=attempts_max,
    )
    store = kind(config)
    try:
        yield Place(store, "p/", "proxy")
    finally:
        await store.aclose()


@asynccontextmanager
async def through(kind: type[S3Store], front: Proxy) -> AsyncIterator[Place]:
    """A fresh place behind the proxy, what the set-up sent forgotten."""
    async with opened(kind, front.endpoint_url) as place:
        await place.store.check_bucket(create=True)
        page = await place.list()
        await place.store.delete_many({info.key: None for info in page.objects})
        front.requests.clear()
        yield place


def sent(front: Proxy, method: str, name: str = "") -> list[Request]:
    return [request for request in front.requests if request.method == method and name in request.path]


def in_turn(*actions: Answer | Forward) -> Script:
    queue = iter(actions)
    return lambda _: next(queue)


def is_real(request: Request, method: str) -> bool:
    """Of the test, not one of those by which a store's conditions are tried out."""
    return request.method == method and ".phfs-probe" not in request.path

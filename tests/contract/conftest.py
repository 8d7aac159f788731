"""The stores that have to keep the same contract, and a prefix of its own for each test."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import count
from pathlib import Path

import botocore.loaders
import pytest
import trio

from phfs_fuse.config.model import StoreConfig
from phfs_fuse.store.base import ObjectStore
from phfs_fuse.store.crt import CrtStore
from phfs_fuse.store.s3 import S3Store
from tests.contract.place import Place
from tests.support.fake_store import FakeStore
from tests.support.proxy import Proxy, proxy
from tests.support.servers import (
    ACCESS_KEY,
    SECRET_KEY,
    Server,
    credentials_env,
    minio,
    minio_binary,
    moto,
    versitygw,
)

BUCKET = "contract"
GIVEN = os.environ.get("PHFS_TEST_ENDPOINT")  # any other store, with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY
KINDS: Mapping[str, type[S3Store]] = {"boto": S3Store, "crt": CrtStore}
STORES = [
    "fake",
    "boto-moto",
    "crt-moto",
    pytest.param("boto-minio", marks=pytest.mark.minio),
    pytest.param("crt-minio", marks=pytest.mark.minio),
    pytest.param("boto-versitygw", marks=pytest.mark.versitygw),
    pytest.param("crt-versitygw", marks=pytest.mark.versitygw),
]
if GIVEN:
    STORES += ["boto-given", "crt-given"]
numbers = count(1)


@pytest.fixture(scope="session")
def moto_server(credentials: None) -> Iterator[Server]:
    with moto() as server:
        yield server


@pytest.fixture(scope="session")
def minio_server(credentials: None) -> Iterator[Server]:
    with minio() as server:
        yield server


@pytest.fixture(scope="session")
def versitygw_server(credentials: None) -> Iterator[Server]:
    with versitygw() as server:
        yield server


@pytest.fixture(scope="session")
def given_server() -> Server:
    """The store at $PHFS_TEST_ENDPOINT, with the credentials of the environment."""
    assert GIVEN
    keys = os.environ.get("AWS_ACCESS_KEY_ID", ACCESS_KEY), os.environ.get("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    return Server(GIVEN, *keys, pid=0, log=Path(os.devnull))


@pytest.fixture(scope="session")
def credentials() -> Iterator[None]:
    """Of the test servers, and nothing from the machine's own configuration."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        patch.setenv("AWS_CONFIG_FILE", os.devnull)
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
        for name, value in credentials_env().items():
            patch.setenv(name, value)
        # Each test that opens a store makes a session, which reads the same descriptions of the API again.
        patch.setattr(botocore.loaders, "create_loader", cache(botocore.loaders.create_loader))
        yield


@pytest.fixture(scope="session", params=STORES)
def store(request: pytest.FixtureRequest) -> Iterator[ObjectStore]:
    """Opened once: a session of boto3 takes longer to make than most tests to run."""
    kind, _, server_name = request.param.partition("-")
    if kind == "fake":
        yield FakeStore()
        return
    server: Server = request.getfixturevalue(f"{server_name}_server")
    opened = KINDS[kind](StoreConfig(bucket=BUCKET, endpoint_url=server.endpoint_url, read_seconds=10))
    trio.run(lambda: opened.check_bucket(create=True))
    yield opened
    trio.run(opened.aclose)


@pytest.fixture
def place(store: ObjectStore, request: pytest.FixtureRequest) -> Place:
    name = request.node.callspec.params["store"]
    return Place(store, f"t{next(numbers)}/", name)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> type[S3Store]:
    return KINDS[request.param]


@pytest.fixture
def front(request: pytest.FixtureRequest) -> Iterator[Proxy]:
    """A proxy before a store: MinIO if there is one, it is faster than moto."""
    server: Server = request.getfixturevalue("minio_server" if minio_binary() else "moto_server")
    with proxy(server.endpoint_url) as running:
        yield running

"""Who may ask a store, and where: credentials, profiles, endpoints, buckets."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from phfs_fuse.config.model import StoreConfig
from phfs_fuse.errors import AccessDenied, BucketNotFound, InvalidArgument, NotFound
from phfs_fuse.store.base import Expect
from phfs_fuse.store.s3 import S3Store
from tests.contract.conftest import BUCKET
from tests.contract.faulty import BIG, SMALL, opened
from tests.contract.place import Place
from tests.support.servers import ACCESS_KEY, SECRET_KEY, Server

pytestmark = pytest.mark.usefixtures("credentials")


@pytest.mark.minio
@pytest.mark.parametrize(
    "env", [{"AWS_SECRET_ACCESS_KEY": "not-the-secret"}, {"AWS_ACCESS_KEY_ID": "nobody-knows"}], ids=str
)
async def test_wrong_credentials(
    kind: type[S3Store],
    minio_server: Server,
    env: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    async with opened(kind, minio_server.endpoint_url) as place:
        for call in (
            place.store.check_bucket,
            lambda: place.head("x"),
            lambda: place.put("x", b"1"),
            lambda: place.put("x", b"1", expect=Expect(None)),
            lambda: place.put("x", BIG),
            lambda: place.read("x", 0, 1),
            lambda: place.list(),
        ):
            with pytest.raises(AccessDenied) as caught:
                await call()
            assert not {SECRET_KEY, "not-the-secret"} & set(str(caught.value).split())


async def test_no_credentials_at_all(kind: type[S3Store], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    async with opened(kind, "http://127.0.0.1:9") as place:
        with pytest.raises(AccessDenied, match="AWS_ACCESS_KEY_ID"):
            await place.store.check_bucket()


async def test_a_profile_that_is_not_there(kind: type[S3Store]) -> None:
    store = kind(StoreConfig(bucket=BUCKET, endpoint_url="http://127.0.0.1:9", profile="no-such"))
    with pytest.raises(AccessDenied, match="no-such"):
        await store.check_bucket()


@pytest.mark.minio
async def test_endpoint_and_credentials_of_a_profile(
    kind: type[S3Store], minio_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With credentials that have to be renewed."""
    soon = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    answer = {"Version": 1, "AccessKeyId": ACCESS_KEY, "SecretAccessKey": SECRET_KEY, "Expiration": soon}
    (tmp_path / "answer.json").write_text(json.dumps(answer))
    profile = ["[profile lab]", f"endpoint_url = {minio_server.endpoint_url}"]
    profile.append(f"credential_process = cat {tmp_path}/answer.json")
    (tmp_path / "config").write_text("\n".join(profile))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    store = kind(StoreConfig(bucket=BUCKET, profile="lab"))
    await store.check_bucket(create=True)
    place = Place(store, "profile/", "minio")
    await place.put("x", SMALL)
    assert await place.read("x", 0, 10) == SMALL
    await store.aclose()


async def test_an_endpoint_that_is_no_url(kind: type[S3Store]) -> None:
    async with opened(kind, "not a url") as place:
        with pytest.raises(InvalidArgument):
            await place.store.check_bucket()


@pytest.mark.parametrize("server", ["moto", pytest.param("minio", marks=pytest.mark.minio)])
async def test_a_bucket_that_is_not_there(kind: type[S3Store], server: str, request: pytest.FixtureRequest) -> None:
    url = request.getfixturevalue(f"{server}_server").endpoint_url
    async with opened(kind, url, bucket="no-such-bucket") as place:
        for call in (
            place.store.check_bucket,
            lambda: place.put("x", b"1"),
            lambda: place.put("x", b"1", expect=Expect(None)),
            lambda: place.read("x", 0, 1),
            lambda: place.list(),
        ):
            with pytest.raises(BucketNotFound):
                await call()
        with pytest.raises(NotFound):  # HEAD has no body that could say which of the two
            await place.head("x")


@pytest.mark.parametrize("server", ["moto", pytest.param("minio", marks=pytest.mark.minio)])
async def test_a_bucket_is_made_once(kind: type[S3Store], server: str, request: pytest.FixtureRequest) -> None:
    url = request.getfixturevalue(f"{server}_server").endpoint_url
    async with opened(kind, url, bucket=f"made-by-{kind.__name__.lower()}") as place:
        with pytest.raises(BucketNotFound):
            await place.store.check_bucket()
        await place.store.check_bucket(create=True)
        await place.store.check_bucket(create=True)
        await place.put("x", b"1")

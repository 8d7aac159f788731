"""What MinIO lists, and does not: keys below an object, prefixes of removed objects."""

from __future__ import annotations

from typing import Any

import boto3
import pytest

from phfs_fuse.config.model import StoreConfig
from phfs_fuse.errors import NotADirectory
from phfs_fuse.store.s3 import S3Store
from tests.support.servers import ACCESS_KEY, SECRET_KEY, Server

pytestmark = pytest.mark.minio


def client(server: Server, bucket: str) -> Any:
    s3: Any = boto3.client(
        "s3",
        endpoint_url=server.endpoint_url,
        aws_access_key_id=ACCESS_KEY,
        aws_secret_access_key=SECRET_KEY,
        region_name="us-east-1",
    )
    s3.create_bucket(Bucket=bucket)
    return s3


async def test_a_prefix_below_an_object_is_refused(minio_server: Server, kind: type[S3Store]) -> None:
    bucket = f"below-{kind.__name__.lower()}"
    s3 = client(minio_server, bucket)
    store = kind(StoreConfig(bucket=bucket, prefix="a/b/", endpoint_url=minio_server.endpoint_url))
    try:
        await store.check_bucket()
        s3.put_object(Bucket=bucket, Key="a/b/hidden")
        s3.put_object(Bucket=bucket, Key="a")  # hides nothing from who lists a/b/
        await store.check_bucket()
        s3.put_object(Bucket=bucket, Key="a/b")
        with pytest.raises(NotADirectory, match="object a"):
            await store.check_bucket()
        s3.delete_object(Bucket=bucket, Key="a/b")
        await store.check_bucket()
    finally:
        await store.aclose()
    assert [found["Key"] for found in s3.list_objects_v2(Bucket=bucket)["Contents"]] == ["a"]


@pytest.mark.parametrize("status", ["Enabled", "Suspended"])
async def test_prefixes_of_removed_objects_are_expected_where_versions_are_kept(
    minio_server: Server, kind: type[S3Store], status: str
) -> None:
    bucket = f"ghosts-{kind.__name__.lower()}-{status.lower()}"
    s3 = client(minio_server, bucket)
    store = kind(StoreConfig(bucket=bucket, endpoint_url=minio_server.endpoint_url))
    try:
        await store.check_bucket()
        assert not store.lists_ghosts
        s3.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
        s3.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": status})
        await store.check_bucket()
        assert store.lists_ghosts
    finally:
        await store.aclose()

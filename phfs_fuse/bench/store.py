"""The store as the benchmark sees it: puts what is to be read, asks what has arrived, checks it, cleans up.

It asks the store itself, never a mount, and the same way for every system.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import boto3
import botocore.exceptions as bexc
from botocore.config import Config

from phfs_fuse.bench.loads import MIB, Load, Loads
from phfs_fuse.errors import StoreStartupError

THREADS: Final = 16
POLL_SECONDS: Final = 0.02
BIG_BYTES: Final = 8 * MIB
# As rclone, s3fs and phfs write them, so that each finds the times and modes that it looks for.
METADATA: Final = {"mode": "0100644", "uid": "0", "gid": "0", "mtime": "1735689600"}


def s3_client(endpoint_url: str | None) -> Any:
    """With the usual credentials of boto3."""
    config = Config(
        s3={"addressing_style": "path" if endpoint_url else "auto"},
        max_pool_connections=THREADS * 2,
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    session = boto3.Session()
    region = session.region_name or "us-east-1"
    return session.client("s3", endpoint_url=endpoint_url, region_name=region, config=config)


@dataclass(frozen=True, slots=True)
class Found:
    size: int
    etag: str


class Store:
    """A bucket; all keys that are made lie below one prefix, which `clean` empties."""

    def __init__(self, endpoint_url: str | None, bucket: str) -> None:
        self.endpoint_url, self.bucket = endpoint_url, bucket
        self.client = s3_client(endpoint_url)
        self.server = ""  # what it calls itself

    def check(self) -> None:
        """Raises: StoreStartupError: no such bucket, no credentials, nobody answers."""
        where = f"s3://{self.bucket}"
        try:
            answer = self.client.head_bucket(Bucket=self.bucket)
        except (bexc.NoCredentialsError, bexc.PartialCredentialsError) as exc:
            raise StoreStartupError(
                f"{where}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or name a profile"
            ) from exc
        except bexc.ClientError as exc:
            status = exc.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            reason: dict[int | None, str] = {
                404: "there is no such bucket; make it first",
                403: "access denied; check the credentials",
            }
            raise StoreStartupError(f"{where}: {reason.get(status, f'the store answers {status}')}") from exc
        except bexc.BotoCoreError as exc:
            raise StoreStartupError(
                f"{where}: the store does not answer ({type(exc).__name__}); check --endpoint-url and the network"
            ) from exc
        self.server = answer["ResponseMetadata"]["HTTPHeaders"].get("server", "")

    def head(self, key: str) -> Found | None:
        try:
            answer = self.client.head_object(Bucket=self.bucket, Key=key)
        except bexc.ClientError:
            return None
        return Found(answer["ContentLength"], answer["ETag"])

    def list(self, prefix: str) -> dict[str, int]:
        """Key without the prefix -> size; markers of directories are left out."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix)
        return {
            entry["Key"].removeprefix(prefix): entry["Size"]
            for page in pages
            for entry in page.get("Contents", ())
            if not entry["Key"].endswith("/")
        }

    def range(self, key: str, offset: int, size: int) -> bytes:
        asked = f"bytes={offset}-{offset + size - 1}"
        body: bytes = self.client.get_object(Bucket=self.bucket, Key=key, Range=asked)["Body"].read()
        return body

    def sha256(self, key: str) -> str:
        digest = hashlib.sha256()
        for chunk in self.client.get_object(Bucket=self.bucket, Key=key)["Body"].iter_chunks(MIB):
            digest.update(chunk)
        return digest.hexdigest()

    def put(self, prefix: str, loads: Loads) -> None:
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(lambda item: self._put(prefix + item[0], item[1]), loads.items()))

    def _put(self, key: str, load: Load) -> None:
        self.client.upload_fileobj(_Reader(load.chunks()), self.bucket, key, ExtraArgs={"Metadata": METADATA})

    def copy(self, source: str, target: str, names: Mapping[str, Load]) -> None:
        """Within the store."""

        def copy_one(name: str) -> None:
            self.client.copy_object(
                Bucket=self.bucket, Key=target + name, CopySource={"Bucket": self.bucket, "Key": source + name}
            )

        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(copy_one, names))

    def warm(self, prefix: str, loads: Loads) -> None:
        """List what is there and read what is big, so that the disk of a store on this machine is in no figure."""
        self.list(prefix)
        big = [name for name, load in loads.items() if load.size >= BIG_BYTES]
        for name in big:
            for _ in self.client.get_object(Bucket=self.bucket, Key=prefix + name)["Body"].iter_chunks(MIB):
                pass

    def wrong(self, prefix: str, loads: Loads) -> str | None:
        """What differs from `loads`, in words; None when nothing does."""
        found = self.list(prefix)
        for name, load in loads.items():
            if (size := found.get(name)) is None:
                return f"{name} is not in the store"
            if size != load.full_size:
                return f"{name} has {size} bytes in the store, not {load.full_size}"
        if extra := found.keys() - loads.keys():
            return f"{len(extra)} objects too many in the store, such as {min(extra)}"
        with ThreadPoolExecutor(THREADS) as pool:
            sums = pool.map(lambda name: self.sha256(prefix + name), loads)
            for (name, load), got in zip(loads.items(), sums, strict=True):
                if got != load.sha256():
                    return f"{name} has other bytes in the store"
        return None

    def clean(self, prefix: str) -> None:
        """Delete every object and every unfinished upload below `prefix`."""
        assert prefix.endswith("/")
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix)
        for page in pages:
            if keys := [{"Key": entry["Key"]} for entry in page.get("Contents", ())]:
                self.client.delete_objects(Bucket=self.bucket, Delete={"Objects": keys, "Quiet": True})
        pages = self.client.get_paginator("list_multipart_uploads").paginate(Bucket=self.bucket, Prefix=prefix)
        for upload in (one for page in pages for one in page.get("Uploads", ())):
            self.client.abort_multipart_upload(Bucket=self.bucket, Key=upload["Key"], UploadId=upload["UploadId"])


class Arrival:
    """Whether below a prefix are objects of just these sizes, asked again and again for little: a listing of a
    thousand keys each time would take the machine from what is measured. So one key that the last listing had wrong
    is asked for alone, until it is right."""

    def __init__(self, store: Store, prefix: str, sizes: Mapping[str, int]) -> None:
        self._store, self._prefix, self._sizes = store, prefix, sizes
        self._wrong: str | None = max(sizes, default=None)

    def is_there(self) -> bool:
        if self._wrong is not None:
            found = self._store.head(self._prefix + self._wrong)
            if (found.size if found else None) != self._sizes.get(self._wrong):
                return False
            if len(self._sizes) == 1:
                return True
        listed = self._store.list(self._prefix)
        different = {name for name, _ in listed.items() ^ self._sizes.items()}
        self._wrong = max(different, default=None)
        return not different


def wait_until(stored: Callable[[], bool], seconds: float) -> float:
    """When (CLOCK_MONOTONIC) `stored` was first seen true. Raises: TimeoutError."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if stored():
            return time.monotonic()
        time.sleep(POLL_SECONDS)
    raise TimeoutError(f"not in the store after {seconds:.0f} s")


class _Reader:
    """A file to read once, from chunks."""

    def __init__(self, chunks: Iterator[bytes | memoryview]) -> None:
        self._chunks, self._left = chunks, b""

    def read(self, size: int = -1) -> bytes:
        parts, wanted = [self._left], size if size >= 0 else 1 << 62
        have = len(self._left)
        while have < wanted and (chunk := next(self._chunks, None)) is not None:
            parts.append(bytes(chunk))
            have += len(chunk)
        whole = b"".join(parts)
        self._left = whole[wanted:]
        return whole[:wanted]

"""What common work costs, in counts that do not depend on how fast the machine is: a regression shows here first.

The counts are those of the mount itself (`phfs status --json`, `counters`). Each bound says what it is made of.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest

from phfs_fuse.types import KIB, MIB
from tests.mount.place import MountPlace, a_mount, run, script
from tests.support.servers import minio_binary

pytestmark = pytest.mark.skipif(minio_binary() is None, reason="moto lists no metadata: needs MinIO")

MAKE = """
import sys
for number in range(int(sys.argv[2])):
    with open(f"{sys.argv[1]}/f{number:04}", "wb", buffering=0) as file:
        file.write(b"x" * 4096)
"""
READ = """
import sys
with open(sys.argv[1], "rb", buffering=0) as file:
    while file.read(1 << 20):
        pass
"""
WRITE = """
import os, sys
fd = os.open(sys.argv[1], os.O_WRONLY)
os.pwrite(fd, b"y" * 4096, int(sys.argv[2]))
os.close(fd)
"""


class Cost(dict[str, Any]):
    """What was counted while a `with` block ran."""

    def store(self, op: str) -> int:
        return int(self["store_requests"].get(op, 0))


def counters(place: MountPlace) -> Mapping[str, Any]:
    found: Mapping[str, Any] = json.loads(place.mount.must("status", place.path, "--json"))["counters"]
    return found


@contextmanager
def counted(place: MountPlace) -> Iterator[Cost]:
    """The cost of the block, and of the upload of what it changed."""
    cost, before = Cost(), counters(place)
    yield cost
    place.sync()
    for name, now in counters(place).items():
        then = before[name]
        cost[name] = now - then if isinstance(now, int) else {k: v - then.get(k, 0) for k, v in now.items()}


@pytest.fixture
def place() -> Iterator[MountPlace]:
    """A mount of its own: what one test leaves to be done must not be counted in the next."""
    with a_mount() as found:
        yield found


def put_all(place: MountPlace, names: list[str]) -> None:
    s3, bucket = place.mount.s3, place.mount.bucket
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: s3.put_object(Bucket=bucket, Key=f"{place.mount.prefix}{name}", Body=b"x"), names))


def put_big(place: MountPlace, name: str, size: int) -> None:
    """An object of so many times 64 MiB, most of it copied by the store itself."""
    s3, bucket, key = place.mount.s3, place.mount.bucket, f"{place.mount.prefix}{name}"
    s3.put_object(Bucket=bucket, Key="piece", Body=os.urandom(64 * MIB))
    upload_id = s3.create_multipart_upload(Bucket=bucket, Key=key)["UploadId"]
    where = {"Bucket": bucket, "Key": key, "UploadId": upload_id}
    parts = [
        s3.upload_part_copy(**where, PartNumber=number, CopySource={"Bucket": bucket, "Key": "piece"})
        for number in range(1, size // (64 * MIB) + 1)
    ]
    listed = [{"PartNumber": n, "ETag": part["CopyPartResult"]["ETag"]} for n, part in enumerate(parts, 1)]
    s3.complete_multipart_upload(**where, MultipartUpload={"Parts": listed})
    s3.delete_object(Bucket=bucket, Key="piece")


def test_a_cold_listing_of_a_tree_costs_a_request_a_folder(place: MountPlace) -> None:
    put_all(place, [f"d{number % 50:02}/f{number:04}" for number in range(1000)])
    with counted(place) as cost:
        assert run("ls", "-lR", place.path).count("\n") > 1000
    assert 51 <= cost.store("list") <= 60  # the root and each folder; a few looks at single names
    assert cost.store("head") <= 60  # whether a folder has a marker with attributes
    assert cost.store("get") == 0
    assert sum(cost["fuse_requests"].values()) <= 50 * 12  # per folder: look-up, open, pages, close


def test_a_second_listing_costs_no_request(place: MountPlace) -> None:
    put_all(place, [f"d{number % 5}/f{number:04}" for number in range(50)])
    with a_mount("--attr-ttl", "10m", "--state-dir", str(place.mount.root / "state2")) as patient:
        put_all(patient, [f"d{number % 5}/f{number:04}" for number in range(50)])
        run("ls", "-lR", patient.path)
        with counted(patient) as cost:
            run("ls", "-lR", patient.path)
    assert cost.store("list") + cost.store("head") == 0


def test_new_files_cost_a_put_each(place: MountPlace) -> None:
    folder = place.path / "new"
    folder.mkdir()
    (folder / "first").touch()  # the store is asked once which conditions it keeps
    place.sync()
    with counted(place) as cost:
        script(MAKE, folder, "100")
    assert cost.store("put") == 100
    assert cost.store("list") + cost.store("head") <= 12  # the kernel's look at the folder, its marker
    assert cost["store_sent_bytes"]["put"] == 100 * 4 * KIB
    assert cost["uploaded_files"] == 100
    assert cost["journal_transactions"] <= 100 * 4 + 20  # made, times set, attempt, stored
    # look-up, attributes of the folder, create, write, times, flush, release
    assert sum(cost["fuse_requests"].values()) <= 100 * 7 + 20
    assert cost["copied_bytes"] == 0
    assert cost["thread_hops"].get("disk", 0) == 0


def test_what_was_read_or_written_is_read_again_from_the_cache(place: MountPlace) -> None:
    put_all(place, ["small"])
    (place.path / "new").write_bytes(b"z" * 3 * MIB)
    run("cat", place.path / "small")
    place.sync()
    place.remount()
    with counted(place) as cost:
        script(READ, place.path / "small")
        script(READ, place.path / "new")
    assert cost.store("get") == 0
    assert cost["store_received_bytes"].get("get", 0) == 0


def test_a_sequential_read_asks_in_large_pieces(place: MountPlace) -> None:
    put_big(place, "big", 64 * MIB)
    with counted(place) as cost:
        script(READ, place.path / "big")
    assert cost["store_received_bytes"]["get"] == 64 * MIB  # every byte once
    assert cost.store("get") <= 64 // 8 + 8  # 8 MiB each, after a start with smaller ones
    assert cost["thread_hops"].get("store", 0) <= cost.store("get")
    assert cost["thread_hops"].get("disk", 0) <= 4  # pages are read where they were just written: in memory
    assert cost["fuse_requests"]["read"] <= 64 + 8  # 1 MiB each
    with counted(place) as cost:
        script(READ, place.path / "big")
    assert cost.store("get") == 0
    assert cost["thread_hops"].get("store", 0) == 0


def test_a_change_in_a_large_file_sends_little(place: MountPlace) -> None:
    put_big(place, "big", 512 * MIB)
    with counted(place) as cost:
        script(WRITE, place.path / "big", str(200 * MIB + 1234))
    assert cost["store_sent_bytes"]["upload part"] <= 16 * MIB
    assert cost["store_received_bytes"]["get"] <= 16 * MIB  # what the changed part lacks
    assert cost.store("complete multipart") == 1
    assert cost.store("put") <= 16  # the probe of the store's conditions


def test_what_a_change_left_as_it_was_stays_cached(place: MountPlace) -> None:
    put_big(place, "big", 64 * MIB)
    script(READ, place.path / "big")
    script(WRITE, place.path / "big", str(20 * MIB + 1234))
    place.sync()
    with counted(place) as cost:
        script(READ, place.path / "big")
    assert cost["store_received_bytes"].get("get", 0) == 0


def test_requests_that_wait_already_need_no_turn_of_the_loop(place: MountPlace) -> None:
    """Bounded by nothing else: how often the next request is there in time is the machine's affair."""
    with counted(place) as cost:
        script(MAKE, place.path, "200")
    assert 0 < cost["fuse_waits"] < sum(cost["fuse_requests"].values())


def test_appending_to_a_large_file_sends_little(place: MountPlace) -> None:
    put_big(place, "big", 128 * MIB)
    with counted(place) as cost:
        for number in range(10):
            script(WRITE, place.path / "big", str(128 * MIB + number * 4 * KIB))
    assert cost["store_sent_bytes"]["upload part"] <= cost.store("complete multipart") * 16 * MIB
    assert cost.store("complete multipart") <= 10


def test_renaming_a_folder_copies_each_file_once(place: MountPlace) -> None:
    put_all(place, [f"a/f{number:04}" for number in range(200)])
    run("ls", place.path / "a")
    with counted(place) as cost:
        (place.path / "a").rename(place.path / "b")
    assert cost.store("copy") <= 200 + 2  # each once, and the probe of the store's conditions
    # Nothing is at the new names, the old ones are as they were: up to a hundred names a listing, a few one by one.
    assert cost.store("list") + cost.store("head") <= 100
    assert cost.store("delete") <= 40  # many keys with one request
    assert cost.store("get") + cost["store_sent_bytes"].get("put", 0) <= 16


def test_removing_a_folder_takes_few_requests(place: MountPlace) -> None:
    put_all(place, [f"a/f{number:04}" for number in range(500)])
    with counted(place) as cost:
        run("rm", "-r", place.path / "a")
    assert cost.store("delete") <= 12
    assert cost.store("head") + cost.store("list") <= 40

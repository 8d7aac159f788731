"""Others' changes on a real mount: heard of by MinIO's stream of events, told to the kernel, and looked up."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tests.mount.place import MountPlace, a_mount, run, watchdog
from tests.support.mounts import TestMount, mounted, s3_client, shared_server
from tests.support.proxy import Answer, Forward, Proxy, Request, proxy
from tests.support.servers import moto

pytestmark = [pytest.mark.fuse, pytest.mark.minio]
LATE_SECONDS = 30.0
NEVER = "1h"  # as attr-ttl: what shows sooner was heard of


def within(answer: Callable[[], object], wanted: object) -> None:
    deadline = time.monotonic() + LATE_SECONDS
    while (got := answer()) != wanted:
        assert time.monotonic() < deadline, f"still {got!r} instead of {wanted!r}"
        time.sleep(0.02)


def state(mount: TestMount) -> str:
    return str(mount.status()["events"]["state"])


def require_live(mount: TestMount) -> None:
    """Skip where the server holds its stream back, as MinIO from October 2025 on does."""
    deadline = time.monotonic() + LATE_SECONDS
    while state(mount) != "live":
        if time.monotonic() > deadline:
            pytest.skip("this MinIO does not flush its stream of events")
        time.sleep(0.1)


@pytest.fixture(scope="module")
def place() -> Iterator[MountPlace]:
    with a_mount("--attr-ttl", NEVER) as found:
        require_live(found.mount)
        yield found


@contextmanager
def behind_proxy(*flags: str) -> Iterator[tuple[TestMount, Proxy]]:
    """A mount whose requests are seen; others use the server itself."""
    server = shared_server()
    with proxy(server.endpoint_url) as front:
        seen = replace(server, endpoint_url=front.endpoint_url)
        with mounted("--allow-other", *flags, server=seen) as mount, watchdog(mount.path):
            mount.s3 = s3_client(server)
            require_live(mount)
            yield mount, front


def put(mount: TestMount, name: str, body: bytes) -> None:
    mount.s3.put_object(Bucket=mount.bucket, Key=mount.prefix + name, Body=body)


def content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


@pytest.mark.parametrize("name", ["plain", "a b+c%20&d", "é-\u202e", "tab\there", "100%", "%41"])
def test_foreign_changes_of_a_file_show(place: MountPlace, mnt: Path, name: str) -> None:
    path = mnt / name
    assert content(path) is None
    place.foreign_put(path, b"first")
    within(lambda: content(path), b"first")
    with path.open("rb") as file:
        assert file.read(1) == b"f"
        place.foreign_put(path, b"second one")
        within(lambda: content(path), b"second one")
        within(lambda: path.stat().st_size, 10)
        file.seek(0)
        assert file.read() == b"first"
    place.foreign_delete(path)
    within(path.exists, False)
    within(lambda: os.listdir(mnt), [])


def test_foreign_folders_come_and_go(place: MountPlace, mnt: Path) -> None:
    assert os.listdir(mnt) == []
    assert not (mnt / "a").exists()
    place.foreign_put(mnt / "a/b/c", b"x")
    within(lambda: content(mnt / "a/b/c"), b"x")
    assert os.listdir(mnt) == ["a"]
    place.foreign_delete(mnt / "a/b/c")
    within(lambda: os.listdir(mnt), [])
    within((mnt / "a").exists, False)
    place.mount.s3.put_object(Bucket=place.mount.bucket, Key=place.key(mnt / "d") + "/", Body=b"")
    within((mnt / "d").is_dir, True)


def test_foreign_copies_and_multipart_uploads_show(place: MountPlace, mnt: Path) -> None:
    s3, bucket, key = place.mount.s3, place.mount.bucket, place.key(mnt / "f")
    assert content(mnt / "f") is None
    upload_id = s3.create_multipart_upload(Bucket=bucket, Key=key)["UploadId"]
    part = s3.upload_part(Bucket=bucket, Key=key, UploadId=upload_id, PartNumber=1, Body=b"in parts")
    parts = {"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]}
    s3.complete_multipart_upload(Bucket=bucket, Key=key, UploadId=upload_id, MultipartUpload=parts)
    within(lambda: content(mnt / "f"), b"in parts")
    assert content(mnt / "g") is None
    s3.copy_object(Bucket=bucket, Key=place.key(mnt / "g"), CopySource={"Bucket": bucket, "Key": key})
    within(lambda: content(mnt / "g"), b"in parts")


def test_a_chmod_on_another_mount_shows(place: MountPlace, mnt: Path) -> None:
    (mnt / "f").write_bytes(b"x")
    place.sync()
    with mounted(server=place.mount.server, bucket=place.mount.bucket) as other:
        run("chmod", "600", other.path / (mnt / "f").relative_to(place.path))
    within(lambda: oct((mnt / "f").stat().st_mode), "0o100600")


def test_a_warm_tree_costs_no_request() -> None:
    """Although the lifetime without events has run out long before."""
    with behind_proxy("--attr-ttl", "10ms") as (mount, front):
        for number in range(300):
            put(mount, f"d{number % 7}/f{number}", b"x")
        run("find", mount.path, "-type", "f", "-size", "1")
        within(lambda: mount.status()["events"]["heard"], 300)
        run("find", mount.path, "-type", "f", "-size", "1")
        front.requests.clear()
        found = run("find", mount.path, "-type", "f").split()
        assert len(found) == 300
        assert [request.path for request in front.requests if "events=" not in request.path] == []


def test_what_changes_while_the_stream_is_away_shows() -> None:
    with behind_proxy("--attr-ttl", "1s") as (mount, front):
        put(mount, "f", b"old")
        within(lambda: content(mount.path / "f"), b"old")

        def no_stream(request: Request) -> Answer | Forward:
            return Answer(503) if "events=" in request.path else Forward()

        front.script = no_stream
        front.cut_streams()
        within(lambda: state(mount), "reconnecting")
        put(mount, "f", b"in the gap")
        within(lambda: content(mount.path / "f"), b"in the gap")
        front.script = lambda _: Forward()
        within(lambda: state(mount), "live")
        put(mount, "f", b"afterwards")
        within(lambda: content(mount.path / "f"), b"afterwards")


def test_what_changes_while_the_worker_is_dead_shows(place: MountPlace, mnt: Path) -> None:
    place.foreign_put(mnt / "f", b"old")
    within(lambda: content(mnt / "f"), b"old")
    place.mount.kill_worker()
    place.foreign_put(mnt / "f", b"meanwhile")
    within(lambda: content(mnt / "f"), b"meanwhile")
    require_live(place.mount)
    place.foreign_put(mnt / "f", b"afterwards")
    within(lambda: content(mnt / "f"), b"afterwards")


def test_a_storm_of_events(place: MountPlace, mnt: Path) -> None:
    """More than the stream is relied on for, some of it on names that are known."""
    names = [f"f{number}" for number in range(50)]
    for name in names:
        place.foreign_put(mnt / name, b"old")
    within(lambda: sorted(os.listdir(mnt)), sorted(names))
    run("sh", "-c", 'for i in $(seq 1500); do echo $i > "$0/own$i"; done', mnt)
    place.sync()
    for name in names:
        place.foreign_put(mnt / name, b"newer")
    for name in names:
        within(lambda name=name: content(mnt / name), b"newer")  # type: ignore[misc]


def test_a_store_without_events_is_served_as_before() -> None:
    with moto() as server, mounted("--attr-ttl", "10ms", server=server) as mount:
        put(mount, "f", b"old")
        within(lambda: run("cat", mount.path / "f"), "old")
        assert state(mount) == "off"
        put(mount, "f", b"new")
        within(lambda: run("cat", mount.path / "f"), "new")


def test_events_off() -> None:
    with mounted("--events", "off") as mount:
        assert state(mount) == "off"

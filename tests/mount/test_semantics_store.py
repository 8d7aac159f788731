"""The tree against the objects: what other clients wrote shows up right, and what the mount writes is read right.

Every test here needs the store; there is nothing to compare on a local disk.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import sys
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import pytest
from botocore.exceptions import ClientError

from tests.mount.place import MountPlace, a_mount, attempt, refused, run, saved, within
from tests.mount.trees import tree
from tests.support.mounts import mounted, shared_server
from tests.support.proxy import Answer, Forward, Request, proxy
from tests.support.servers import moto

pytestmark = [pytest.mark.fuse, pytest.mark.minio]
TTL_SECONDS = 1.0
RCLONE = shutil.which("rclone") or Path(sys.executable).with_name("rclone")
LATE_SECONDS = 15.0  # when a change that has to be seen after TTL_SECONDS is given up


@pytest.fixture(scope="module")
def place() -> Iterator[MountPlace]:
    with a_mount("--attr-ttl", f"{TTL_SECONDS:g}s") as found:
        yield found


def put(
    place: MountPlace,
    path: Path,
    body: bytes = b"",
    metadata: Mapping[str, str] | None = None,
    *,
    marker: bool = False,
) -> None:
    place.mount.s3.put_object(
        Bucket=place.mount.bucket,
        Key=place.key(path) + "/" * marker,
        Body=body,
        Metadata=dict(metadata or {}),
    )


@pytest.fixture
def theirs(place: MountPlace, request: pytest.FixtureRequest) -> Path:
    """A folder that the mount has not heard of: what is put there is seen by the next call at the latest
    when what is known of its parent is too old."""
    return place.path / f"theirs-{request.node.name}"


def shown(path: Path) -> Path:
    """`path`, once it is seen."""
    within(LATE_SECONDS, lambda: os.path.lexists(path), True)
    return path


def keys(place: MountPlace, folder: Path) -> list[str]:
    """The keys under `folder`, relative to it, markers with their slash."""
    prefix = f"{place.key(folder)}/"
    pages = place.mount.s3.get_paginator("list_objects_v2").paginate(Bucket=place.mount.bucket, Prefix=prefix)
    return [found["Key"][len(prefix) :] for page in pages for found in page.get("Contents", [])]


def metadata(place: MountPlace, path: Path) -> dict[str, str]:
    found: dict[str, str] = place.mount.s3.head_object(Bucket=place.mount.bucket, Key=place.key(path))["Metadata"]
    return found


# --- what others wrote


def test_objects_without_metadata(place: MountPlace, theirs: Path) -> None:
    put(place, theirs / "new/sub/console.bin", b"from the console")
    shown(theirs)
    found = (theirs / "new/sub/console.bin").stat()
    assert (theirs / "new/sub/console.bin").read_bytes() == b"from the console"
    assert (oct(found.st_mode), found.st_nlink, found.st_size) == ("0o100644", 1, 16)
    assert (found.st_uid, found.st_gid) == (os.getuid(), os.getgid())
    assert abs(found.st_mtime - time.time()) < 600
    assert oct((theirs / "new").stat().st_mode) == "0o40755"
    assert os.listdir(theirs / "new") == ["sub"]


def test_what_others_stored_with_an_object_stays(place: MountPlace, theirs: Path) -> None:
    names = ("chmod", "touch", "append", "moved", "folder/in")
    given = {"ContentType": "application/vnd.my+json", "ContentEncoding": "gzip", "CacheControl": "max-age=60"}
    where = {"Bucket": place.mount.bucket}
    for name in names:
        key = place.key(theirs / name)
        place.mount.s3.put_object(
            **where, Key=key, Body=b"x", **given, Metadata={"project": "alpha"}, Tagging="team=red"
        )
    shown(theirs / "chmod").chmod(0o600)
    (theirs / "touch").touch()
    (theirs / "moved").rename(theirs / "moved.txt")
    (theirs / "folder").rename(theirs / "other")
    with (theirs / "append").open("ab") as file:
        file.write(b"y")
    place.sync()
    for name in ("chmod", "touch", "append", "moved.txt", "other/in"):
        key = place.key(theirs / name)
        found = place.mount.s3.head_object(**where, Key=key)
        assert {field: found.get(field) for field in given} == given, name
        assert found["Metadata"]["project"] == "alpha", name
        tags = place.mount.s3.get_object_tagging(**where, Key=key)["TagSet"]
        assert tags == [{"Key": "team", "Value": "red"}], name


def test_bytes_under_a_key_that_ends_in_a_slash(place: MountPlace, theirs: Path) -> None:
    for name in ("rmdir", "child", "move", "chmod"):
        put(place, theirs / name, b"bytes", marker=True)
    shown(theirs)
    refused(errno.ENOTEMPTY, (theirs / "rmdir").rmdir)
    (theirs / "child/x").write_bytes(b"x")
    (theirs / "move").rename(theirs / "moved")
    (theirs / "chmod").chmod(0o700)
    place.sync()
    place.remount()
    assert sorted(keys(place, theirs)) == ["child/", "child/x", "chmod/", "moved/", "rmdir/"]
    for name in ("rmdir", "child", "moved", "chmod"):
        assert (theirs / name / ".phfs-file").read_bytes() == b"bytes", name
    assert oct((theirs / "chmod").stat().st_mode) == "0o40700"
    assert sorted(os.listdir(theirs / "child")) == [".phfs-file", "x"]
    shutil.rmtree(theirs)
    place.sync()
    assert keys(place, theirs) == []


def test_markers_of_others(place: MountPlace, theirs: Path) -> None:
    put(place, theirs / "empty", marker=True)
    put(place, theirs / "full", marker=True)
    put(place, theirs / "full/f", b"f")
    assert sorted(tree(shown(theirs))) == ["empty", "full", "full/f"]
    (theirs / "empty").rmdir()
    (theirs / "full/f").unlink()
    (theirs / "full").rmdir()
    theirs.rmdir()
    place.sync()
    assert keys(place, theirs) == []


@pytest.mark.parametrize(
    ("body", "given", "mode", "mtime_ns"),
    [
        (
            b"x",
            {"mode": "0100750", "uid": "7", "gid": "8", "mtime": "1600000000.123456789"},
            0o100750,
            1600000000123456789,
        ),
        (b"x", {"mode": "100640", "uid": "7", "gid": "8", "mtime": "1600000000.5"}, 0o100640, 1600000000500000000),
        (b"x", {"mode": str(0o100755), "uid": "7", "gid": "8", "mtime": "1600000000"}, 0o100755, 1600000000000000000),
        (b"f", {"mode": "0120777", "uid": "7", "gid": "8", "mtime": "1600000000"}, 0o120777, 1600000000000000000),
        (b"", {"mode": "010644", "uid": "7", "gid": "8", "mtime": "1600000000"}, 0o010644, 1600000000000000000),
    ],
    ids=["ours", "rclone", "s3fs-decimal", "symlink", "fifo"],
)
def test_attributes_of_others(
    place: MountPlace, theirs: Path, body: bytes, given: dict[str, str], mode: int, mtime_ns: int
) -> None:
    put(place, theirs / "o", body, given)
    found = os.lstat(shown(theirs) / "o")
    assert oct(found.st_mode) == oct(mode)
    assert (found.st_uid, found.st_gid, found.st_mtime_ns) == (7, 8, mtime_ns)
    if stat.S_ISLNK(mode):
        assert os.readlink(theirs / "o") == body.decode()


def test_unreadable_attributes_are_defaults(place: MountPlace, theirs: Path) -> None:
    put(place, theirs / "o", b"x", {"mode": "rwxr-xr-x", "uid": "-1", "gid": "staff", "mtime": "yesterday"})
    found = (shown(theirs) / "o").stat()
    assert (oct(found.st_mode), found.st_uid, found.st_gid) == ("0o100644", os.getuid(), os.getgid())
    assert abs(found.st_mtime - time.time()) < 600


def test_links_of_rclone_and_geesefs(place: MountPlace, theirs: Path) -> None:
    put(place, theirs / "target", b"reached")
    put(place, theirs / "one.rclonelink", b"target")
    put(place, theirs / "two", b"", {"--symlink-target": "target"})
    assert sorted(os.listdir(shown(theirs))) == ["one", "target", "two"]
    for name in ("one", "two"):
        assert os.readlink(theirs / name) == "target"
        assert (theirs / name).read_bytes() == b"reached"


def test_a_directory_with_attributes(place: MountPlace, theirs: Path) -> None:
    put(place, theirs / "d", b"", {"mode": "040700", "uid": "5", "gid": "6", "mtime": "1500000000.25"}, marker=True)
    found = (shown(theirs) / "d").stat()
    assert (oct(found.st_mode), found.st_uid, found.st_gid) == ("0o40700", 5, 6)
    assert found.st_mtime_ns == 1_500_000_000_250_000_000


def test_keys_that_are_no_paths_are_left_out(place: MountPlace, theirs: Path) -> None:
    put(place, theirs / "good", b"x")
    prefix = place.key(theirs)
    for bad in ("a//b", "./c", "x/../d", "n" * 256):
        try:
            place.mount.s3.put_object(Bucket=place.mount.bucket, Key=f"{prefix}/{bad}", Body=b"x")
        except ClientError:
            continue  # this store refuses such keys
    shown(theirs)
    for _ in range(2):
        assert "good" in os.listdir(theirs)
        for folder, folders, files in os.walk(theirs):
            for name in folders + files:
                assert name not in ("", ".", "..")
                assert len(name) <= 255
                os.lstat(os.path.join(folder, name))
        place.remount()


def test_a_file_and_a_folder_of_one_name() -> None:
    """On moto: MinIO does not list what is below a key that is an object as well."""
    with moto() as server, mounted(server=server) as mount:
        for key, body in (("x/y", b"below"), ("x", b"beside")):
            mount.s3.put_object(Bucket=mount.bucket, Key=mount.prefix + key, Body=body)
        found = run("sh", "-c", "ls; cat x/y x.phfs-file; rm x.phfs-file; ls", cwd=mount.path)
        assert found == "x\nx.phfs-file\nbelowbesidex\n"
        mount.sync()
        listed = mount.s3.list_objects_v2(Bucket=mount.bucket, Prefix=mount.prefix)["Contents"]
        assert [entry["Key"] for entry in listed] == [mount.prefix + "x/y"]


def test_attributes_of_a_version_that_is_no_more_are_dropped(place: MountPlace, theirs: Path) -> None:
    put(place, theirs / "f", b"base")
    place.mount.expected.append("attributes of key=.* are dropped")
    (shown(theirs) / "f").chmod(0o600)
    put(place, theirs / "f", b"theirs")
    place.sync()
    within(LATE_SECONDS, (theirs / "f").read_bytes, b"theirs")
    assert metadata(place, theirs / "f") == {}


def test_changes_to_bytes_that_are_no_more_are_saved_aside(place: MountPlace, theirs: Path) -> None:
    put(place, theirs / "f", b"0" * (8 << 20))
    place.mount.expected.append("theirs-.*/f cannot be stored")
    with (shown(theirs) / "f").open("r+b", buffering=0) as file:
        file.seek(5 << 20)
        file.write(b"o" * 4096)
        put(place, theirs / "f", b"theirs")
    place.sync()
    within(LATE_SECONDS, (theirs / "f").read_bytes, b"theirs")
    (saved,) = place.mount.state.glob("*/saved/*.data")
    with saved.open("rb") as file:
        file.seek(5 << 20)
        assert file.read(4096) == b"o" * 4096
    (listed,) = json.loads(place.mount.must("saved", "list", place.path, "--json"))
    assert (listed["path"], listed["ranges"]) == (f"{theirs.name}/f", [[5 << 20, (5 << 20) + 4096]])
    assert f"{listed['id']}" in place.mount.must("saved", "list", place.path)
    assert "1 in saved/" in place.mount.must("status", place.path)


def test_only_the_prefix_is_seen(place: MountPlace) -> None:
    beside = place.mount.prefix.rstrip("/") + "b/secret"
    place.mount.s3.put_object(Bucket=place.mount.bucket, Key=beside, Body=b"x")
    assert "secret" not in run("find", place.path, "-name", "secret*")
    assert attempt(os.stat, place.path / ".." / (place.path.name + "b") / "secret") == "ENOENT"


# --- what the mount wrote


def test_keys_and_metadata_that_are_written(place: MountPlace, mnt: Path) -> None:
    (mnt / "d").mkdir()
    (mnt / "d/f").write_bytes(b"content")
    (mnt / "d/f").chmod(0o640)
    os.utime(mnt / "d/f", ns=(0, 1_234_567_890_123_456_789))
    (mnt / "link").symlink_to("d/f")
    place.sync()
    assert keys(place, mnt / "d") == ["f"]
    found = metadata(place, mnt / "d/f")
    assert (found["mode"], found["mtime"]) == ("0100640", "1234567890.123456789")
    assert (found["uid"], found["gid"]) == (str(os.getuid()), str(os.getgid()))
    link = place.mount.s3.get_object(Bucket=place.mount.bucket, Key=place.key(mnt / "link"))
    assert (link["Body"].read(), link["Metadata"]["mode"]) == (b"d/f", "0120777")


def test_markers_come_and_go(place: MountPlace, mnt: Path) -> None:
    (mnt / "d").mkdir()
    place.sync()
    assert keys(place, mnt) == ["d/"]
    (mnt / "d/f").write_bytes(b"x")
    place.sync()
    assert [key for key in keys(place, mnt) if key != "d/"] == ["d/f"]
    assert "d/" not in keys(place, mnt), "a marker beside children shows as a nameless row in the console"
    (mnt / "d/f").unlink()
    place.sync()
    assert keys(place, mnt) == ["d/"]


def test_a_new_folder_is_in_the_store_without_being_asked_for(place: MountPlace, mnt: Path) -> None:
    (mnt / "d").mkdir()
    within(LATE_SECONDS, lambda: keys(place, mnt), ["d/"])


def test_an_open_file_is_uploaded_by_age(place: MountPlace, mnt: Path) -> None:
    def stored() -> bytes:
        try:
            found: bytes = place.mount.s3.get_object(Bucket=place.mount.bucket, Key=place.key(mnt / "log"))[
                "Body"
            ].read()
        except ClientError:
            return b""
        return found

    with (mnt / "log").open("wb", buffering=0) as log:
        log.write(b"first line\n")
        within(LATE_SECONDS, stored, b"first line\n")
        log.write(b"second line\n")
        within(LATE_SECONDS, stored, b"first line\nsecond line\n")


def test_fsync_returns_when_the_store_has_the_bytes(place: MountPlace, mnt: Path) -> None:
    fd = os.open(mnt / "f", os.O_CREAT | os.O_WRONLY)
    try:
        for number in range(5):
            os.write(fd, b"%d" % number)
            os.fsync(fd)
            body = place.mount.s3.get_object(Bucket=place.mount.bucket, Key=place.key(mnt / "f"))["Body"].read()
            assert body == b"01234"[: number + 1]
    finally:
        os.close(fd)


def test_changes_in_a_big_file(place: MountPlace, mnt: Path, tmp_path: Path) -> None:
    content = bytearray(os.urandom(24 << 20))
    path = mnt / "big"
    path.write_bytes(content)
    place.sync()
    place.remount()
    with path.open("r+b", buffering=0) as file:
        for offset in (0, 9_000_000, len(content) - 5):
            file.seek(offset)
            file.write(b"CHANGED")
            content[offset : offset + 7] = b"CHANGED"
    with path.open("ab") as file:
        file.write(b"appended" * 1000)
    content += b"appended" * 1000
    assert (saved(place, mnt, tmp_path / "one") / "big").read_bytes() == content
    os.truncate(path, 17_000_001)
    place.remount()
    stored = saved(place, mnt, tmp_path / "two") / "big"
    assert stored.read_bytes() == content[:17_000_001]


# --- other programs on both sides


@pytest.fixture
def rclone(place: MountPlace, tmp_path: Path) -> Callable[..., str]:
    env = {
        **place.mount.env,
        "RCLONE_CONFIG": str(tmp_path / "rclone.conf"),
        "RCLONE_CONFIG_S_TYPE": "s3",
        "RCLONE_CONFIG_S_PROVIDER": "Minio",
        "RCLONE_CONFIG_S_ENV_AUTH": "true",
        "RCLONE_CONFIG_S_ENDPOINT": place.mount.endpoint_url,
    }
    (tmp_path / "rclone.conf").touch()
    return lambda *argv: run(RCLONE, *argv, env=env)


def local_sample(root: Path) -> Path:
    (root / "d").mkdir(parents=True)
    for name, mode in (("tool", 0o755), ("d/data", 0o640), ("d/été", 0o600)):
        (root / name).write_bytes(name.encode() * 1000)
        (root / name).chmod(mode)
        os.utime(root / name, ns=(0, 1_234_567_890_123_456_789))
    (root / "link").symlink_to("d/data")
    return root


def test_rclone_writes(place: MountPlace, mnt: Path, tmp_path: Path, rclone: Callable[..., str]) -> None:
    sample = local_sample(tmp_path / "sample")
    rclone("copy", "--metadata", "--links", sample, f"s:{place.mount.bucket}/{place.key(mnt)}")
    shown(mnt / "d")
    found, wanted = tree(mnt), tree(sample)
    assert found.pop("d").mode == wanted.pop("d").mode
    assert found == wanted


def test_rclone_reads(place: MountPlace, mnt: Path, tmp_path: Path, rclone: Callable[..., str]) -> None:
    sample = local_sample(tmp_path / "sample")
    (sample / "link").unlink()
    run("cp", "-a", f"{sample}/.", mnt)
    place.sync()
    rclone("copy", "--metadata", f"s:{place.mount.bucket}/{place.key(mnt)}", tmp_path / "back")
    assert tree(tmp_path / "back") == tree(sample)


# --- changes by others while mounted


def test_foreign_changes_are_seen(place: MountPlace, mnt: Path) -> None:
    put(place, mnt / "f", b"one")
    assert shown(mnt / "f").read_bytes() == b"one"
    put(place, mnt / "f", b"two and longer")
    within(LATE_SECONDS, (mnt / "f").read_bytes, b"two and longer")
    assert (mnt / "f").stat().st_size == 14
    put(place, mnt / "g", b"new")
    within(LATE_SECONDS, lambda: sorted(os.listdir(mnt)), ["f", "g"])
    place.foreign_delete(mnt / "f")
    within(LATE_SECONDS, lambda: (mnt / "f").exists(), False)
    within(LATE_SECONDS, lambda: os.listdir(mnt), ["g"])


def test_a_name_that_was_missed_appears(place: MountPlace, mnt: Path) -> None:
    assert not (mnt / "late").exists()
    put(place, mnt / "late", b"x")
    within(LATE_SECONDS, lambda: (mnt / "late").exists(), True)


def test_an_open_file_keeps_its_version(place: MountPlace, mnt: Path) -> None:
    old = os.urandom(3 << 20)
    put(place, mnt / "f", old)
    with shown(mnt / "f").open("rb", buffering=0) as reader:
        assert reader.read(len(old)) == old
        put(place, mnt / "f", b"new")
        within(LATE_SECONDS, (mnt / "f").read_bytes, b"new")
        assert os.fstat(reader.fileno()).st_size == len(old)
        assert os.pread(reader.fileno(), 1000, 2 << 20) == old[2 << 20 :][:1000]


def test_the_loser_of_a_conflict_is_kept_beside(place: MountPlace, mnt: Path) -> None:
    place.mount.expected.append("conflict: .* was changed by somebody else")
    put(place, mnt / "f", b"base")
    with shown(mnt / "f").open("r+b", buffering=0) as file:
        assert file.read() == b"base"
        put(place, mnt / "f", b"theirs")
        file.seek(0)
        file.write(b"ours")
    within(LATE_SECONDS, lambda: len(keys(place, mnt)), 2)
    place.sync()
    (beside,) = (key for key in keys(place, mnt) if key != "f")
    assert re.fullmatch(r"f\.conflict-.+-.+", beside)
    within(LATE_SECONDS, (mnt / "f").read_bytes, b"theirs")
    within(LATE_SECONDS, lambda: sorted(os.listdir(mnt)), ["f", beside])
    assert (mnt / beside).read_bytes() == b"ours"


def make_conflict(place: MountPlace, path: Path) -> Path:
    """Returns the copy that ours is kept as."""
    place.mount.expected.append("conflict: .* was changed by somebody else")
    put(place, path, b"base")
    with shown(path).open("r+b", buffering=0) as file:
        file.read()
        put(place, path, b"theirs")
        file.write(b"ours")
    place.sync()
    (beside,) = path.parent.glob(f"{path.name}.conflict-*")
    return beside


def listed_below(place: MountPlace, folder: Path) -> list[tuple[str, str]]:
    rows = json.loads(place.mount.must("conflicts", folder, "--json"))
    return [(row["original"], row["copy"]) for row in rows if row["original"].startswith(f"{folder}/")]


def test_conflicts_are_listed_and_settled(place: MountPlace, mnt: Path) -> None:
    copies = [make_conflict(place, mnt / name) for name in ("ours", "theirs", "both", "by hand")]
    count = place.mount.status()["conflicts"]
    assert listed_below(place, mnt) == [
        (str(copy.with_name(name)), str(copy))
        for name, copy in zip(("ours", "theirs", "both", "by hand"), copies, strict=True)
    ]
    place.mount.must("conflicts", "resolve", "--keep", "ours", mnt / "ours")
    place.mount.must("conflicts", "resolve", "--keep", "theirs", copies[1])
    place.mount.must("conflicts", "resolve", "--keep", "both", mnt / "both")
    copies[3].unlink()
    assert listed_below(place, mnt) == []
    assert place.mount.status()["conflicts"] == count - 4
    place.sync()
    assert keys(place, mnt) == sorted(["ours", "theirs", "both", "by hand", copies[2].name])
    assert [(mnt / name).read_bytes() for name in ("ours", "theirs", "both")] == [b"baseours", b"theirs", b"theirs"]
    found = place.mount.phfs("conflicts", "resolve", "--keep", "ours", mnt / "ours")
    assert (found.returncode, "has no conflict" in found.stderr) == (2, True)


# --- other mounts


def test_each_open_asks_the_store_without_a_lifetime() -> None:
    with a_mount("--attr-ttl", "0") as place:
        for number in range(5):
            put(place, place.path / "f", b"version %d" % number)
            assert (place.path / "f").read_bytes() == b"version %d" % number


def test_extended_attributes_as_an_option(tmp_path: Path) -> None:
    with a_mount("--xattrs") as place:
        path = place.path / "f"
        path.write_text("x")
        os.setxattr(path, "user.Colour", b"blue\0\xff")
        os.setxattr(path, "user.other", b"")
        for _ in range(2):
            assert sorted(os.listxattr(path)) == ["user.Colour", "user.other"]
            assert os.getxattr(path, "user.Colour") == b"blue\0\xff"
            place.remount()
        assert attempt(os.getxattr, path, "user.none") == "ENODATA"
        assert attempt(os.setxattr, path, "user.other", b"", os.XATTR_CREATE) == "EEXIST"
        os.removexattr(path, "user.Colour")
        assert os.listxattr(path) == ["user.other"]
        assert attempt(os.setxattr, path, "security.other", b"x") in ("ENOTSUP", "EPERM")


def test_a_prefix_that_does_not_exist_is_an_empty_tree(place: MountPlace) -> None:
    with a_mount() as other:
        assert os.listdir(other.path) == []
        (other.path / "f").write_text("x")
        assert (other.path / "f").read_text() == "x"


class ManyObjects:
    """Listings below `prefix` tell of `count` objects, as those of MinIO would; all else is for the store."""

    def __init__(self, prefix: str, count: int) -> None:
        self._prefix = prefix
        self.names = [f"f{number:06d}" for number in range(count)]

    def __call__(self, request: Request) -> Answer | Forward:
        query = dict(parse_qsl(urlsplit(request.path).query))
        if query.get("list-type") != "2" or query.get("prefix") != self._prefix:
            return Forward()
        after = query.get("continuation-token", query.get("start-after", "").removeprefix(self._prefix))
        start = bisect_right(self.names, after)
        page = self.names[start : start + int(query["max-keys"])]
        more = (
            f"<NextContinuationToken>{page[-1]}</NextContinuationToken>"
            if page and page[-1] != self.names[-1]
            else ""
        )
        truncated = f"<IsTruncated>{'true' if more else 'false'}</IsTruncated>{more}"
        rows = "".join(map(self._row, page))
        return Answer(200, body=f"<ListBucketResult>{truncated}{rows}</ListBucketResult>".encode())

    def _row(self, name: str) -> str:
        etag = hashlib.md5(name.encode(), usedforsecurity=False).hexdigest()
        return (
            f"<Contents><Key>{self._prefix}{name}</Key><LastModified>2026-01-01T00:00:00Z</LastModified>"
            f"<ETag>{etag}</ETag><Size>{len(name)}</Size><UserMetadata></UserMetadata></Contents>"
        )


def test_a_directory_of_100_000_objects_lists_completely() -> None:
    """They are in the listings only: to store and to remove so many takes minutes."""
    server = shared_server()
    with (
        proxy(server.endpoint_url) as front,
        a_mount(server=dataclasses.replace(server, endpoint_url=front.endpoint_url)) as place,
    ):
        many = ManyObjects(f"{place.mount.prefix}many/", 100_000)
        put(place, place.path / "many/f077777", b"f077777")
        while "changes of others are heard of" not in place.mount.log():  # till then what is listed is soon too old
            time.sleep(0.1)
        front.script = many
        names = run("ls", "-f", shown(place.path / "many")).split()
        assert sorted(set(names) - {".", ".."}) == many.names
        assert len(names) == len(set(names))
        assert (place.path / "many/f077777").read_bytes() == b"f077777"
        assert (place.path / "many/f099999").stat().st_size == 7

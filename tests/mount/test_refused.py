"""Mounts whose credentials may do less than their programs ask for: every wait ends, and says why (P11).

MinIO with the policies of sessions that its root user hands out.
"""

from __future__ import annotations

import errno
import json
import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import boto3
import pytest

from phfs_fuse.host.processes import ended
from tests.mount.place import MountPlace, a_mount, attempt, script, within
from tests.support.mounts import shared_server
from tests.support.servers import minio_binary

pytestmark = [pytest.mark.fuse, pytest.mark.minio]
READ = ("s3:GetObject", "s3:ListBucket")
EXPECTED = [r"refused by the store", r"upload of key=|delete of key=", r"for good|are not in the store yet"]
OPTIONS = ("-o", "refused-retry=2s,attr-ttl=1s")

FSYNC = """
import os, sys
fd = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)
os.write(fd, b"bytes")
try:
    os.fsync(fd)
except OSError as exc:
    print(exc.errno)
"""


def allow(path: Path, *actions: str, but: tuple[str, str] = ("", "")) -> None:
    """Write credentials that may do `actions`, except that of `but` to the keys that match the pattern."""
    server = shared_server()
    statements = [{"Effect": "Allow", "Action": list(actions), "Resource": "arn:aws:s3:::*"}]
    if but[0]:
        statements.append({"Effect": "Deny", "Action": [but[0]], "Resource": f"arn:aws:s3:::*/{but[1]}"})
    sts = boto3.client(
        "sts",
        endpoint_url=server.endpoint_url,
        aws_access_key_id=server.access_key,
        aws_secret_access_key=server.secret_key,
        region_name="us-east-1",
    )
    answer = sts.assume_role(
        RoleArn="arn:xxx:xxx:xxx:xxxx",
        RoleSessionName="test",
        DurationSeconds=3600,
        Policy=json.dumps({"Version": "2012-10-17", "Statement": statements}),
    )
    sts.close()
    found = answer["Credentials"]
    fields = {
        "aws_access_key_id": found["AccessKeyId"],
        "aws_secret_access_key": found["SecretAccessKey"],
        "aws_session_token": found["SessionToken"],
    }
    path.write_text("[default]\n" + "".join(f"{name} = {value}\n" for name, value in fields.items()))
    path.chmod(0o600)


@contextmanager
def limited(tmp_path: Path, *actions: str, but: tuple[str, str] = ("", "")) -> Iterator[MountPlace]:
    """A mount of a prefix that has `old` and `d/x`, whose credentials may read, and do `actions`."""
    if minio_binary() is None:
        pytest.skip("no MinIO server: set PHFS_TEST_MINIO or run .ci/run, which installs one")
    allow(tmp_path / "credentials", *READ, *actions, but=but)
    with a_mount("--credentials-file", str(tmp_path / "credentials"), *OPTIONS) as place:
        place.mount.expected += EXPECTED
        for name in ("old", "d/x"):
            place.mount.s3.put_object(Bucket=place.mount.bucket, Key=place.mount.prefix + name, Body=b"stored")
        within(30, lambda: sorted(os.listdir(place.path)), ["d", "old"])
        yield place


def stored(place: MountPlace) -> list[str]:
    mount = place.mount
    page = mount.s3.list_objects_v2(Bucket=mount.bucket, Prefix=mount.prefix)
    keys = [found["Key"].removeprefix(mount.prefix) for found in page.get("Contents", ())]
    return [key for key in keys if key and not key.startswith(".phfs-probe-")]


def refused(place: MountPlace) -> list[tuple[str, str]]:
    return sorted((one["operation"], one["path"]) for one in place.mount.status()["refused"])


def require_end(place: MountPlace, count: int) -> str:
    """The mount ends with exit code 6, and one line for each change; returns what is said."""
    keeper = place.mount.record().keeper_pid
    done = place.mount.phfs("umount", place.path, seconds=60)
    assert done.returncode == 6, done.stderr
    lines = done.stderr.splitlines()
    assert f"the store refused {count} change" in lines[0]
    assert len(lines) == 1 + count
    assert not os.path.ismount(place.path)
    assert ended(keeper, 10)
    return str(done.stderr)


def test_a_user_who_may_not_delete(tmp_path: Path) -> None:
    with limited(tmp_path, "s3:PutObject") as place:
        assert attempt(os.unlink, place.path / "old") == ""
        assert attempt(os.rename, place.path / "d", place.path / "e") == ""
        done = place.mount.phfs("sync", place.path, seconds=60)
        assert done.returncode == 6
        assert "AccessDenied" in done.stderr
        within(30, lambda: sorted(os.listdir(place.path)), ["d", "e", "old"])
        assert script("print(open(__import__('sys').argv[1]).read())", place.path / "old").strip() == "stored"
        assert refused(place) == [("delete", "d/x"), ("delete", "old")]
        status = place.mount.must("status", place.path)
        assert "store ok" not in status
        assert "old: delete refused: " in status
        assert place.mount.status()["counters"]["refused"] == {"delete": 2}
        place.mount.sync()  # it was told
        require_end(place, 2)
        assert sorted(stored(place)) == ["d/x", "e/x", "old"]


def test_a_user_who_may_only_read(tmp_path: Path) -> None:
    with limited(tmp_path) as place:
        assert script(FSYNC, place.path / "new").strip() == str(errno.EACCES)
        assert attempt(os.rename, place.path / "d", place.path / "e") == ""
        assert attempt(os.unlink, place.path / "old") == ""
        known = [("delete", "old"), ("rename", "d/x"), ("upload", "new")]
        within(30, lambda: refused(place), known)
        within(30, lambda: sorted(os.listdir(place.path)), ["d", "new", "old"])
        place.mount.kill_worker()
        within(30, lambda: refused(place), known)
        said = require_end(place, 3)
        assert re.search(r"^new: upload refused: ", said, re.MULTILINE)
        assert sorted(stored(place)) == ["d/x", "old"]
        (kept,) = json.loads(place.mount.must("saved", "list", place.mount.state, "--json"))
        assert (kept["path"], kept["waiting"], kept["whole"]) == ("new", True, True)
        assert "AccessDenied" in kept["reason"]
        assert Path(kept["file"]).read_bytes() == b"bytes"
        assert kept["id"] in place.mount.must("saved", "list", place.mount.state)
        place.mount.must("saved", "export", kept["id"], tmp_path / "copy", "--of", place.mount.state)
        assert (tmp_path / "copy").read_bytes() == b"bytes"
        place.mount.flags = ("--allow-other",) if os.geteuid() == 0 else ()
        place.mount.mount()  # with all rights
        within(30, lambda: sorted(stored(place)), ["d/x", "new", "old"])
        assert refused(place) == []
        assert json.loads(place.mount.must("saved", "list", place.path, "--json")) == []


def test_one_name_that_may_not_be_written(tmp_path: Path) -> None:
    rights = ("s3:PutObject", "s3:DeleteObject")
    with limited(tmp_path, *rights, but=("s3:PutObject", "denied*")) as place:
        (place.path / "denied").write_bytes(b"bytes")
        (place.path / "other").write_bytes(b"bytes")
        done = place.mount.phfs("sync", place.path, seconds=60)
        assert done.returncode == 6
        assert sorted(stored(place)) == ["d/x", "old", "other"]
        assert (place.path / "denied").read_bytes() == b"bytes"
        os.rename(place.path / "denied", place.path / "allowed")
        place.mount.sync()
        assert sorted(stored(place)) == ["allowed", "d/x", "old", "other"]
        place.mount.unmount()


def test_sigterm_ends_a_mount_with_what_is_refused(tmp_path: Path) -> None:
    with limited(tmp_path) as place:
        (place.path / "new").write_bytes(b"bytes")
        keeper = place.mount.record().keeper_pid
        os.kill(keeper, signal.SIGTERM)
        assert ended(keeper, 60)
        assert not os.path.ismount(place.path)
        assert re.search(r"new: upload refused: .*AccessDenied", place.mount.log())
        assert "exit_code=6" in place.mount.log()


def test_new_credentials_have_it_tried_again(tmp_path: Path) -> None:
    with limited(tmp_path) as place:
        place.mount.expected += [r"new clients of the store"]
        place.mount.remount("-o", "refused-retry=1h")
        (place.path / "new").write_bytes(b"bytes")
        assert place.mount.phfs("sync", place.path, seconds=60).returncode == 6
        allow(tmp_path / "credentials", *READ, "s3:PutObject")

        def asked() -> list[str]:
            os.listdir(place.path)  # a request now and then
            return sorted(stored(place))

        within(60, asked, ["d/x", "new", "old"])
        place.mount.sync()
        assert refused(place) == []

"""The wall clock of the machine jumps under a mount: an hour back, two days on, and back again (P2, P3, P5).

libfaketime gives the processes of the mount a wall clock of their own; the monotonic one and the store's go on.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.mount.place import MountPlace, a_mount, script

LIBRARY = next(iter(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")), None)
pytestmark = [
    pytest.mark.fuse,
    pytest.mark.minio,  # moto takes every time
    pytest.mark.skipif(LIBRARY is None, reason="no libfaketime: ./dev setup installs it"),
]
TOO_FAR = {"an hour back": "-3600", "two days on": "+172800"}  # more than the 15 min that stores allow
NEAR = {"ten minutes back": "-600", "ten minutes on": "+600"}


@dataclass
class Jumping:
    place: MountPlace
    clock: Path

    @property
    def path(self) -> Path:
        return self.place.path

    @contextmanager
    def off_by(self, seconds: str) -> Iterator[None]:
        self._set(seconds)
        try:
            yield
        finally:
            self._set("+0")

    def _set(self, seconds: str) -> None:
        draft = self.clock.with_suffix(".new")  # so that nobody reads half of it
        draft.write_text(seconds)
        draft.rename(self.clock)


@pytest.fixture(scope="module")
def jumping(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jumping]:
    clock = tmp_path_factory.mktemp("clock") / "offset"
    clock.write_text("+0")
    settings = {
        "LD_PRELOAD": str(LIBRARY),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    command = ("env", *(f"{name}={value}" for name, value in settings.items()))
    flags = ("--attr-ttl", "1s", "--events", "off", "-o", "retry-max=1s,fsync-timeout=6s")
    with a_mount(*flags, within=command) as place:
        place.mount.expected += [r"the clock of this machine is off|HTTP 403"]
        yield Jumping(place, clock)


PROGRAM = """
import errno, json, os, sys
os.chdir(sys.argv[1])
said = {}
def attempt(name, call):
    try:
        said[name] = call()
    except OSError as exc:
        said[name] = errno.errorcode[exc.errno]
def fsync():
    with open("known", "r+") as file:
        file.write("K")
        file.flush()
        os.fsync(file.fileno())
os.listdir(".")
files = [open(name, "a") for name in ("new", "more")]
print("ready", flush=True)
sys.stdin.readline()
attempt("read", lambda: open("known").read())
attempt("write", lambda: [file.write("later") and file.close() for file in files])
attempt("rename", lambda: os.rename("moved", "known-moved"))
attempt("unlink", lambda: os.unlink("removed"))
attempt("fsync", fsync)
print(json.dumps(said))
"""

READ_ALL = 'import glob, sys; [open(path).read() for path in glob.glob(sys.argv[1] + "/*")]'


def put(jumping: Jumping, name: str, body: bytes) -> None:
    mount = jumping.place.mount
    mount.s3.put_object(Bucket=mount.bucket, Key=mount.prefix + name, Body=body)


def stored(jumping: Jumping, folder: str) -> dict[str, bytes]:
    mount, at = jumping.place.mount, f"{jumping.place.mount.prefix}{folder}/"
    keys = [row["Key"] for row in mount.s3.list_objects_v2(Bucket=mount.bucket, Prefix=at).get("Contents", ())]
    return {key.removeprefix(at): mount.s3.get_object(Bucket=mount.bucket, Key=key)["Body"].read() for key in keys}


@pytest.mark.parametrize("how", TOO_FAR)
def test_the_store_refuses_the_clock_and_nothing_is_lost(jumping: Jumping, how: str) -> None:
    mount, folder = jumping.place.mount, how.replace(" ", "-")
    for name in ("known", "moved", "removed"):
        put(jumping, f"{folder}/{name}", name.encode())
    script(READ_ALL, jumping.path / folder)
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, jumping.path / folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == "ready\n"
        with jumping.off_by(TOO_FAR[how]):
            said = json.loads(program.communicate("go on\n", timeout=120)[0])
            late = mount.phfs("sync", mount.path, "--timeout", "2s")
    assert said == {"read": "known", "write": [None, None], "rename": None, "unlink": None, "fsync": "EACCES"}
    assert late.returncode == 6
    assert "the clock of this machine is off (RequestTimeTooSkewed)" in mount.log()
    jumping.place.sync()
    assert stored(jumping, folder) == {"known": b"Known", "new": b"later", "more": b"later", "known-moved": b"moved"}


def test_a_mount_with_a_wrong_clock_says_so(jumping: Jumping, tmp_path: Path) -> None:
    mount = jumping.place.mount
    (tmp_path / "mnt").mkdir()
    places = ("--endpoint-url", mount.endpoint_url, "--state-dir", tmp_path / "s", "--cache-dir", tmp_path / "c")
    with jumping.off_by("-3600"):
        done = mount.phfs("mount", f"s3://{mount.bucket}/other/", tmp_path / "mnt", *places)
    assert (done.returncode, done.stderr.count("\n")) == (3, 1)
    assert "the clock of this machine is too far from the store's" in done.stderr


SHOWS = """
import os, sys, time
def shown():
    return os.path.exists(sys.argv[1]) and open(sys.argv[1]).read()
end = time.monotonic() + 60
while shown() != sys.argv[2]:
    assert time.monotonic() < end
    time.sleep(0.1)
"""


@pytest.mark.parametrize("how", NEAR)
def test_what_is_believed_grows_old_by_the_monotonic_clock(jumping: Jumping, how: str) -> None:
    """So do the quiet time before an upload and the waits between tries."""
    mount, name = jumping.place.mount, how.replace(" ", "-")
    put(jumping, name, b"before")
    script(SHOWS, jumping.path / name, "before")
    with jumping.off_by(NEAR[how]):
        put(jumping, name, b"after")
        script(SHOWS, jumping.path / name, "after")
        script('import sys; open(sys.argv[1], "w").write("ours")', jumping.path / name)
        jumping.place.sync()
    assert mount.s3.get_object(Bucket=mount.bucket, Key=mount.prefix + name)["Body"].read() == b"ours"

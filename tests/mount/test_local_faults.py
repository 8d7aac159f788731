"""The disks of this machine fail under a mount: nothing that was answered is lost, and reads go on."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from phfs_fuse.types import MIB
from tests.mount.place import MountPlace, a_mount, script

pytestmark = [pytest.mark.fuse, pytest.mark.minio]
DATA = random.Random(5).randbytes(5 * MIB + 3)
DIGEST = "import hashlib, sys; print(hashlib.sha256(open(sys.argv[1], 'rb').read()).hexdigest())"
DISKS = {"state": 48 * MIB, "cache": 24 * MIB}


@pytest.fixture
def place() -> Iterator[MountPlace]:
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount file systems that are small")
    with a_mount("--attr-ttl", "1s", "--cache-size", "16MiB", disks=DISKS) as found:
        found.mount.expected += [
            "cache disk failed",
            "disk is full",
            "No space left",
            "the worker ended with SIGKILL",
        ]
        yield found


def digest(place: MountPlace, name: str) -> str:
    return script(DIGEST, place.path / name).strip()


def put(place: MountPlace, name: str, data: bytes) -> str:
    """Store an object as another client does; returns its hash."""
    place.mount.s3.put_object(Bucket=place.mount.bucket, Key=place.mount.prefix + name, Body=data)
    return hashlib.sha256(data).hexdigest()


def stored(place: MountPlace, name: str) -> bytes:
    answer = place.mount.s3.get_object(Bucket=place.mount.bucket, Key=place.mount.prefix + name)
    return bytes(answer["Body"].read())


def test_a_full_cache_disk_is_read_past(place: MountPlace) -> None:
    right = put(place, "one", DATA)
    other = put(place, "two", DATA[::-1])
    assert digest(place, "one") == right
    place.mount.fill("cache")
    assert [digest(place, name) for name in ("two", "one", "two")] == [other, right, other]
    script("import sys; open(sys.argv[1], 'wb').write(b'new')", place.path / "new")
    place.sync()
    assert stored(place, "new") == b"new"
    place.mount.free("cache")
    assert digest(place, "two") == other


FILL = """
import errno, json, os, sys
os.chdir(sys.argv[1])
said = {}
for number in range(200):
    try:
        with open(f"f{number}", "wb", buffering=0) as file:
            file.write(str(number).encode() * 200_000)
        said[f"f{number}"] = "closed"
    except OSError as exc:
        said[f"f{number}"] = errno.errorcode[exc.errno]
        if "closed" in said.values():
            break
for name, call in {
    "mkdir": lambda: os.mkdir("folder"),
    "rename": lambda: os.rename("small", "other"),
    "read": lambda: len(open("small", "rb").read()),
}.items():
    try:
        said[name] = call()
    except OSError as exc:
        said[name] = errno.errorcode[exc.errno]
print(json.dumps(said))
"""


@pytest.mark.parametrize("killed", [False, True], ids=["goes on", "killed"])
def test_a_full_state_disk_refuses_and_loses_nothing(place: MountPlace, killed: bool) -> None:
    """Also when the worker dies meanwhile: the next one finds room for what it has to note."""
    script("import sys; open(sys.argv[1], 'wb').write(b'small')", place.path / "small")
    place.sync()
    script("import sys; open(sys.argv[1], 'wb').write(b'before')", place.path / "before")
    place.mount.fill("state")
    said = json.loads(script(FILL, place.path))
    if killed:
        place.mount.kill_worker()
        assert script("import sys; print(open(sys.argv[1]).read())", place.path / "before").strip() == "before"
    closed = [name for name, answer in said.items() if answer == "closed"]
    refused = {answer for name, answer in said.items() if name not in (*closed, "read")}
    assert said["read"] == 5
    assert refused <= {"ENOSPC", None}
    assert "ENOSPC" in refused
    script("import os, sys; os.unlink(sys.argv[1])", place.path / "small")  # what gives space back goes on
    place.mount.free("state")
    script("import sys; open(sys.argv[1], 'wb').write(b'after')", place.path / "after")
    place.sync()
    assert (stored(place, "before"), stored(place, "after")) == (b"before", b"after")
    assert [stored(place, name) for name in closed] == [name[1:].encode() * 200_000 for name in closed]
    place.remount()
    listed = json.loads(script("import json, os, sys; print(json.dumps(os.listdir(sys.argv[1])))", place.path))
    assert "small" not in listed
    assert {"before", "after", *closed} <= set(listed)


def _overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"\xff" * min(path.stat().st_size, 300_000))


def _shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("damage", [_overwrite, _shorten, Path.unlink])
def test_cache_files_that_are_damaged_are_fetched_again(place: MountPlace, damage: Callable[[Path], None]) -> None:
    """Those that no running process has checked yet; what was checked is believed."""
    right = put(place, "file", DATA)
    assert digest(place, "file") == right
    place.mount.unmount()
    for path in place.mount.cache.glob("*/??/*"):
        damage(path)
    place.mount.mount()
    assert digest(place, "file") == right


@pytest.mark.parametrize("damage", [_shorten, Path.unlink])
def test_cache_files_may_go_while_they_are_open(place: MountPlace, damage: Callable[[Path], None]) -> None:
    right = put(place, "file", DATA)
    assert digest(place, "file") == right
    for path in place.mount.cache.glob("*/??/*"):
        damage(path)
    if os.geteuid() == 0:
        Path("/proc/sys/vm/drop_caches").write_text("1")  # else the kernel answers from its own pages
    assert digest(place, "file") == right


def test_few_descriptors() -> None:
    """More files are open than the processes of the mount may have."""
    with a_mount(within=("prlimit", "--nofile=256")) as place:
        code = """if True:
            import os, sys
            os.chdir(sys.argv[1])
            files = [open(str(number), "wb") for number in range(600)]
            for number, file in enumerate(files):
                file.write(b"%d" % number)
            for file in files:
                file.close()
            assert [open(str(number), "rb").read() for number in range(600)] == [b"%d" % n for n in range(600)]
        """
        script(code, place.path)
        place.sync()
        assert {stored(place, str(number)) for number in range(600)} == {b"%d" % number for number in range(600)}

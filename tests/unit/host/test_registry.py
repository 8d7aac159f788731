"""Records of running mounts: found again by others, private, never half of one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from phfs_fuse.config import dirs
from phfs_fuse.host import registry
from phfs_fuse.host.registry import MountRecord


@pytest.fixture(autouse=True)
def _own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHFS_RUNTIME_DIR", str(tmp_path / "run"))


def record(mountpoint: str, pid: int | None = None) -> MountRecord:
    return MountRecord(mountpoint=mountpoint, control_socket="/s", keeper_pid=pid or os.getpid(), url="s3://b/")


def test_a_record_is_found_until_it_is_removed() -> None:
    assert list(registry.records()) == []
    registry.write(record("/b"))
    registry.write(record("/a"))
    assert registry.find("/b") == record("/b")
    assert list(registry.records()) == [record("/a"), record("/b")]
    registry.remove("/b", os.getpid())
    assert registry.find("/b") is None
    assert list(registry.records()) == [record("/a")]


def test_a_record_is_private() -> None:
    registry.write(record("/a"))
    path = registry.path_of("/a")
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert os.listdir(path.parent) == [path.name]


def test_a_keeper_removes_its_own_record_only() -> None:
    registry.write(record("/a", pid=1))
    registry.remove("/a", os.getpid())
    assert registry.find("/a") == record("/a", pid=1)


def test_a_later_mount_replaces_the_trace_of_a_crash() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    registry.write(record("/a", pid=child.pid))
    assert not record("/a", pid=child.pid).alive
    registry.write(record("/a"))
    assert registry.find("/a") == record("/a")
    assert record("/a").alive


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"mountpoint": "/a"}'])
def test_what_is_no_record_is_passed_over(text: str) -> None:
    registry.write(record("/b"))
    registry.path_of("/a").write_text(text)
    assert registry.find("/a") is None
    assert list(registry.records()) == [record("/b")]


@pytest.mark.parametrize(
    ("uid", "environ", "cache", "state", "runtime"),
    [
        (0, {}, "/var/cache/phfs", "/var/lib/phfs", "/run/phfs"),
        (0, {"XDG_CACHE_HOME": "/c", "XDG_STATE_HOME": "/s"}, "/c/phfs", "/s/phfs", "/run/phfs"),
        (5, {"HOME": "/h"}, "/h/.cache/phfs", "/h/.local/state/phfs", "/h/.local/state/phfs/run"),
        (5, {"HOME": "/h", "XDG_RUNTIME_DIR": "/r"}, "/h/.cache/phfs", "/h/.local/state/phfs", "/r/phfs"),
        (5, {"HOME": "/h", "XDG_CACHE_HOME": "relative"}, "/h/.cache/phfs", "/h/.local/state/phfs", None),
        (5, {"HOME": "/h", "PHFS_RUNTIME_DIR": "/x"}, "/h/.cache/phfs", "/h/.local/state/phfs", "/x"),
    ],
)
def test_where_things_lie(
    monkeypatch: pytest.MonkeyPatch,
    uid: int,
    environ: dict[str, str],
    cache: str,
    state: str,
    runtime: str | None,
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    assert dirs.cache_home(environ) == Path(cache)
    assert dirs.state_home(environ) == Path(state)
    assert runtime is None or dirs.runtime_dir(environ) == Path(runtime)

"""The mounts that are compared: how each is started in the foreground, and with which settings. Owns no state.

Secrets reach them by the environment only.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final

from phfs_fuse import __version__
from phfs_fuse.errors import UsageError

VERSION_SECONDS: Final = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What to mount, and where it may keep things. `prefix` ends in `/`."""

    endpoint_url: str | None
    bucket: str
    prefix: str
    mountpoint: Path
    work: Path  # empty, and this mount's own
    credentials: Mapping[str, str]  # AWS_*
    server: str  # what the store calls itself

    @property
    def region(self) -> str:
        return self.credentials.get("AWS_DEFAULT_REGION", "us-east-1")


class System:
    """A program that mounts a prefix and stays in the foreground until it is unmounted."""

    name: ClassVar[str]
    binary: ClassVar[str]
    needs_marker: ClassVar[bool] = False  # mounts a prefix only if there is an object of its name
    version_flags: ClassVar[Sequence[str]] = ("--version",)
    remedy: ClassVar[str] = "not on the path"

    def program(self) -> str | None:
        """Beside this Python, where pip puts programs, else on the path."""
        beside = Path(sys.executable).with_name(self.binary)
        return str(beside) if beside.is_file() else shutil.which(self.binary)

    def version(self) -> str:
        line = [self.program() or self.binary, *self.version_flags]
        try:
            done = subprocess.run(line, capture_output=True, text=True, timeout=VERSION_SECONDS)
        except (OSError, subprocess.TimeoutExpired):
            return "unknown"
        return ((done.stdout or done.stderr).strip().splitlines() or ["unknown"])[0]

    def command(self, target: Target) -> list[str]:
        raise NotImplementedError

    def environ(self, target: Target) -> Mapping[str, str]:
        return target.credentials


class Phfs(System):
    name = "phfs"

    def program(self) -> str | None:
        return sys.executable

    def version(self) -> str:
        return f"phfs {__version__}"

    def command(self, target: Target) -> list[str]:
        endpoint = ["--endpoint-url", target.endpoint_url] if target.endpoint_url else []
        return [
            *(sys.executable, "-m", "phfs_fuse", "mount", "--foreground", "--log-level", "warning"),
            *endpoint,
            *("--cache-dir", str(target.work / "cache"), "--state-dir", str(target.work / "state")),
            f"s3://{target.bucket}/{target.prefix}",
            str(target.mountpoint),
        ]

    def environ(self, target: Target) -> Mapping[str, str]:
        return {**target.credentials, "PHFS_RUNTIME_DIR": str(target.work / "run")}


class Rclone(System):
    """With the settings of csi-rclone."""

    name = "rclone"
    binary = "rclone"
    version_flags = ("version",)
    remedy = "not installed: pip install 'phfs-fuse[bench]'"
    flags: ClassVar[Sequence[str]] = ("--vfs-cache-mode", "writes", "--dir-cache-time", "5s")

    def command(self, target: Target) -> list[str]:
        places = ("--config", "/dev/null", "--cache-dir", str(target.work / "cache"))
        remote = f"bench:{target.bucket}/{target.prefix}"
        return [self.program() or self.binary, "mount", *self.flags, *places, remote, str(target.mountpoint)]

    def environ(self, target: Target) -> Mapping[str, str]:
        remote = {
            "TYPE": "s3",
            "PROVIDER": _rclone_provider(target),
            "ENV_AUTH": "true",
            "REGION": target.region,
            "ENDPOINT": target.endpoint_url or "",
        }
        return {**target.credentials, **{f"RCLONE_CONFIG_BENCH_{name}": value for name, value in remote.items()}}


def _rclone_provider(target: Target) -> str:
    if target.endpoint_url is None:
        return "AWS"
    return "Minio" if target.server.lower().startswith("minio") else "Other"


class RcloneFull(Rclone):
    """The best that it offers without giving up what phfs gives as well; docs/benchmarks.md says why each."""

    name = "rclone-full"
    flags = (
        *("--vfs-cache-mode", "full", "--vfs-cache-max-size", "10G", "--vfs-write-back", "500ms"),
        *("--dir-cache-time", "1h", "--attr-timeout", "5s", "--vfs-fast-fingerprint"),
        *("--transfers", "16", "--checkers", "16", "--max-read-ahead", "1M"),
        *("--s3-upload-concurrency", "8", "--s3-chunk-size", "8M", "--s3-disable-checksum"),
    )


class S3fs(System):
    name = "s3fs"
    binary = "s3fs"
    needs_marker = True

    def command(self, target: Target) -> list[str]:
        options = [f"use_cache={target.work / 'cache'}", f"tmpdir={target.work}", f"endpoint={target.region}"]
        if target.endpoint_url:
            options += [f"url={target.endpoint_url}", "use_path_request_style"]
        options += ["parallel_count=16", "multireq_max=32", "max_stat_cache_size=100000"]
        place = f"{target.bucket}:/{target.prefix.rstrip('/')}"
        return [self.program() or self.binary, place, str(target.mountpoint), "-f", "-o", ",".join(options)]


class Goofys(System):
    name = "goofys"
    binary = "goofys"

    def command(self, target: Target) -> list[str]:
        endpoint = ["--endpoint", target.endpoint_url] if target.endpoint_url else []
        place = f"{target.bucket}:{target.prefix.rstrip('/')}"
        region = ("--region", target.region)
        return [self.program() or self.binary, "-f", *endpoint, *region, place, str(target.mountpoint)]


class Geesefs(Goofys):
    name = "geesefs"
    binary = "geesefs"


class MountpointS3(System):
    name = "mountpoint-s3"
    binary = "mount-s3"

    def command(self, target: Target) -> list[str]:
        endpoint = ["--endpoint-url", target.endpoint_url, "--force-path-style"] if target.endpoint_url else []
        cache = target.work / "cache"
        cache.mkdir(exist_ok=True)
        return [
            *(self.program() or self.binary, "--foreground", *endpoint, "--region", target.region),
            *("--prefix", target.prefix, "--cache", str(cache), "--allow-delete", "--allow-overwrite"),
            *(target.bucket, str(target.mountpoint)),
        ]


FIRST: Final = Phfs.name
REFERENCE: Final = "reference"  # no mount: boto3 itself, where that says how fast the store is
SYSTEMS: Final[Mapping[str, System]] = {
    system.name: system for system in (Phfs(), Rclone(), RcloneFull(), S3fs(), Goofys(), Geesefs(), MountpointS3())
}


def choose(names: Sequence[str]) -> list[System]:
    """phfs and then `names`. Raises: UsageError for a name that is none."""
    for name in names:
        if name not in SYSTEMS:
            raise UsageError(f"--against: {name!r} is no system; known: {', '.join(SYSTEMS)}")
    return [SYSTEMS[name] for name in dict.fromkeys([FIRST, *names])]

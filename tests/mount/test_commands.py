"""The commands on a real mount: mount, status, sync, umount, fstab, and the exit codes that need a store."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from phfs_fuse.host.mount_table import mount_table
from phfs_fuse.host.processes import ended
from tests.support.servers import Server, credentials_env, minio, minio_binary, moto, unreachable

pytestmark = [pytest.mark.fuse, pytest.mark.skipif(not os.path.exists("/dev/fuse"), reason="no /dev/fuse")]
ROOT = Path(__file__).parents[2]
SECONDS = 120


@dataclass(frozen=True)
class Commands:
    base: Path
    url: str

    @property
    def mnt(self) -> Path:
        return self.base / "mnt"

    @property
    def environ(self) -> dict[str, str]:
        kept = {name: os.environ[name] for name in os.environ if not name.startswith(("PHFS_", "AWS_", "XDG_"))}
        own = {
            "PYTHONPATH": str(ROOT),
            "PHFS_RUNTIME_DIR": str(self.base / "run"),
            "PHFS_CACHE_DIR": str(self.base / "c"),
            "PHFS_STATE_DIR": str(self.base / "s"),
            "PHFS_ENDPOINT_URL": self.url,
        }
        return kept | own | dict(credentials_env())

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, env=self.environ, capture_output=True, text=True, timeout=SECONDS, check=False)

    def phfs(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.run(sys.executable, "-m", "phfs_fuse", *arguments)

    def mount(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.phfs("mount", *arguments, str(self.mnt))

    def sh(self, script: str) -> str:
        """Run in the mount, by a process of its own."""
        found = self.run("sh", "-ec", f"cd {self.mnt}; {script}")
        assert found.returncode == 0, found.stderr
        return found.stdout

    @property
    def is_mounted(self) -> bool:
        return str(self.mnt) in mount_table()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with moto() as found:
        yield found


@pytest.fixture
def commands(server: Server, tmp_path: Path) -> Iterator[Commands]:
    found = Commands(tmp_path, server.endpoint_url)
    found.mnt.mkdir()
    yield found
    if found.is_mounted:
        found.phfs("umount", "--lazy", "--timeout=20", str(found.mnt))
        found.run("umount", "-l", str(found.mnt))


def ok(found: subprocess.CompletedProcess[str]) -> str:
    assert (found.returncode, found.stderr) == (0, "")
    return found.stdout


def test_the_life_of_a_mount(commands: Commands) -> None:
    assert ok(commands.mount("s3://lives/a", "--create-bucket")) == ""
    assert commands.is_mounted
    commands.sh("echo hello > file; mkdir d")
    assert ok(commands.phfs("sync", str(commands.mnt / "file"))) == ""
    assert ok(commands.phfs("sync", str(commands.mnt))) == ""  # the marker of d as well
    status = json.loads(ok(commands.phfs("status", "--json", str(commands.mnt / "d"))))
    assert (status["mountpoint"], status["url"]) == (str(commands.mnt), "s3://lives/a/")
    assert (status["pending"]["files"], status["errors"]) == (0, [])
    assert str(commands.mnt) in ok(commands.phfs("status"))
    commands.sh("echo more >> file")
    assert ok(commands.phfs("umount", str(commands.mnt))) == ""
    assert not commands.is_mounted
    assert ok(commands.phfs("status")) == "nothing is mounted\n"
    ok(commands.mount("s3://lives/a", "--read-only"))
    assert commands.sh("cat file") == "hello\nmore\n"


def test_a_second_mount_on_the_same_place(commands: Commands) -> None:
    ok(commands.mount("s3://second", "--create-bucket"))
    found = commands.mount("s3://second")
    assert (found.returncode, found.stderr) == (4, f"phfs: {commands.mnt}: s3://second/ is mounted here already\n")


def test_the_same_volume_twice_on_one_state_directory(commands: Commands) -> None:
    ok(commands.mount("s3://twice", "--create-bucket"))
    other = commands.base / "other"
    other.mkdir()
    found = commands.phfs("mount", "s3://twice", str(other))
    assert (found.returncode, found.stderr.count("\n")) == (5, 1)
    assert commands.sh("echo x > f; cat f") == "x\n"  # the first one does not mind
    assert ok(commands.phfs("umount", str(commands.mnt))) == ""


def test_umount_of_a_mount_in_use(commands: Commands) -> None:
    ok(commands.mount("s3://busy", "--create-bucket"))
    user = subprocess.Popen(
        ["sh", "-c", 'cd "$0" && echo there && read line', str(commands.mnt)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert user.stdout is not None
    assert user.stdout.readline() == b"there\n"
    found = commands.phfs("umount", str(commands.mnt))
    assert (found.returncode, found.stderr.count("\n"), commands.is_mounted) == (4, 1, True)
    assert ok(commands.phfs("umount", "--lazy", str(commands.mnt))) == ""
    assert not commands.is_mounted
    user.communicate(b"\n", timeout=SECONDS)


def test_a_missing_bucket(commands: Commands) -> None:
    found = commands.mount("s3://not-there/a")
    assert (found.returncode, found.stderr.count("\n"), commands.is_mounted) == (3, 1, False)
    assert "--create-bucket" in found.stderr


def test_an_endpoint_out_of_reach(commands: Commands) -> None:
    with unreachable() as url:
        found = commands.mount("s3://bucket", "-o", f"endpoint-url={url},attempts=1,connect-timeout=1")
    assert (found.returncode, found.stderr.count("\n"), commands.is_mounted) == (3, 1, False)


@pytest.mark.minio
@pytest.mark.skipif(minio_binary() is None, reason="no MinIO binary")
def test_wrong_credentials(commands: Commands) -> None:
    file = commands.base / "credentials"
    file.write_text("[default]\naws_access_key_id = nobody\naws_secret_access_key = Hidden1\n")
    file.chmod(0o600)
    with minio() as server:
        options = f"endpoint-url={server.endpoint_url},credentials-file={file}"
        found = commands.mount("s3://bucket", "-o", options)
    assert (found.returncode, found.stderr.count("\n"), commands.is_mounted) == (3, 1, False)
    assert "Hidden1" not in found.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="mount(8) is for root")
@pytest.mark.skipif(shutil.which("mount.phfs", path="/sbin:/usr/sbin") is not None, reason="mount.phfs is installed")
def test_the_helper_of_mount(commands: Commands) -> None:
    script = "from phfs_fuse.cli.main import mount_helper; mount_helper()"
    options = "rw,_netdev,allow_other,create-bucket"
    ok(commands.run(sys.executable, "-c", script, "s3://fstab/a", str(commands.mnt), "-o", options))
    assert mount_table()[str(commands.mnt)].source == "s3://fstab/a"


@pytest.mark.slow
def test_the_demo_checks_itself(commands: Commands) -> None:
    found = commands.phfs("demo", "--once", "--dir", str(commands.base / "demo"))
    assert (found.returncode, found.stdout.splitlines()[-2]) == (0, "all steps passed")


def test_drain(commands: Commands) -> None:
    """What a mount left that was killed goes up without another mount."""
    ok(commands.mount("s3://left/a", "--create-bucket", "-owrite-back-delay=1h"))
    busy = commands.phfs("drain", "s3://left/a")
    assert (busy.returncode, busy.stderr.count("\n")) == (5, 1)
    keeper = json.loads(ok(commands.phfs("status", "--json", str(commands.mnt))))["keeper_pid"]
    commands.sh(f"mkdir d; head -c 9000000 /dev/zero > d/file; kill -9 {keeper}")
    assert ended(keeper, SECONDS)
    commands.run("umount", "-l", str(commands.mnt))
    away = commands.phfs("drain", "s3://left/a", "-oattempts=1,drain-timeout=1s,endpoint-url=http://127.0.0.1:9")
    assert away.returncode == 0  # another endpoint is another volume
    assert "nothing is left" in away.stderr
    found = commands.phfs("drain", "s3://left/a")
    assert found.returncode == 0
    assert "uploaded files=" in found.stderr
    assert "nothing is left" in commands.phfs("drain", "s3://left/a").stderr
    ok(commands.mount("s3://left/a"))
    assert commands.sh("wc -c < d/file").strip() == "9000000"

"""The commands in one process, with a keeper that only takes notes: what they ask for, exit codes, lines."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from phfs_fuse.cli import main as cli
from phfs_fuse.config.model import MountConfig
from phfs_fuse.config.resolve import load_config
from phfs_fuse.errors import MountpointError, NotDrained, StartupError, StoreStartupError
from phfs_fuse.host import logs, processes, registry
from phfs_fuse.host.mount_table import mount_table
from phfs_fuse.host.registry import MountRecord
from phfs_fuse.launch import client, launcher, preflight
from phfs_fuse.launch.client import Progress


@dataclass
class Keeper:
    """Stands in for `phfs_fuse.launch.launcher`."""

    started: list[MountConfig] = field(default_factory=list)
    foreground: bool | None = None
    config_mode: int = 0
    unmounted: list[tuple[Path, bool]] = field(default_factory=list)
    failure: Exception | None = None

    def start(self, config: MountConfig, config_path: Path, *, foreground: bool) -> int:
        if self.failure is not None:
            raise self.failure
        assert load_config(config_path.read_text()) == config
        self.config_mode = config_path.stat().st_mode & 0o777
        self.started.append(config)
        self.foreground = foreground
        return 0

    def unmount(self, mountpoint: Path, *, lazy: bool) -> None:
        if self.failure is not None:
            raise self.failure
        self.unmounted.append((mountpoint, lazy))


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


class Phfs:
    """Runs a command as its entry point does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], place: Path) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys
        self.mountpoint = place / "mnt"
        self.mountpoint.mkdir()
        self.keeper = Keeper()

    def __call__(self, *arguments: str) -> Outcome:
        return self._run(cli.main, "phfs", arguments)

    def helper(self, *arguments: str) -> Outcome:
        return self._run(cli.mount_helper, "mount.phfs", arguments)

    def mount(self, *arguments: str) -> Outcome:
        return self("mount", *arguments, str(self.mountpoint))

    def _run(self, entry: object, name: str, arguments: tuple[str, ...]) -> Outcome:
        self._monkeypatch.setattr(sys, "argv", [name, *arguments])
        with pytest.raises(SystemExit) as ended:
            entry()  # type: ignore[operator]
        out, err = self._capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return Outcome(ended.value.code, out, err)


@pytest.fixture
def phfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Phfs:
    for name in [name for name in os.environ if name.startswith(("PHFS_", "AWS_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PHFS_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(logs, "setup", lambda *_: None)  # pytest's handlers stay
    monkeypatch.setattr(preflight, "FUSE_DEVICE", tmp_path)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    program = Phfs(monkeypatch, capsys, tmp_path)
    monkeypatch.setattr(launcher, "start", program.keeper.start)
    monkeypatch.setattr(launcher, "unmount", program.keeper.unmount)
    return program


# --- mount


def test_mount_hands_the_config_to_the_keeper_in_a_private_file(phfs: Phfs) -> None:
    assert phfs.mount("s3://bucket/p", "--cache-size", "1G", "-o", "uid=5,gid=6", "--read-only") == Outcome(0, "", "")
    (config,) = phfs.keeper.started
    assert (config.store.url, config.kernel.mountpoint) == ("s3://bucket/p/", phfs.mountpoint)
    assert (config.cache.size_max, config.tree.read_only) == (1 << 30, True)
    assert (config.tree.uid, config.tree.gid) == (5, 6)
    assert (phfs.keeper.foreground, phfs.keeper.config_mode) == (False, 0o600)


@pytest.mark.parametrize("flag", ["-f", "--foreground"])
def test_mount_in_the_foreground(phfs: Phfs, flag: str) -> None:
    assert phfs.mount("--group", "G_1", flag).code == 0
    assert phfs.keeper.foreground
    assert phfs.keeper.started[0].store.url == "s3://primehub/groups/g-1/"


def test_the_owner_is_the_caller_and_the_source_the_volume(phfs: Phfs) -> None:
    phfs.mount("s3://bucket/p")
    (config,) = phfs.keeper.started
    assert (config.tree.uid, config.tree.gid) == (os.getuid(), os.getgid())
    assert config.kernel.fs_name == "s3://bucket/p/"


def test_a_relative_mount_point_behind_a_symlink_is_made_absolute(
    phfs: Phfs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(phfs.mountpoint.parent)
    Path("link").symlink_to("mnt")
    phfs("mount", "s3://bucket", "./link/")
    assert phfs.keeper.started[0].kernel.mountpoint == phfs.mountpoint


def test_a_credentials_file_reaches_the_environment_not_the_config(phfs: Phfs, tmp_path: Path) -> None:
    file = tmp_path / "credentials"
    file.write_text("[default]\n")
    file.chmod(0o600)
    assert phfs.mount("s3://bucket", "--credentials-file", str(file)).code == 0
    assert os.environ.pop("AWS_SHARED_CREDENTIALS_FILE") == str(file)
    assert phfs.keeper.started[0].store.profile == "default"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "nothing to mount: name s3://BUCKET[/PREFIX] or --group NAME"),
        (["a", "b"], "say what to mount and where: [s3://BUCKET[/PREFIX]] MOUNTPOINT"),
        (["bucket"], "volume: 'bucket' is not valid, expected s3://BUCKET or s3://BUCKET/PREFIX"),
        (["--group", "g", "s3://bucket"], "--group cannot be used together with s3://bucket"),
        (["s3://bucket", "--cache-size", "x"], "--cache-size: 'x' is not valid, expected a size such as"),
        (["s3://bucket", "--no-such"], "No such option: --no-such"),
        (["s3://bucket", "--cache-size"], "--cache-size: '"),  # takes the mount point for its value
        (["s3://bucket", "-o", "no-such"], "-o no-such: no such option"),
        (["s3://bucket", "--config", "/no/file"], "/no/file: cannot be read: No such file or directory"),
        (["s3://bucket", "--log-level", "loud"], "--log-level: 'loud' is not valid, expected debug, info, "),
    ],
)
def test_wrong_usage_is_one_line_and_code_2(phfs: Phfs, arguments: list[str], line: str) -> None:
    found = phfs.mount(*arguments)
    assert (found.code, found.out) == (2, "")
    assert found.err.startswith(f"phfs: {line}")
    assert found.err.count("\n") == 1
    assert phfs.keeper.started == []


def test_a_mount_point_that_is_missing(phfs: Phfs) -> None:
    phfs.mountpoint.rmdir()
    assert phfs.mount("s3://bucket") == Outcome(4, "", f"phfs: {phfs.mountpoint}: does not exist; mkdir makes it\n")


def test_a_mount_point_that_is_a_file(phfs: Phfs) -> None:
    phfs.mountpoint.rmdir()
    phfs.mountpoint.touch()
    assert phfs.mount("s3://bucket") == Outcome(4, "", f"phfs: {phfs.mountpoint}: not a directory\n")


def test_a_mount_point_that_is_not_empty(phfs: Phfs) -> None:
    (phfs.mountpoint / "file").touch()
    found = phfs.mount("s3://bucket")
    assert (found.code, found.err.count("\n")) == (4, 1)
    assert "is not empty; what is in it would be hidden" in found.err


def test_a_mount_point_in_use(phfs: Phfs) -> None:
    found = phfs("mount", "s3://bucket", "/proc")
    assert found == Outcome(4, "", "phfs: /proc: proc is mounted here already\n")


def test_no_fuse(phfs: Phfs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "FUSE_DEVICE", Path("/no/fuse"))
    found = phfs.mount("s3://bucket")
    assert found.code == 4
    assert found.err.startswith("phfs: /no/fuse: does not exist; load the module with modprobe fuse")


@pytest.mark.parametrize("flag", ["--cache-dir", "--state-dir"])
def test_a_local_directory_that_cannot_be_made(phfs: Phfs, tmp_path: Path, flag: str) -> None:
    (tmp_path / "file").touch()
    found = phfs.mount("s3://bucket", flag, str(tmp_path / "file"))
    assert (found.code, found.err.count("\n")) == (5, 1)
    assert "cannot be written: Not a directory" in found.err


def test_the_reason_of_the_keeper_is_the_line_and_the_code(phfs: Phfs) -> None:
    phfs.keeper.failure = StoreStartupError("s3://bucket: there is no such bucket; --create-bucket makes it")
    assert phfs.mount("s3://bucket") == Outcome(3, "", f"phfs: {phfs.keeper.failure}\n")


def test_a_bug_is_one_line_without_a_traceback_or_secrets(phfs: Phfs) -> None:
    phfs.keeper.failure = RuntimeError("aws_secret_access_key=Hidden1 is odd")
    found = phfs.mount("s3://bucket")
    assert (found.code, found.err.count("\n")) == (1, 1)
    assert found.err.startswith("phfs: unexpected RuntimeError: aws_secret_access_key=[redacted] is odd (")


def test_ctrl_c(phfs: Phfs) -> None:
    phfs.keeper.failure = KeyboardInterrupt()  # type: ignore[assignment]
    assert phfs.mount("s3://bucket") == Outcome(130, "", "")


# --- mount.phfs


def test_a_line_of_fstab(phfs: Phfs) -> None:
    options = "rw,allow_other,_netdev,endpoint-url=http://minio:9000"
    assert phfs.helper("s3://bucket/p", str(phfs.mountpoint), "-n", "-v", "-o", options) == Outcome(0, "", "")
    (config,) = phfs.keeper.started
    assert (config.store.url, config.store.endpoint_url) == ("s3://bucket/p/", "http://minio:9000")
    assert config.kernel.allow_other
    assert config.kernel.fs_name == "s3://bucket/p"  # as in fstab, or mount -a would mount it again


def test_a_group_in_fstab(phfs: Phfs) -> None:
    assert phfs.helper("shared", str(phfs.mountpoint), "-o", "group=G,ro").code == 0
    (config,) = phfs.keeper.started
    assert (config.store.url, config.kernel.fs_name) == ("s3://primehub/groups/g/", "shared")


def test_a_fake_mount_checks_only(phfs: Phfs) -> None:
    assert phfs.helper("s3://bucket", str(phfs.mountpoint), "-f").code == 0
    (phfs.mountpoint / "file").touch()
    assert phfs.helper("s3://bucket", str(phfs.mountpoint), "-f").code == 32
    assert phfs.keeper.started == []


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["s3://bucket"], 1),
        (["s3://bucket", "/mnt", "-X"], 1),
        (["s3://bucket", "/mnt", "-o", "no-such"], 1),
        (["s3://bucket", "/no/such/place"], 32),
        (["s3://bucket", "/no/such/place", "-s", "-o", "no-such"], 32),
    ],
)
def test_the_helper_ends_with_the_codes_of_mount(phfs: Phfs, arguments: list[str], code: int) -> None:
    found = phfs.helper(*arguments)
    assert (found.code, found.err.count("\n")) == (code, 1)
    assert found.err.startswith("mount.phfs: ")


# --- running mounts


@dataclass
class Mounted:
    """A mount that is only on paper: in the table of mounts and in the registry."""

    record: MountRecord
    synced: list[tuple[str | None, float | None]] = field(default_factory=list)
    unmounted: list[tuple[float | None, bool]] = field(default_factory=list)
    waited: list[int] = field(default_factory=list)
    failure: Exception | None = None

    def sync(
        self, record: MountRecord, path: str | None, timeout: float | None, *, retry: bool
    ) -> Iterator[Progress]:
        self.synced.append((path, timeout))
        yield Progress(files_pending=1, bytes_pending=10, bytes_done=0)

    def umount(self, record: MountRecord, timeout: float | None, *, lazy: bool) -> Iterator[Progress]:
        self.unmounted.append((timeout, lazy))
        if self.failure is not None:
            raise self.failure
        yield Progress(files_pending=1, bytes_pending=10, bytes_done=0)

    def ended(self, pid: int, timeout: float) -> bool:
        self.waited.append(pid)
        return True


@pytest.fixture
def mounted(phfs: Phfs, monkeypatch: pytest.MonkeyPatch) -> Mounted:
    place = str(phfs.mountpoint)
    record = MountRecord(mountpoint=place, control_socket="/no/socket", keeper_pid=os.getpid(), url="s3://bucket/")
    registry.write(record)
    mounts = mount_table(f"1 0 0:99 / {place} rw - fuse.phfs s3://bucket/ rw")
    monkeypatch.setattr(cli, "mount_table", lambda: mounts)
    found = Mounted(record)
    monkeypatch.setattr(client, "sync", found.sync)
    monkeypatch.setattr(client, "umount", found.umount)
    monkeypatch.setattr(processes, "ended", found.ended)
    return found


def test_umount_asks_the_mount_and_waits_for_its_end(phfs: Phfs, mounted: Mounted) -> None:
    assert phfs("umount", str(phfs.mountpoint)) == Outcome(0, "", "")
    assert mounted.unmounted == [(None, False)]
    assert mounted.waited == [os.getpid()]


def test_a_lazy_umount_does_not_wait_for_files_in_use(phfs: Phfs, mounted: Mounted) -> None:
    assert phfs("umount", "--lazy", str(phfs.mountpoint)) == Outcome(0, "", "")
    assert mounted.unmounted == [(None, True)]
    assert mounted.waited == []


@pytest.mark.parametrize(
    ("failure", "code"), [(NotDrained("2 files wait"), 6), (MountpointError("/mnt: files are in use"), 4)]
)
def test_umount_passes_on_why_not(phfs: Phfs, mounted: Mounted, failure: StartupError, code: int) -> None:
    mounted.failure = failure
    assert phfs("umount", "--timeout", "1m", str(phfs.mountpoint)) == Outcome(code, "", f"phfs: {failure}\n")
    assert mounted.unmounted == [(60.0, False)]
    assert mounted.waited == []


def test_umount_removes_a_dead_mount(phfs: Phfs, mounted: Mounted) -> None:
    registry.remove(mounted.record.mountpoint, mounted.record.keeper_pid)
    found = phfs("umount", str(phfs.mountpoint))
    assert found.code == 0
    assert "removed a dead mount" in found.err
    assert (mounted.unmounted, phfs.keeper.unmounted) == ([], [(phfs.mountpoint, True)])


@pytest.mark.parametrize("command", ["umount", "status", "sync"])
def test_a_path_outside_of_all_mounts(phfs: Phfs, command: str) -> None:
    found = phfs(command, str(phfs.mountpoint))
    assert (found.code, found.err.count("\n")) == (4, 1)


def test_sync_of_a_path_and_of_everything(phfs: Phfs, mounted: Mounted) -> None:
    assert phfs("sync", str(phfs.mountpoint / "a/../b")) == Outcome(0, "", "")
    assert phfs("sync", str(phfs.mountpoint)).code == 0
    assert phfs("sync", "--timeout", "500ms").code == 0
    assert mounted.synced == [("b", None), (None, None), (None, 0.5)]


def test_a_wrong_timeout(phfs: Phfs) -> None:
    found = phfs("sync", "--timeout", "soon")
    assert found.code == 2
    assert found.err.startswith("phfs: --timeout: 'soon' is not valid, expected a time such as")


def test_status_without_mounts(phfs: Phfs) -> None:
    assert phfs("status") == Outcome(0, "nothing is mounted\n", "")
    assert phfs("status", "--json") == Outcome(0, "[]\n", "")


STATUS = {
    "mountpoint": "/mnt/[x]",
    "url": "s3://bucket/",
    "read_only": True,
    "pending": {"files": 2, "deletes": 1, "bytes": 3 << 20, "oldest_seconds": 7.2},
    "cache": {"bytes": 0, "limit": 10 << 30, "hits": 3, "misses": 1, "hit_rate": 0.75},
    "conflicts": 1,
    "errors": [{"path": "a[b].txt", "reason": "access denied", "count": 4}],
    "store": {"state": "ok"},
}


def test_status_shows_every_mount(phfs: Phfs, mounted: Mounted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "status", lambda record: STATUS)
    found = phfs("status")
    heading, row, error = found.out.splitlines()
    assert " ".join(heading.split()) == "MOUNT POINT VOLUME STATE PENDING CACHE HITS CONFLICTS"
    words = "/mnt/[x] s3://bucket/ read-only, store ok 3 changes, 3.0 MiB, 7 s 0 B of 10.0 GiB 75% 1"
    assert " ".join(row.split()) == words
    assert error == "/mnt/[x]: a[b].txt: access denied (4 times)"
    assert json.loads(phfs("status", "--json").out) == [STATUS]
    assert json.loads(phfs("status", "--json", str(phfs.mountpoint)).out) == STATUS


def test_status_of_a_mount_that_was_not_used_yet(
    phfs: Phfs, mounted: Mounted, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = STATUS | {
        "pending": {"files": 0, "deletes": 0, "bytes": 0, "oldest_seconds": None},
        "cache": {"bytes": 0, "limit": 10 << 30, "hits": 0, "misses": 0, "hit_rate": None},
        "errors": [],
    }
    monkeypatch.setattr(client, "status", lambda record: fresh)
    row = phfs("status").out.splitlines()[1]
    assert " ".join(row.split()).endswith("store ok - 0 B of 10.0 GiB - 1")


def test_status_shows_a_mount_that_does_not_answer(phfs: Phfs, mounted: Mounted) -> None:
    found = phfs("status")
    assert (found.code, found.err) == (0, "")
    assert "no answer" in found.out
    (answer,) = json.loads(phfs("status", "--json").out)
    assert answer["state"] == "no answer"
    found = phfs("status", str(phfs.mountpoint))
    assert (found.code, found.err) == (4, f"phfs: {phfs.mountpoint}: the mount does not answer\n")


# --- the command itself


def test_help_and_version(phfs: Phfs) -> None:
    assert phfs("--version").out.startswith("phfs ")
    assert "mount" in phfs("--help").out
    assert phfs("mount", "--help").code == 0
    bare = phfs()
    assert (bare.code, bare.err) == (2, "")
    assert bare.out.startswith("Usage: phfs")


def test_an_unknown_command(phfs: Phfs) -> None:
    found = phfs("mout")
    assert (found.code, found.err.count("\n")) == (2, 1)
    assert found.err.startswith("phfs: No such command 'mout'")

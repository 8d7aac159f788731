"""What a volume's mount is told: the volume's wishes, the node's own settings, whose credentials."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from phfs_csi.config import NodeConfig
from phfs_csi.node.mount_configs import MountConfigs
from phfs_csi.node.records import Records, VolumeRecord
from phfs_csi.node.shares import Shares
from phfs_csi.request.params import Credentials

ROLE = {"AWS_ROLE_ARN": "arn:aws:iam::1:role/phfs", "AWS_WEB_IDENTITY_TOKEN_FILE": "/var/run/secrets/token"}
OWN = Credentials(access_key="AKIA", secret_key="s3cr3t", ca_bundle="-----BEGIN CERTIFICATE-----\n")


@pytest.fixture
def root() -> Iterator[Path]:
    """Short: sockets lie below it."""
    with tempfile.TemporaryDirectory(prefix="phfs-") as found:
        yield Path(found)


@pytest.fixture
def records(root: Path) -> Records:
    return Records(root / "state")


@pytest.fixture
def configs(root: Path, records: Records) -> MountConfigs:
    config = NodeConfig(node_id="n", state_dir=root / "state", cache_dir=root / "cache")
    return MountConfigs(config, records, Shares(config, records))


def volume(root: Path, settings: Mapping[str, str] | None = None, **more: object) -> VolumeRecord:
    fields = {"volume_id": "vol", "source": "s3://b-1/x/", "path": root / "mnt", "settings": settings or {}}
    return VolumeRecord(**{**fields, **more})  # type: ignore[arg-type]


@pytest.fixture
def role(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plugin's service account has one."""
    monkeypatch.delenv("AWS_SHARED_CREDENTIALS_FILE", raising=False)  # that of other tests
    for name, value in ROLE.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("role")
def test_a_volume_without_credentials_has_those_of_the_service_account(configs: MountConfigs, root: Path) -> None:
    config, environ = configs.with_credentials(volume(root))
    assert config.store.profile is None
    assert environ.items() >= ROLE.items()
    assert "AWS_SHARED_CREDENTIALS_FILE" not in environ


@pytest.mark.usefixtures("role")
def test_a_volume_with_credentials_has_no_others(configs: MountConfigs, records: Records, root: Path) -> None:
    record = volume(root, has_credentials=True, has_ca_bundle=True)
    records.save(record)
    records.save_credentials(record, OWN)
    config, environ = configs.with_credentials(record)
    assert config.store.profile == "default"  # by name: it goes before everything in the environment
    assert "AKIA" in Path(environ["AWS_SHARED_CREDENTIALS_FILE"]).read_text()
    assert Path(environ["AWS_CA_BUNDLE"]).read_text() == OWN.ca_bundle


@pytest.mark.parametrize(
    ("settings", "modes"),
    [({}, (0o664, 0o2775)), ({"umask": "077"}, (0o660, 0o2770)), ({"file-mode": "0600"}, (0o660, 0o2775))],
)
def test_the_group_of_the_pod_owns_and_may_write(
    configs: MountConfigs, root: Path, settings: dict[str, str], modes: tuple[int, int]
) -> None:
    tree = configs.config(volume(root, settings, mount_group=2000)).tree
    assert (tree.gid, tree.file_mode, tree.dir_mode) == (2000, *modes)


def test_what_is_the_node_s_no_volume_changes(configs: MountConfigs, root: Path) -> None:
    wishes = {"state-dir": "/etc", "cache-dir": "/etc", "dirty-max": "1T", "fs-name": "x", "log-level": "debug"}
    record = volume(root, wishes, read_only=True)
    config = configs.config(record)
    assert config.writeback.directory.is_relative_to(root / "state")
    assert config.cache.directory.is_relative_to(root / "cache")
    assert config.writeback.dirty_bytes_max == 20 << 30
    assert (config.kernel.fs_name, config.log_level, config.tree.read_only) == ("s3://b-1/x/", "info", True)

"""What stands between a `MountConfig` and its start: checks without the store, local directories. No state.

Each check raises the `StartupError` whose line says what to do.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Final

from phfs_fuse.config.dirs import make_private
from phfs_fuse.config.model import MountConfig
from phfs_fuse.config.resolve import Resolved, dump_config
from phfs_fuse.errors import LocalStateError, MountpointError
from phfs_fuse.host.mount_table import mount_table, require_free

FUSE_DEVICE: Final = Path("/dev/fuse")
PROBE_BYTES: Final = 4096


def check(config: MountConfig) -> None:
    """All that can be found wrong without the store. Makes the local directories.

    Raises: MountpointError, LocalStateError.
    """
    require_free(config.kernel.mountpoint, mount_table())
    _require_fuse()
    check_directories(config)


def check_directories(config: MountConfig) -> None:
    """Make the local directories. Raises: LocalStateError."""
    for directory in (config.writeback.directory, config.cache.directory):
        _require_writable(directory)


def export_credentials(resolved: Resolved) -> MountConfig:
    """Make the credentials file the first place where this process and its children look for credentials."""
    config, variables = with_credentials(resolved)
    os.environ.update(variables)
    return config


def with_credentials(resolved: Resolved) -> tuple[MountConfig, dict[str, str]]:
    """The config and the variables with which the credentials file is looked at first."""
    config = resolved.config
    if resolved.credentials_file is None:
        return config, {}
    profile = config.store.profile or "default"  # a profile by name goes before AWS_ACCESS_KEY_ID
    config = replace(config, store=replace(config.store, profile=profile))
    return config, {"AWS_SHARED_CREDENTIALS_FILE": str(resolved.credentials_file)}


def write_config(config: MountConfig) -> Path:
    """A file for the keeper and each worker that it starts; its name is that of the mount point. Atomic."""
    path = config_path(config)
    try:
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:  # mode 0600
            file.write(dump_config(config))
        Path(file.name).replace(path)
    except OSError as exc:
        raise LocalStateError(f"{path}: cannot be written: {exc.strerror}") from exc
    return path


def config_path(config: MountConfig) -> Path:
    name = hashlib.sha256(os.fsencode(config.kernel.mountpoint)).hexdigest()[:16]
    return config.writeback.directory / f"mount-{name}.json"


def _require_fuse() -> None:
    if not FUSE_DEVICE.exists():
        raise MountpointError(
            f"{FUSE_DEVICE}: does not exist; load the module with modprobe fuse, "
            "or give the container the device and CAP_SYS_ADMIN"
        )
    if os.geteuid() != 0 and shutil.which("fusermount3") is None:
        raise MountpointError("fusermount3: not found; install the package fuse3")


def _require_writable(directory: Path) -> None:
    try:
        make_private(directory)
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(bytes(PROBE_BYTES))  # finds a full disk too
    except OSError as exc:
        raise LocalStateError(f"{directory}: cannot be written: {exc.strerror}") from exc

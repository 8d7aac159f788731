"""What is staged and published here, on disk, so that a restarted plugin finds it; one call per volume at a time.

State: `DIR/<key>/` for each volume, where <key> is a hash of its id and place:

    volume.json         how it is mounted; also while what it left is uploaded in the background
    targets/<key>.json  where it is bound
    credentials, ca.pem of the volume, as long as it is mounted or not uploaded (mode 0600)
    <store id>/         the state of the mount itself

Files are replaced as a whole. A record is saved before its effect and removed after it.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from phfs_csi.errors import Aborted, Internal, InvalidArgument, ResourceExhausted
from phfs_csi.request.params import AccessMode, Credentials
from phfs_fuse.config import json_text
from phfs_fuse.config.dirs import make_private
from phfs_fuse.state.journal import Journal

log = logging.getLogger(__name__)

FORMAT: Final = 1
PATIENCE_SECONDS: Final = 2.0  # for a call that is as good as done; then ABORTED


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeRecord:
    """A volume that is mounted at `path`, or that has left something to upload. No secrets."""

    volume_id: str
    source: str
    path: Path
    settings: Mapping[str, str] = field(default_factory=dict)
    access_mode: AccessMode = AccessMode.MULTI_NODE_MULTI_WRITER
    read_only: bool = False
    mount_group: int | None = None
    cache_bytes_max: int | None = None
    drain_seconds: float = 60.0
    has_credentials: bool = False
    has_ca_bundle: bool = False
    is_inline: bool = False  # mounted at the target itself
    is_ended: bool = False  # not mounted any more: the rest goes up in the background

    @property
    def key(self) -> str:
        return _key(self.volume_id, self.source, self.settings.get("endpoint-url", ""))


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetRecord:
    """A bind mount of the volume."""

    volume_id: str
    path: Path
    read_only: bool


class Records:
    """All methods may be called by any thread; those that change a volume only by who holds it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._changed = threading.Condition()
        self._busy: set[str] = set()
        self._volumes: dict[str, VolumeRecord] = {}
        self._targets: dict[str, dict[Path, TargetRecord]] = {}

    def read(self) -> None:
        """Take up what is there. What cannot be read is left alone, with an error in the log. Raises: OSError."""
        with self._changed:
            self._volumes.clear()
            self._targets.clear()
        make_private(self._directory)
        for path in sorted(self._directory.glob("*/volume.json")):
            self._load(path)

    def _load(self, path: Path) -> None:
        try:
            record = _volume(json_text.parse(path.read_text(encoding="utf-8")))
            targets = [
                _target(json_text.parse(file.read_text())) for file in sorted(path.parent.glob("targets/*.json"))
            ]
        except (OSError, ValueError, TypeError, KeyError) as exc:
            log.error("%s: not read: %s: its mount is not looked after until it is staged again", path, exc)
            return
        self._volumes[record.key] = record
        self._targets[record.key] = {target.path: target for target in targets}

    @contextmanager
    def hold(self, volume_id: str, patience_seconds: float = PATIENCE_SECONDS) -> Iterator[None]:
        """Keep all other calls off this volume. Raises: Aborted when another one is at work."""
        with self._changed:
            if not self._changed.wait_for(lambda: volume_id not in self._busy, patience_seconds):
                raise Aborted(f"{volume_id}: another call for this volume is at work")
            self._busy.add(volume_id)
        try:
            yield
        finally:
            with self._changed:
                self._busy.discard(volume_id)
                self._changed.notify_all()

    # --- volumes

    def volumes(self) -> list[VolumeRecord]:
        """All that is mounted, or was and left something."""
        with self._changed:
            return list(self._volumes.values())

    def mounted(self, volume_id: str) -> VolumeRecord | None:
        """The volume, if it is (to be) mounted."""
        found = (record for record in self.volumes() if record.volume_id == volume_id and not record.is_ended)
        return next(found, None)

    def at(self, path: Path) -> VolumeRecord | None:
        """What is (to be) mounted there."""
        return next((record for record in self.volumes() if record.path == path and not record.is_ended), None)

    def current(self, record: VolumeRecord) -> VolumeRecord | None:
        """What is known of the same volume now."""
        with self._changed:
            return self._volumes.get(record.key)

    def save(self, record: VolumeRecord) -> None:
        """Raises: CsiError."""
        _write(self.directory(record) / "volume.json", _plain(record))
        with self._changed:
            self._volumes[record.key] = record
            self._targets.setdefault(record.key, {})

    def remove(self, record: VolumeRecord) -> None:
        """Forget the volume, with its credentials and its local state, in which nothing waits for upload. Bytes that
        belong to no file stay where they are."""
        directory = self.directory(record)
        with suppress(FileNotFoundError):
            (directory / "volume.json").unlink()
        self.forget_credentials(record)
        with self._changed:
            self._volumes.pop(record.key, None)
            self._targets.pop(record.key, None)
        if any(directory.glob("*/saved/*")):
            log.error("%s: bytes that no file could be found for stay in %s", record.volume_id, directory)
        else:
            shutil.rmtree(directory, ignore_errors=True)

    def directory(self, record: VolumeRecord) -> Path:
        return self._directory / record.key

    def refused(self, record: VolumeRecord) -> int:
        """How many changes the store has refused for good, of those that wait in the local state."""
        return sum(Journal.refused_in(path.parent) for path in self.directory(record).glob("*/journal.db"))

    # --- targets

    def targets(self, record: VolumeRecord) -> list[TargetRecord]:
        with self._changed:
            return list(self._targets.get(record.key, {}).values())

    def target_at(self, path: Path) -> tuple[VolumeRecord, TargetRecord] | None:
        with self._changed:
            found = ((self._volumes[key], targets[path]) for key, targets in self._targets.items() if path in targets)
            return next(found, None)

    def save_target(self, record: VolumeRecord, target: TargetRecord) -> None:
        """Raises: CsiError."""
        _write(self._target_file(record, target.path), _plain(target))
        with self._changed:
            self._targets[record.key][target.path] = target

    def remove_target(self, record: VolumeRecord, path: Path) -> None:
        self._target_file(record, path).unlink(missing_ok=True)
        with self._changed:
            self._targets.get(record.key, {}).pop(path, None)

    def _target_file(self, record: VolumeRecord, path: Path) -> Path:
        return self.directory(record) / "targets" / f"{_key(str(path))}.json"

    # --- credentials

    def credentials_file(self, record: VolumeRecord) -> Path | None:
        return self.directory(record) / "credentials" if record.has_credentials else None

    def ca_file(self, record: VolumeRecord) -> Path | None:
        return self.directory(record) / "ca.pem" if record.has_ca_bundle else None

    def save_credentials(self, record: VolumeRecord, credentials: Credentials) -> None:
        """As an AWS shared credentials file. Raises: CsiError."""
        words = (credentials.access_key, credentials.secret_key, credentials.session_token)
        if not all(word.isprintable() for word in words):
            raise InvalidArgument("credentials: control characters in a key")
        if credentials.access_key:
            lines = ["[default]", f"aws_access_key_id = {credentials.access_key}"]
            lines.append(f"aws_secret_access_key = {credentials.secret_key}")
            lines += [f"aws_session_token = {credentials.session_token}"] if credentials.session_token else []
            _write(self.directory(record) / "credentials", "\n".join(lines) + "\n")
        if credentials.ca_bundle:
            _write(self.directory(record) / "ca.pem", credentials.ca_bundle)

    def forget_credentials(self, record: VolumeRecord) -> None:
        for name in ("credentials", "ca.pem"):
            (self.directory(record) / name).unlink(missing_ok=True)


def _key(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _write(path: Path, text: str) -> None:
    """Atomic, also towards a power cut; mode 0600. Raises: CsiError."""
    draft = path.with_name(f".{path.name}.new")
    try:
        make_private(path.parent)
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError as exc:
        kind = ResourceExhausted if exc.errno in (errno.ENOSPC, errno.EDQUOT) else Internal
        raise kind(f"{path}: cannot be written: {exc.strerror}") from exc


def _plain(record: VolumeRecord | TargetRecord) -> str:
    fields = dataclasses.asdict(record) | {"format": FORMAT}
    return json.dumps(fields, default=lambda value: value.value if isinstance(value, AccessMode) else str(value))


def _volume(data: Mapping[str, Any]) -> VolumeRecord:
    fields = _fields(VolumeRecord, data)
    fields |= {"path": Path(fields["path"]), "access_mode": AccessMode(fields["access_mode"])}
    return VolumeRecord(**fields)


def _target(data: Mapping[str, Any]) -> TargetRecord:
    fields = _fields(TargetRecord, data)
    return TargetRecord(**fields | {"path": Path(fields["path"])})


def _fields(kind: type[Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """Raises: ValueError for a newer format."""
    if data["format"] > FORMAT:
        raise ValueError("the record is of a newer version")
    return {name.name: data[name.name] for name in dataclasses.fields(kind) if name.name in data}

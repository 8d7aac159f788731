"""Keys that sign the ids of provisioned volumes: with its MAC an id says what the deletion of its volume may delete.

The prefix and the policy of a volume come from the StorageClass and the claim. Its record in the bucket repeats them,
and who may write the bucket may change the record. So the id, which is kept in the PersistentVolume, carries a MAC of
both, and a record that does not agree with it directs nothing.

Owns no state: the file is read at each call, since the kubelet changes it when the Secret changes.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from phfs_csi.errors import FailedPrecondition
from phfs_csi.request.volume_id import VolumeId
from phfs_fuse.config.dirs import make_private

FILE_BYTES_MAX: Final = 64 << 10
KEY_CHARS_MIN: Final = 32


@dataclass(frozen=True, slots=True)
class IdKeys:
    """The first key signs, all are accepted: a new one is put before the others, and the others go when no volume of
    their time is left. Never shown."""

    keys: Sequence[str] = field(default=(), repr=False)

    def signed(self, volume_id: VolumeId, prefix: str, on_delete: str) -> VolumeId:
        """With a MAC where there is a key; else as it is."""
        if not self.keys:
            return volume_id
        return replace(volume_id, mac=_mac(self.keys[0], volume_id, prefix, on_delete))

    def has_signed(self, volume_id: VolumeId, prefix: str, on_delete: str) -> bool:
        """Whether the MAC of the id is that of this prefix and policy, by one of the keys."""
        macs = [_mac(key, volume_id, prefix, on_delete) for key in self.keys]
        return any([hmac.compare_digest(mac, volume_id.mac) for mac in macs])


def _mac(key: str, volume_id: VolumeId, prefix: str, on_delete: str) -> str:
    """No part holds a newline: those of the id are quoted, and a prefix has no control characters."""
    text = "\n".join((str(replace(volume_id, mac="")), on_delete, prefix))
    return hmac.new(key.encode(), text.encode("utf-8", "surrogateescape"), hashlib.sha256).hexdigest()


class IdKeysFile:
    """A key on each line. `path` None, or a file that is not there: no keys. `make`: a missing file is made."""

    def __init__(self, path: Path | None, *, make: bool = False) -> None:
        self._path = path
        self._make = make

    def read(self) -> IdKeys:
        """Raises: FailedPrecondition when the file cannot be read, or a key is too short."""
        if self._path is None:
            return IdKeys()
        try:
            if self._make and not self._path.exists():
                _new(self._path)
            with self._path.open(encoding="utf-8") as file:
                keys = file.read(FILE_BYTES_MAX).split()
        except FileNotFoundError:
            return IdKeys()
        except (OSError, UnicodeDecodeError) as exc:
            raise FailedPrecondition(
                f"keys of volume ids {self._path}: cannot be read ({type(exc).__name__})"
            ) from None
        if any(len(key) < KEY_CHARS_MIN for key in keys):
            raise FailedPrecondition(
                f"keys of volume ids {self._path}: a key has less than {KEY_CHARS_MIN} characters, "
                "see `openssl rand -hex 32`"
            )
        return IdKeys(keys)


def _new(path: Path) -> None:
    make_private(path.parent)
    with suppress(FileExistsError), open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32) + "\n")

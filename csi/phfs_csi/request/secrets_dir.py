"""A secret that is mounted as a directory, a file for each key: the plugin's own, for volumes that bring none.

Owns no state: it is read at each call, since the kubelet changes it when the Secret changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from phfs_csi.errors import FailedPrecondition

FILE_BYTES_MAX: Final = 1 << 20  # of a whole Secret


class SecretsDirectory:
    """`path` "": none. A directory that is not there is an empty one: the Secret is optional."""

    def __init__(self, path: str) -> None:
        self._path = Path(path) if path else None

    def read(self) -> Mapping[str, str]:
        """Raises: FailedPrecondition when a file cannot be read, or is no text."""
        if self._path is None or not self._path.is_dir():
            return {}
        # names that begin with dots are the kubelet's
        files = [path for path in self._path.iterdir() if not path.name.startswith(".") and path.is_file()]
        return {path.name: _text(path) for path in files}


def _text(path: Path) -> str:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return file.read(FILE_BYTES_MAX)
    except (OSError, UnicodeDecodeError) as exc:
        raise FailedPrecondition(f"default secret {path.name!r}: cannot be read ({type(exc).__name__})") from None

"""The directory of the block cache: lock and format, the names of its files, how big and how old they are.

Owns the index: one entry per file, least recently used first. The directory's content may vanish at any time.
"""

from __future__ import annotations

import fcntl
import os
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Final

from phfs_fuse.config.dirs import make_private
from phfs_fuse.errors import LocalStateError
from phfs_fuse.types import ETag, ObjectKey

FORMAT: Final = 1
SECTOR_BYTES: Final = 512  # Source: stat(2), st_blocks
TRASH: Final = "trash"

Found = tuple[int, str, int]  # last use in nanoseconds, name, bytes on disk


@dataclass(slots=True)
class Entry:
    """One file. `whole_ino` is its inode number if this process knows that all blocks are there and right."""

    bytes: int = 0
    whole_ino: int = 0


def file_name(key: ObjectKey, etag: ETag, block_bytes: int, checksum: str) -> str:
    """Of the blocks of one version; another block size or checksum has other files."""
    text = "\0".join((key, etag, str(block_bytes), checksum))
    return blake2b(text.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


class CacheDirectory:
    """Made, locked and checked when built; `close` gives the lock back.

    Raises: LocalStateError if it is not writable, in use by another process, or of a newer format.
    """

    def __init__(self, path: Path) -> None:
        self.entries: OrderedDict[str, Entry] = OrderedDict()
        self.used_bytes = 0
        self._path = str(path)
        self._trash_count = 0
        try:
            make_private(path)
            self._lock_fd = os.open(f"{self._path}/lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                self._lock()
                self._check_format()
                make_private(path / TRASH)
            except BaseException:
                os.close(self._lock_fd)
                raise
        except OSError as exc:
            raise LocalStateError(
                f"cache directory {path}: {exc.strerror}: make it writable or choose another with --cache-dir"
            ) from exc

    def close(self) -> None:
        os.close(self._lock_fd)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise LocalStateError(
                f"cache directory {self._path}: in use by another mount: choose another with --cache-dir"
            ) from exc

    def _check_format(self) -> None:
        path = Path(self._path, "format")
        try:
            found = path.read_text(encoding="ascii", errors="replace").strip()
        except FileNotFoundError:
            path.write_text(f"{FORMAT}\n", encoding="ascii")
            return
        if found != str(FORMAT):
            raise LocalStateError(
                f"cache directory {self._path}: format {found!r}, this phfs knows {FORMAT}: delete the "
                "directory (all that it holds is in the store too) or choose another with --cache-dir"
            )

    # -- files

    def path_of(self, name: str) -> str:
        return f"{self._path}/{name[:2]}/{name}"

    def open_file(self, name: str) -> int:
        """The file, empty if there was none. Raises: OSError."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        try:
            return os.open(self.path_of(name), flags, 0o600)
        except FileNotFoundError:
            make_private(Path(self.path_of(name)).parent)
            return os.open(self.path_of(name), flags, 0o600)

    def move_in(self, source: str, name: str) -> None:
        """Make `source` the file. Raises: OSError, EXDEV if it is on another file system."""
        try:
            os.rename(source, self.path_of(name))
        except FileNotFoundError:
            make_private(Path(self.path_of(name)).parent)
            os.rename(source, self.path_of(name))

    def move(self, name: str, new_name: str) -> None:
        """Give a file and its entry another name, in place of what has that. Atomic."""
        try:
            self.move_in(self.path_of(name), new_name)
        except OSError:  # gone: the blocks are fetched again
            self.forget_entry(name)
            return
        self.forget_entry(new_name)
        if (entry := self.entries.pop(name, None)) is not None:
            self.entries[new_name] = entry

    def discard(self, name: str) -> str | None:
        """Take a file out of the cache at once; returns what is left to be unlinked on a thread. Atomic."""
        self.forget_entry(name)
        self._trash_count += 1
        trash = f"{self._path}/{TRASH}/{self._trash_count}"
        try:
            os.rename(self.path_of(name), trash)
        except OSError:  # the file or the trash is gone
            unlink_all([self.path_of(name)])
            return None
        return trash

    # -- index

    def entry(self, name: str) -> Entry:
        """The entry, now the last used one; made if there is none."""
        found = self.entries.get(name)
        if found is None:
            found = self.entries[name] = Entry()
        else:
            self.entries.move_to_end(name)
        return found

    def resize(self, entry: Entry, bytes_on_disk: int) -> None:
        """`entry` must be in the index."""
        self.used_bytes += bytes_on_disk - entry.bytes
        entry.bytes = bytes_on_disk

    def forget_entry(self, name: str) -> None:
        if (entry := self.entries.pop(name, None)) is not None:
            self.used_bytes -= entry.bytes

    def add_found(self, found: Sequence[Found]) -> None:
        """Take up files of `scan`, oldest first, as less recently used than all that have an entry."""
        for _, name, size in reversed(found):
            if name not in self.entries:
                self.entries[name] = Entry(size)
                self.entries.move_to_end(name, last=False)
                self.used_bytes += size

    def scan(self) -> list[Found]:
        """The files of the directory, least recently used first. Slow: for a thread, touches no state here."""
        unlink_all(entry.path for entry in _entries(f"{self._path}/{TRASH}"))
        found: list[Found] = []
        for folder in _entries(self._path):
            if len(folder.name) == 2:
                found.extend(_found(folder.path))
        found.sort()
        return found


def unlink_all(paths: Iterable[str]) -> None:
    """Remove files; those that are gone or cannot be removed are left out."""
    for path in paths:
        with suppress(OSError):
            os.unlink(path)


def _entries(path: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(path) as entries:
            return list(entries)
    except OSError:
        return []


def _found(folder: str) -> Iterable[Found]:
    for entry in _entries(folder):
        with suppress(OSError):
            status = entry.stat(follow_symlinks=False)
            yield status.st_mtime_ns, entry.name, status.st_blocks * SECTOR_BYTES

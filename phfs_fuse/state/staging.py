"""Staging: local files with the bytes that the store does not have yet. Owns them and their extent logs.

A staged file is a stack of layers over the stored version (the base). Normally there is one; while a snapshot of it
is uploaded that layer is frozen and changes go to a second one. A layer is a sparse file `N.data` with the bytes
written; where it has none, the first `seen` bytes of what lies below show through and the rest is zeros. Its length
is the file's. A layer over nothing (`seen` 0) needs no more than that; for the others `N.ext` logs which ranges were
written, one record per write, after the bytes: a write that was answered is found again after a crash.
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cachetools import LRUCache

from phfs_fuse.config.dirs import make_private
from phfs_fuse.extents import Extents
from phfs_fuse.host import saved_files
from phfs_fuse.host.saved_files import Saved
from phfs_fuse.localfile import write_all

_RECORD: Final = struct.Struct("<QQI")
_CLIP: Final = (1 << 64) - 1  # as `end`: the file was truncated to `start`


class _Files(LRUCache[str, int]):
    """Open descriptors by the path of the file, least recently used closed first."""

    def popitem(self) -> tuple[str, int]:
        path, fd = super().popitem()
        os.close(fd)
        return path, fd


@dataclass(frozen=True, slots=True)
class Piece:
    """Where the bytes [start, end) of a staged file are: in `layer`, or (None) in the base, or (`zero`) nowhere."""

    start: int
    end: int
    layer: Layer | None
    zero: bool = False


class Layer:
    """One staging file. `extents` are the ranges that it holds (meaningless while `seen` is 0: it holds all)."""

    __slots__ = ("_area", "data", "extents", "id", "seen", "size")

    def __init__(self, area: StagingArea, layer_id: int, seen: int) -> None:
        self._area = area
        self.id = layer_id
        self.data = area.data(layer_id)
        self.seen = seen
        self.size = 0
        self.extents = Extents()

    @property
    def fd(self) -> int:
        """Valid until the next use of the area."""
        return self._area.fd(self.data)

    @property
    def path(self) -> Path:
        return Path(self.data)

    @property
    def local_bytes(self) -> int:
        return self.extents.total_bytes

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Atomic towards a crash of the process. Raises: OSError (ENOSPC, ...): then nothing has changed."""
        end = offset + len(data)
        write_all(self.fd, data, offset)
        if self.seen and not self.extents.covers(offset, end):
            self._log(offset, end)
        self._hold(offset, end)
        self.size = max(self.size, end)

    def truncate(self, size: int) -> None:
        """Raises: OSError (ENOSPC, ...): then nothing has changed."""
        if self.seen and size < self.size:
            self._log(size, _CLIP)
        if size:
            os.ftruncate(self.fd, size)
        elif self.size:
            self._area.empty(self.data)
        if self.seen and size < self.size:
            self.seen = min(self.seen, size)
        before = self.extents.total_bytes
        self.extents.clip(size)
        self._area.held_bytes += self.extents.total_bytes - before
        self.size = size

    def _hold(self, start: int, end: int) -> None:
        before = self.extents.total_bytes
        self.extents.add(start, end)
        self._area.held_bytes += self.extents.total_bytes - before

    def filled(self, start: int, end: int) -> None:
        """Bytes of what lies below were copied in: from now on they are this layer's."""
        if self.seen:
            self._log(start, end)
        self._hold(start, end)

    def gaps(self) -> list[tuple[int, int]]:
        """What still shows through."""
        return self.extents.gaps(0, min(self.seen, self.size)) if self.seen else []

    def _log(self, start: int, end: int) -> None:
        body = struct.pack("<QQ", start, end)
        fd = self._area.fd(self._area.log(self.id), os.O_APPEND | os.O_CREAT)
        if (count := os.write(fd, body + struct.pack("<I", zlib.crc32(body)))) != _RECORD.size:
            os.ftruncate(fd, os.fstat(fd).st_size - count)  # what follows a torn record would not be found
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def recover(self) -> None:
        """Read size and extents back after a restart; a torn record at the end is a write that was not answered."""
        self.size = os.fstat(self.fd).st_size
        if self.seen:
            for start, end in _records(Path(self._area.log(self.id))):
                if end == _CLIP:
                    self.seen = min(self.seen, start)
                    self.extents.clip(start)
                else:
                    self.extents.add(start, end)
            self.extents.clip(self.size)
        if not self.seen:  # from the start, or since it was truncated: nothing was logged from then on
            self.extents = Extents([(0, self.size)])
        self._area.held_bytes += self.extents.total_bytes


def _records(path: Path) -> Iterator[tuple[int, int]]:
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return
    for at in range(0, len(raw) - _RECORD.size + 1, _RECORD.size):
        start, end, crc = _RECORD.unpack_from(raw, at)
        if zlib.crc32(raw[at : at + 16]) != crc:
            return
        yield start, end


class Staged:
    """The layers of one file, bottom first; the last one takes the writes. While `frozen`, the bottom one stays as
    it is: it is being uploaded, or was taken for an upload that failed after something was written on top."""

    __slots__ = ("frozen", "layers")

    def __init__(self, layers: list[Layer]) -> None:
        self.layers = layers
        self.frozen = len(layers) > 1

    def memento(self) -> Callable[[], None]:
        """A call that brings the same layers back."""
        layers, frozen = list(self.layers), self.frozen

        def bring_back() -> None:
            self.layers[:] = layers
            self.frozen = frozen

        return bring_back

    @property
    def needs_layer(self) -> bool:
        """Whether a write has to go to a new layer."""
        return self.frozen and len(self.layers) == 1

    @property
    def top(self) -> Layer:
        return self.layers[-1]

    @property
    def size(self) -> int:
        return self.layers[-1].size

    @property
    def bottom(self) -> Layer:
        return self.layers[0]

    @property
    def local_bytes(self) -> int:
        return sum(layer.local_bytes for layer in self.layers)

    def pieces(self, start: int, end: int) -> list[Piece]:
        """Who has [start, end), in ascending order without gaps; `end` must not be beyond the size."""
        return list(_pieces(self.layers, len(self.layers) - 1, start, end))


def _pieces(layers: list[Layer], index: int, start: int, end: int) -> Iterator[Piece]:
    if start >= end:
        return
    if index < 0:
        yield Piece(start, end, None)
        return
    layer = layers[index]
    if not layer.seen:
        inside = max(start, min(end, layer.size))
        if start < inside:
            yield Piece(start, inside, layer)
        if inside < end:
            yield Piece(inside, end, None, zero=True)
        return
    at = start
    for held_start, held_end in [*layer.extents.overlap(start, end), (end, end)]:
        shown = max(at, min(held_start, layer.seen))
        yield from _pieces(layers, index - 1, at, shown)
        if shown < held_start:
            yield Piece(shown, held_start, None, zero=True)
        if held_start < held_end:
            yield Piece(held_start, held_end, layer)
        at = held_end


class StagingArea:
    """The directory of the staging files of one volume."""

    def __init__(
        self, directory: Path, *, first_id: int, files_max: int = 512, saved_bytes_max: int | None = None
    ) -> None:
        self._directory = directory
        self.saved = Saved(directory.with_name(saved_files.NAME), saved_bytes_max)
        make_private(directory)
        self._next = first_id
        self._files = _Files(files_max)
        self.held_bytes = 0  # of all layers: the dirty bytes

    @property
    def next_id(self) -> int:
        return self._next

    def data(self, layer_id: int) -> str:
        """The path of a layer's bytes: text, since each new file needs it a few times."""
        return f"{self._directory}/{layer_id}.data"

    def log(self, layer_id: int) -> str:
        return f"{self._directory}/{layer_id}.ext"

    def path(self, layer_id: int) -> Path:
        return Path(self.data(layer_id))

    def fd(self, path: str, flags: int = 0) -> int:
        try:
            return self._files[path]
        except KeyError:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | flags, 0o600)
            self._files[path] = fd
            return fd

    def new(self, *, seen: int, size: int) -> Layer:
        """A layer without bytes of its own. Raises: OSError (ENOSPC, EMFILE, ...)."""
        layer = Layer(self, self._next, seen)
        self._next += 1
        fd = os.open(layer.data, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        self._files[layer.data] = fd
        if size:
            os.ftruncate(fd, size)
        layer.size = size
        return layer

    def empty(self, path: str) -> None:
        """Make the file at `path` a new one: what is truncated to nothing is written out by ext4 when it is closed,
        0.3 s for 512 MiB, while everybody waits (Source: auto_da_alloc in ext4(5)). Raises: OSError."""
        try:
            fd = os.open(f"{path}.new", os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        except OSError:  # no room, which truncating gives
            os.ftruncate(self.fd(path), 0)
            return
        try:
            os.rename(f"{path}.new", path)
        except OSError:
            os.close(fd)
            raise
        self._close(path)
        self._files[path] = fd

    def reopen(self, layer_id: int, seen: int) -> Layer:
        """A layer from before a restart. Raises: FileNotFoundError if its file is gone."""
        if not self.path(layer_id).exists():
            raise FileNotFoundError(self.path(layer_id))
        layer = Layer(self, layer_id, seen)
        layer.recover()
        self._next = max(self._next, layer_id + 1)
        return layer

    def discard(self, layer: Layer) -> None:
        """Its bytes are of no more use (or its file was taken over)."""
        self.held_bytes -= layer.local_bytes
        self.unlink(layer.id)

    def unlink(self, layer_id: int) -> None:
        """Remove the files of a layer, as far as there are any."""
        for path in (self.data(layer_id), self.log(layer_id)):
            self._close(path)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)

    def save_aside(self, path: Path, note: Mapping[str, object]) -> Path | None:
        """Keep a staging file that belongs to no file any more (with its log) where a person finds it."""
        for suffix in (".ext", ".data"):
            self._close(str(path.with_suffix(suffix)))
        return self.saved.keep(path, note)

    def release(self, layer: Layer) -> None:
        """Close the descriptors of a layer whose file is about to be taken over."""
        self._close(layer.data)

    def _close(self, path: str) -> None:
        if (fd := self._files.pop(path, None)) is not None:
            os.close(fd)

    def orphans(self, known: Callable[[int], bool]) -> list[Path]:
        """Staging files that no row of the journal speaks of."""
        return [
            path
            for path in self._directory.iterdir()
            if path.suffix in (".data", ".ext", ".new") and not (path.stem.isdigit() and known(int(path.stem)))
        ]

    def close(self) -> None:
        for path in list(self._files):
            self._close(path)

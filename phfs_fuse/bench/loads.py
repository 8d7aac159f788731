"""What the workloads write and read: bytes that are the same in each run, and that nothing can compress.

Owns no state. The measured part of a write costs a stamp of 8 bytes per block, no generation.
"""

from __future__ import annotations

import base64
import hashlib
import random
import struct
import subprocess
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

MIB: Final = 1 << 20
POOL_BLOCKS: Final = 16
STAMP: Final = 0xA5  # so that no block begins like a hole
HEAD_BYTES: Final = 64
GIT_SECONDS: Final = 120


@cache
def _pool(seed: int) -> list[bytearray]:
    source = random.Random(seed)
    return [bytearray(source.randbytes(MIB)) for _ in range(POOL_BLOCKS)]


def piece(seed: int, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


@dataclass(frozen=True, slots=True)
class Piece:
    """`size` bytes at `offset`, within one block."""

    offset: int
    seed: int
    size: int

    def content(self) -> bytes:
        return piece(self.seed, self.size)


@dataclass(frozen=True, slots=True)
class Load:
    """The content of a file: `size` bytes, some overwritten by `edit`, followed by the pieces of `tail`."""

    seed: int
    size: int
    edit: Piece | None = None
    tail: tuple[Piece, ...] = ()

    @property
    def full_size(self) -> int:
        return self.size + sum(one.size for one in self.tail)

    def chunks(self) -> Iterator[bytes | memoryview]:
        """In order, 1 MiB at a time. Each is valid until the next one is asked for."""
        if self.size < MIB and not self.tail:
            yield piece(self.seed, self.size)
            return
        for start in range(0, self.size, MIB):
            yield self._block(start)
        for one in self.tail:
            yield one.content()

    def _block(self, start: int) -> memoryview:
        block = _pool(self.seed)[start // MIB % POOL_BLOCKS]
        struct.pack_into("<Q", block, 0, start + STAMP)  # no two blocks are the same
        if self.edit is not None and start <= self.edit.offset < start + MIB:
            block = bytearray(block)
            at = self.edit.offset - start
            block[at : at + self.edit.size] = self.edit.content()
        return memoryview(block)[: min(MIB, self.size - start)]

    def sha256(self) -> str:
        digest = hashlib.sha256()
        for chunk in self.chunks():
            digest.update(chunk)
        return digest.hexdigest()

    def range(self, offset: int, size: int) -> bytes:
        """Of a load without edit and tail."""
        first = offset // MIB * MIB
        span = b"".join(bytes(self._block(start)) for start in range(first, offset + size, MIB))
        return span[offset - first :][:size]

    def heads_sha256(self) -> str:
        """Of the first bytes of each MiB: what a reader can take along without losing time."""
        return hashlib.sha256(b"".join(bytes(chunk[:HEAD_BYTES]) for chunk in self.chunks())).hexdigest()

    def dump(self) -> dict[str, Any]:
        """For the process that does the work; without edit and tail, which it never writes itself."""
        return {"seed": self.seed, "size": self.size}


Loads = Mapping[str, Load]


def random_places(size: int, count: int, unit: int) -> list[int]:
    """The same each time."""
    source = random.Random(count)
    return [source.randrange(size - unit) for _ in range(count)]


def small_files(count: int, size: int = 4096, folders: int = 1, root: str = "files") -> dict[str, Load]:
    """`count` files spread over `folders` folders below `root`, or all in it."""
    return {
        (f"{root}/d{number % folders:03}/f{number:05}" if folders > 1 else f"{root}/f{number:05}"): Load(
            number + 1, size
        )
        for number in range(count)
    }


def git_repository(where: Path, files: int) -> Path:
    """A bare repository with one commit."""
    source, bare = where / "source", where / "repository.git"
    for number in range(files):
        path = source / f"module{number % 20:02}" / f"file{number:04}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.encodebytes(piece(number, 3000)))
    who = ["-c", "user.name=bench", "-c", "user.email=bench@localhost"]
    for arguments in (
        ["init", "--quiet", "--initial-branch=main", str(source)],
        ["-C", str(source), "add", "."],
        [*who, "-C", str(source), "commit", "--quiet", "--message", "all", "--date", "2025-01-01T00:00:00Z"],
        ["clone", "--quiet", "--bare", str(source), str(bare)],
    ):
        subprocess.run(["git", *arguments], check=True, capture_output=True, timeout=GIT_SECONDS)
    return bare


def wheel(where: Path, files: int) -> Path:
    """A package of `files` modules, as pip installs it offline."""
    path = where / "benchpkg-1.0-py3-none-any.whl"
    info = "benchpkg-1.0.dist-info"
    entries = {f"benchpkg/part{n % 10}/module{n:04}.py": _module(n) for n in range(files)}
    entries |= {
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: benchpkg\nVersion: 1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: phfs-bench\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{name},sha256={_urlsafe_sha256(body)},{len(body)}\n" for name, body in entries.items())
    entries[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, body in entries.items():
            archive.writestr(zipfile.ZipInfo(name), body)
    return path


def _module(number: int) -> bytes:
    return b'"""Generated."""\nDATA = "' + base64.b64encode(piece(number, 3000)) + b'"\n'


def _urlsafe_sha256(body: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(body).digest()).rstrip(b"=").decode()

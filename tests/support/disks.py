"""Small file systems of their own for tests, which need root, and how to fill them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

BALLAST = ".ballast"


@contextmanager
def small_disk(directory: Path, size: int) -> Iterator[None]:
    """A file system of `size` bytes at `directory`, which is made."""
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "phfs-test", directory], check=True, timeout=20)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", directory], check=False, timeout=20)


def fill(directory: Path) -> None:
    """Take all the space that is left."""
    with open(directory / BALLAST, "ab") as ballast:
        while free := os.statvfs(ballast.fileno()).f_bavail:
            with suppress(OSError):  # somebody else was quicker
                end = ballast.tell()
                os.posix_fallocate(ballast.fileno(), end, free * os.fstatvfs(ballast.fileno()).f_frsize)
            ballast.seek(0, os.SEEK_END)


def free(directory: Path) -> None:
    """Give back what `fill` took."""
    (directory / BALLAST).unlink(missing_ok=True)

"""One process of the torture run: random operations below its own folder, each answer checked at once.

Run as `python -m tests.torture.writer FOLDER SEED STOP_FILE`; ends when STOP_FILE exists, with its model of the
folder as JSON on standard output: what each path has to be. Only this process changes the folder, so the model is
exact. No call may fail, whatever is done to the mount, but with EIO where it needs a store that is away, and with
ENOSPC while the disk of its state is full: then it had no effect, and is made again. A file whose `write`, `fsync` or
`close` said ENOSPC has any content; it is removed.
"""

from __future__ import annotations

import errno
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TypeVar

from tests.torture.content import digest

BYTES_MAX = 300_000
FILES_MAX = 60
AWAY_SECONDS = 60.0  # how long a call may need a store that is away, or space that is not there
PASSING = (errno.EIO, errno.ENOSPC)
T = TypeVar("T")


@dataclass
class Model:
    """What is in the folder, by path below it."""

    files: dict[str, bytes] = field(default_factory=dict)
    folders: set[str] = field(default_factory=lambda: {""})


def again(call: Callable[..., T], *arguments: Any) -> T:
    """The answer, once the store or the space is back."""
    end = time.monotonic() + AWAY_SECONDS
    while True:
        try:
            return call(*arguments)
        except OSError as exc:
            if exc.errno not in PASSING or time.monotonic() > end:
                raise
            time.sleep(0.2)


def entries(path: str) -> list[os.DirEntry[str]]:
    with os.scandir(path) as found:
        return list(found)


def get(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


class Writer:
    def __init__(self, root: str, seed: int) -> None:
        self.root = root
        self.random = random.Random(seed)
        self.model = Model()
        self.count = 0
        self.refused = 0
        self.operations: list[Callable[[], None]] = [
            *[self.create] * 4,
            *[self.replace] * 3,
            *[self.overwrite] * 3,
            *[self.append] * 3,
            self.truncate,
            *[self.read] * 6,
            *[self.unlink] * 2,
            *[self.rename] * 2,
            self.make_folder,
            self.rename_folder,
            self.list_all,
        ]

    # ---- what it works on

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def bytes(self, size_max: int = BYTES_MAX) -> bytes:
        """Different each time, so that a stale or mixed version cannot pass."""
        size = int(size_max ** self.random.random())
        stamp = b"%s %d " % (self.root.rpartition("/")[2].encode(), self.count)
        return (stamp + self.random.randbytes(size))[:size]

    def new_name(self) -> str:
        folder = self.random.choice(sorted(self.model.folders))
        return f"{folder}/f{self.count}".lstrip("/")

    def any_file(self) -> str | None:
        return self.random.choice(sorted(self.model.files)) if self.model.files else None

    # ---- operations: the model changes when the last call has been answered

    def create(self) -> None:
        if len(self.model.files) < FILES_MAX:
            name = self.new_name()
            self.put(name, self.path(name), os.O_CREAT | os.O_EXCL)

    def put(self, name: str, path: str, flags: int) -> None:
        data = self.bytes()
        fd = again(os.open, path, os.O_WRONLY | flags, 0o644)
        with self.written(name):
            try:
                os.write(fd, data[: len(data) // 2])
                os.write(fd, data[len(data) // 2 :])
                if self.random.random() < 0.1:
                    os.fsync(fd)
            finally:
                os.close(fd)
            self.model.files[name] = data

    @contextmanager
    def written(self, name: str) -> Iterator[None]:
        """The body writes and closes the file; where there is no space for that, the file goes."""
        try:
            yield
        except OSError as exc:
            if exc.errno != errno.ENOSPC:
                raise
            self.refused += 1
            again(os.unlink, self.path(name))
            self.model.files.pop(name, None)

    def replace(self) -> None:
        """As editors and notebooks save."""
        if (name := self.any_file()) is None:
            return
        data = self.bytes()
        beside = f".beside-{self.count}"
        with self.written(beside):
            with again(open, self.path(beside), "wb") as file:
                file.write(data)
            again(os.rename, self.path(beside), self.path(name))
            self.model.files[name] = data

    def overwrite(self) -> None:
        if (name := self.any_file()) is None or not self.model.files[name]:
            return
        old = self.model.files[name]
        offset = self.random.randrange(len(old))
        data = self.bytes(20_000)
        fd = again(os.open, self.path(name), os.O_RDWR)
        with self.written(name):
            try:
                assert again(os.pread, fd, len(old) + 1, 0) == old, f"{name}: read before writing"
                os.pwrite(fd, data, offset)
            finally:
                os.close(fd)
            self.model.files[name] = old[:offset] + data + old[offset + len(data) :]

    def append(self) -> None:
        if (name := self.any_file()) is None:
            return
        data = self.bytes(5_000)
        again(get, self.path(name))  # an append needs the last page: that write may not be made again
        with self.written(name):
            with again(open, self.path(name), "ab") as file:
                file.write(data)
            self.model.files[name] += data

    def truncate(self) -> None:
        if (name := self.any_file()) is None:
            return
        old = self.model.files[name]
        size = self.random.randrange(len(old) + 1000)
        again(os.truncate, self.path(name), size)
        self.model.files[name] = old[:size].ljust(size, b"\0")

    def read(self) -> None:
        if (name := self.any_file()) is not None:
            found = again(get, self.path(name))
            assert found == self.model.files[name], f"{name}: {describe(found, self.model.files[name])}"

    def unlink(self) -> None:
        if (name := self.any_file()) is not None:
            again(os.unlink, self.path(name))
            del self.model.files[name]

    def rename(self) -> None:
        if (name := self.any_file()) is not None:
            new = self.random.choice([self.new_name(), self.any_file() or name])
            again(os.rename, self.path(name), self.path(new))
            self.model.files[new] = self.model.files.pop(name)

    def make_folder(self) -> None:
        if len(self.model.folders) < 8:
            name = self.new_name()
            again(os.mkdir, self.path(name))
            self.model.folders.add(name)

    def rename_folder(self) -> None:
        folders = sorted(self.model.folders - {""})
        if not folders:
            return
        name = self.random.choice(folders)
        new = f"moved{self.count}"
        again(os.rename, self.path(name), self.path(new))
        model = self.model
        model.files = {moved(path, name, new): data for path, data in model.files.items()}
        model.folders = {moved(path, name, new) for path in model.folders}

    def list_all(self) -> None:
        found = set()
        todo = [""]
        for folder in todo:
            for entry in again(entries, self.path(folder)):
                path = f"{folder}/{entry.name}".lstrip("/")
                todo.append(path) if entry.is_dir() else found.add(path)
        assert found == set(self.model.files), f"listing: {found ^ set(self.model.files)}"

    def run(self, stop: str) -> int:
        """Returns the number of operations."""
        again(os.mkdir, self.root)
        while not os.path.exists(stop):
            self.count += 1
            operation = self.random.choice(self.operations)
            try:
                operation()
            except Exception as exc:
                exc.add_note(f"{operation.__name__} number {self.count} at {datetime.now(UTC).isoformat()}")
                raise
            time.sleep(self.random.random() * 0.02)
        return self.count


def moved(path: str, old: str, new: str) -> str:
    return new + path[len(old) :] if path == old or path.startswith(old + "/") else path


def describe(found: bytes, wanted: bytes) -> str:
    same = next((at for at, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b), -1)
    return f"{len(found)} bytes for {len(wanted)}, different from {same} on: {found[same:][:24]!r}"


def main() -> None:
    root, seed, stop = sys.argv[1:]
    writer = Writer(root, int(seed))
    count = writer.run(stop)
    files = {name: digest(data) for name, data in writer.model.files.items()}
    folders = sorted(writer.model.folders - {""})
    json.dump(
        {"operations": count, "refused": writer.refused, "files": files, "folders": folders},
        sys.stdout,
    )


if __name__ == "__main__":
    main()

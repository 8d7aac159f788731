"""One process of the torture run: works on files that programs on other mounts work on at the same time.

Run as `python -m tests.torture.editor FOLDER SEED STOP_FILE NAME`; ends when STOP_FILE exists, with what it did as
JSON on standard output. A file is a list of lines, each with a name of its own and a hash of all before it, so that
bytes of two versions in one file show. An edit keeps the lines that it has seen and adds one: a line whose `close`
was answered has to be in some file at the end, under whatever name. Nothing is replaced unseen.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import re
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime

from tests.torture.writer import again, get

NAMES = [f"s{number}" for number in range(5)]
LINES_MAX = 40
PADDING_MAX = 12_000
LINE = re.compile(rb"<([\w-]+) ([0-9a-f]{16}) [.]*>\n")
PASSING = {  # another mount was quicker, or what the call needs is away: it did nothing
    errno.ENOENT,
    errno.EEXIST,
    errno.ESTALE,
    errno.EIO,
    errno.ENOSPC,
}


@dataclass(frozen=True)
class Content:
    names: list[str]
    good_bytes: int  # what follows is no line that belongs here
    last: str  # hash of all lines

    def added(self, name: str, padding: int) -> tuple[bytes, str]:
        last = hashlib.sha256(f"{self.last}{name}".encode()).hexdigest()[:16]
        return b"<%s %s %s>\n" % (name.encode(), last.encode(), b"." * padding), last


def parse(data: bytes) -> Content:
    names: list[str] = []
    at, last = 0, ""
    while found := LINE.match(data, at):
        expected = hashlib.sha256(f"{last}{found[1].decode()}".encode()).hexdigest()[:16]
        if found[2].decode() != expected:
            break
        names.append(found[1].decode())
        at, last = found.end(), expected
    return Content(names, at, last)


def names_within(data: bytes) -> set[str]:
    """The lines in pieces of files, whatever lies between them."""
    return {found[1].decode() for found in LINE.finditer(data)}


class Editor:
    def __init__(self, root: str, seed: int, name: str) -> None:
        self.root = root
        self.random = random.Random(seed)
        self.name = name
        self.count = 0
        self.committed: dict[str, str] = {}  # line -> where and when
        self.done: Counter[str] = Counter()
        self.torn: list[str] = []

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def line(self, content: Content) -> tuple[str, bytes]:
        name = f"{self.name}-{self.count}"
        return name, content.added(name, int(PADDING_MAX ** self.random.random()))[0]

    def write(self, fd: int, data: bytes, at: int) -> None:
        """`data` at the end `at` of the file, closed; or the file as it was before, and an error."""
        second = os.dup(fd)  # close(2) tells what went wrong, and then there is no descriptor to mend it by
        try:
            try:
                os.pwrite(fd, data, at)
                if self.random.random() < 0.1:
                    os.fsync(fd)
            finally:
                os.close(fd)
        except OSError:
            self.done["edits refused"] += 1
            again(os.ftruncate, second, at)
            raise
        finally:
            with suppress(OSError):  # an edit that was refused says so twice
                os.close(second)

    def commit(self, name: str, file: str, at: int, data: bytes) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        self.committed[name] = f"{file} {at}+{len(data)} {now}"

    # ---- operations

    def create(self) -> None:
        file = self.random.choice(NAMES)
        fd = os.open(self.path(file), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        name, data = self.line(parse(b""))
        self.write(fd, data, 0)
        self.commit(name, file, 0, data)

    def append(self) -> None:
        file = self.random.choice(NAMES)
        fd = os.open(self.path(file), os.O_RDWR)
        try:
            content = self.read_all(fd)
        except OSError:
            os.close(fd)
            raise
        name, data = self.line(content)
        self.write(fd, data, content.good_bytes)
        self.commit(name, file, content.good_bytes, data)
        if len(content.names) > LINES_MAX:
            os.rename(self.path(file), self.path(f"full-{name}"))

    def read_all(self, fd: int) -> Content:
        return parse(os.pread(fd, os.fstat(fd).st_size, 0))

    def replace(self) -> None:
        """The file under a new name, its lines and one more under the old one; then the former goes."""
        file, aside = self.random.choice(NAMES), f"aside-{self.name}-{self.count}"
        os.rename(self.path(file), self.path(aside))
        old = get(self.path(aside))
        content = parse(old)
        name, data = self.line(content)
        fd = os.open(self.path(file), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        self.write(fd, old[: content.good_bytes] + data, 0)
        self.commit(name, f"{file} from {aside}", content.good_bytes, data)
        again(os.unlink, self.path(aside))

    def read(self) -> None:
        names = os.listdir(self.root)
        if names:
            name = self.random.choice(sorted(names))
            data = get(self.path(name))
            content = parse(data)
            rest = data[content.good_bytes :]
            if rest and b">\n" in rest:  # lines that are whole, and do not belong here
                self.torn.append(f"{name}: {len(data)} bytes, good until {content.good_bytes}: {rest[:60]!r}")

    def run(self, stop: str) -> None:
        with suppress(FileExistsError):
            again(os.mkdir, self.root)
        operations = [self.create, *[self.append] * 5, *[self.replace] * 2, *[self.read] * 3]
        while not os.path.exists(stop):
            self.count += 1
            operation = self.random.choice(operations)
            try:
                operation()
                self.done[operation.__name__] += 1
            except OSError as exc:
                if exc.errno not in PASSING:
                    exc.add_note(f"{operation.__name__} number {self.count}")
                    raise
            time.sleep(self.random.random() * 0.3)


def main() -> None:
    root, seed, stop, name = sys.argv[1:]
    editor = Editor(root, int(seed), name)
    editor.run(stop)
    json.dump(
        {
            "operations": sum(editor.done.values()),
            "refused": editor.done["edits refused"],
            "committed": editor.committed,
            "torn": editor.torn,
        },
        sys.stdout,
    )


if __name__ == "__main__":
    main()

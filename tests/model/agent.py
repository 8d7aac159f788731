"""Makes system calls below one directory, as told line by line on stdin; a program of its own, since calls may hang.

A line is a JSON list: the name of a method of `Calls` and its arguments (bytes as text in latin-1). The answer is
a JSON list too: `["ok", value]` or `["error", name of the errno]`. State: the open files, by slot.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import sys

Json = None | int | str | list["Json"] | dict[str, "Json"]
FLAGS = {
    "r": os.O_RDONLY,
    "w": os.O_WRONLY | os.O_CREAT,
    "rw": os.O_RDWR,
    "x": os.O_RDWR | os.O_CREAT | os.O_EXCL,
    "a": os.O_WRONLY | os.O_CREAT | os.O_APPEND,
    "t": os.O_RDWR | os.O_CREAT | os.O_TRUNC,
}


def counted(path: str) -> os.stat_result:
    """lstat; subdirectories are counted in the link count once the directory was listed."""
    found = os.lstat(path)
    if stat.S_ISDIR(found.st_mode):
        os.listdir(path)
        found = os.lstat(path)
    return found


class Calls:
    """All paths are relative to the working directory."""

    def __init__(self) -> None:
        self._slots: dict[int, int] = {}

    def write(self, path: str, flags: str, offset: int, data: str) -> Json:
        fd = os.open(path, FLAGS[flags], 0o644)
        try:
            return os.pwrite(fd, data.encode("latin-1"), offset)
        finally:
            os.close(fd)

    def read(self, path: str, offset: int, length: int) -> Json:
        fd = os.open(path, os.O_RDONLY)
        try:
            return os.pread(fd, length, offset).decode("latin-1")
        finally:
            os.close(fd)

    def replace(self, path: str, data: str) -> Json:
        """What a foreign client does to a file: another version, with the attributes of one without metadata."""
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(".foreign", "xb") as file:
            file.write(data.encode("latin-1"))
        os.chmod(".foreign", 0o644)
        os.rename(".foreign", path)
        return None

    def truncate(self, path: str, size: int) -> Json:
        return os.truncate(path, size)

    def rename(self, source: str, target: str) -> Json:
        return os.rename(source, target)

    def mkdir(self, path: str) -> Json:
        return os.mkdir(path, 0o755)

    def rmdir(self, path: str) -> Json:
        return os.rmdir(path)

    def unlink(self, path: str) -> Json:
        return os.unlink(path)

    def symlink(self, target: str, path: str) -> Json:
        return os.symlink(target, path)

    def readlink(self, path: str) -> Json:
        return os.readlink(path)

    def chmod(self, path: str, mode: int) -> Json:
        return os.chmod(path, mode)

    def utime(self, path: str, seconds: int) -> Json:
        os.utime(path, (seconds, seconds))
        return os.stat(path).st_mtime_ns

    def listdir(self, path: str) -> Json:
        return sorted(os.listdir(path))  # type: ignore[return-value]

    def stat(self, path: str) -> Json:
        found = counted(path)
        size = 0 if stat.S_ISDIR(found.st_mode) else found.st_size
        return [oct(found.st_mode), found.st_nlink, found.st_uid, found.st_gid, size]

    def open(self, slot: int, path: str, flags: str) -> Json:
        """Replaces what the slot held."""
        self.close(slot)
        self._slots[slot] = os.open(path, FLAGS[flags], 0o644)
        return None

    def close(self, slot: int) -> Json:
        if slot in self._slots:
            os.close(self._slots.pop(slot))
        return None

    def close_all(self) -> Json:
        for slot in list(self._slots):
            self.close(slot)
        return None

    def _fd(self, slot: int) -> int:
        return self._slots.get(slot, 99_999)  # never open: EBADF

    def fwrite(self, slot: int, offset: int, data: str) -> Json:
        return os.pwrite(self._fd(slot), data.encode("latin-1"), offset)

    def fread(self, slot: int, offset: int, length: int) -> Json:
        return os.pread(self._fd(slot), length, offset).decode("latin-1")

    def ftruncate(self, slot: int, size: int) -> Json:
        return os.ftruncate(self._fd(slot), size)

    def fsync(self, slot: int) -> Json:
        return os.fsync(self._fd(slot))

    def fstat(self, slot: int) -> Json:
        found = os.fstat(self._fd(slot))
        size = 0 if stat.S_ISDIR(found.st_mode) else found.st_size
        return [oct(found.st_mode), found.st_nlink, size]

    def tree(self) -> Json:
        """Path -> mode, owner, link count, size, and the content's hash or the link's target."""
        found: dict[str, Json] = {}
        for folder, folders, files in os.walk("."):
            for name in sorted(folders + files):
                path = os.path.normpath(os.path.join(folder, name))
                found[path] = [self.stat(path), self._content(path)]
        return found

    def _content(self, path: str) -> str:
        mode = os.lstat(path).st_mode
        if stat.S_ISLNK(mode):
            return os.readlink(path)
        if not stat.S_ISREG(mode):
            return ""
        with open(path, "rb") as file:
            return hashlib.sha256(file.read()).hexdigest()


def answer(calls: Calls, line: str) -> Json:
    name, *arguments = json.loads(line)
    try:
        return ["ok", getattr(calls, name)(*arguments)]
    except OSError as exc:
        return ["error", errno.errorcode[exc.errno or 0]]


def main() -> None:
    os.umask(0o022)
    os.chdir(sys.argv[1])
    calls = Calls()
    for line in sys.stdin:
        print(json.dumps(answer(calls, line)), flush=True)


if __name__ == "__main__":
    main()

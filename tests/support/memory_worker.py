"""A worker that serves four files without a store: for tests of the keeper and of the session.

    python -m tests.support.memory_worker [FAULT...] --config FILE --fd N [--resume]

`text` always says the same, `pid` is the pid of the worker, a read of `hang` is answered after a resume only, and
`data` keeps what is written to it in the state directory. There `requests` gets a line per request, and `keeper-pid`,
`drained` and `busy` tell what happened.
"""

from __future__ import annotations

import argparse
import errno
import os
import stat
import sys
from functools import partial
from pathlib import Path

import pyfuse3
import trio

from phfs_fuse.config.model import MountConfig
from phfs_fuse.config.resolve import load_config
from phfs_fuse.errors import MountpointError
from phfs_fuse.fuse.session import Session
from phfs_fuse.host import logs
from phfs_fuse.worker.keeper_link import KeeperLink

NAMES = {1: b"", 2: b"text", 3: b"pid", 4: b"hang", 5: b"data"}
SLOW_SECONDS = 2.0
TEXT = b"the same text from every worker\n"


class MemoryOps(pyfuse3.Operations):
    enable_writeback_cache = True

    def __init__(self, config: MountConfig, *, resumed: bool) -> None:
        super().__init__()
        self._config, self._resumed = config, resumed
        state = config.writeback.directory
        self._data = os.open(state / "data", os.O_RDWR | os.O_CREAT, 0o600)
        self._journal = os.open(state / "requests", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def _note(self, *words: object) -> None:
        os.write(self._journal, " ".join(map(str, words)).encode() + b"\n")

    def _size(self, ino: int) -> int:
        return os.fstat(self._data).st_size if ino == 5 else len(self._bytes(ino))

    def _bytes(self, ino: int) -> bytes:
        return b"%d\n" % os.getpid() if ino == 3 else TEXT if ino in (2, 4) else b""

    def _entry(self, ino: int) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = pyfuse3.InodeT(ino)
        entry.st_mode = pyfuse3.ModeT(stat.S_IFDIR | 0o777 if ino == 1 else stat.S_IFREG | 0o666)
        entry.st_nlink, entry.st_size = 1, self._size(ino)
        entry.st_uid, entry.st_gid = self._config.tree.uid, self._config.tree.gid
        entry.entry_timeout = entry.attr_timeout = 0
        return entry

    async def getattr(self, inode: int, ctx: object) -> pyfuse3.EntryAttributes:
        return self._entry(inode)

    async def setattr(
        self,
        inode: int,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: object,
        ctx: object,
    ) -> pyfuse3.EntryAttributes:
        if fields.update_size:
            os.ftruncate(self._data, attr.st_size)
        return self._entry(inode)

    async def lookup(self, parent_inode: int, name: bytes, ctx: object) -> pyfuse3.EntryAttributes:
        for ino, known in NAMES.items():
            if known and known == name:
                return self._entry(ino)
        raise pyfuse3.FUSEError(errno.ENOENT)

    async def opendir(self, inode: int, ctx: object) -> int:
        return inode

    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        for ino, name in NAMES.items():
            if name and ino > start_id and not pyfuse3.readdir_reply(token, name, self._entry(ino), ino):
                return

    async def open(self, inode: int, flags: int, ctx: object) -> pyfuse3.FileInfo:
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(inode), direct_io=inode in (3, 4))

    async def read(self, fh: int, off: int, size: int) -> bytes:
        self._note("read", NAMES[fh].decode(), off, size)
        if fh == 4 and not self._resumed:
            await trio.sleep_forever()
        return os.pread(self._data, size, off) if fh == 5 else self._bytes(fh)[off : off + size]

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        self._note("write", NAMES[fh].decode(), off, len(buf))
        return os.pwrite(self._data, buf, off)

    async def flush(self, fh: int) -> None: ...

    async def release(self, fh: int) -> None: ...

    async def getxattr(self, inode: int, name: bytes, ctx: object) -> bytes:
        raise pyfuse3.FUSEError(errno.ENOSYS)

    async def statfs(self, ctx: object) -> pyfuse3.StatvfsData:
        return pyfuse3.StatvfsData()


class MemoryWorker:
    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._config = load_config(options.config.read_text())
        logs.setup(self._config.log_level, self._config.log_format)
        self._note("keeper-pid", str(os.getppid()))
        self._drains = 0
        self._ended = False
        self._asked = trio.Event()
        self._root = trio.CancelScope()

    async def run(self) -> int:
        link = KeeperLink(self._options.fd)
        if self._options.slow_check:
            await trio.sleep(SLOW_SECONDS)
        if self._options.fail_check:
            await link.failed("s3://bucket/: there is no such bucket", 3)
            return 3
        if self._options.standby:
            if self._options.no_takeover:
                await link.failed("the state is of a newer format", 5)
                return 5
            await link.standby()
        resumed = self._options.resume
        ops = MemoryOps(self._config, resumed=resumed)
        session = Session(
            ops,
            await link.receive_descriptor(),
            resume=resumed,
            on_statfs=lambda ino: None,
            on_fallocate=lambda end: errno.EOPNOTSUPP,
        )
        if self._options.no_serve or (self._options.no_resume and resumed):
            return 7
        with self._root:
            async with trio.open_nursery() as nursery:
                hear = partial(link.run, on_drain=self._on_drain, on_handover=session.stop)
                nursery.start_soon(partial(hear, on_gone=self._root.cancel))
                nursery.start_soon(self._serve, session)
                await session.established.wait()
                await link.ready()
                await self._asked.wait()
                self._note("drained", str(self._drains))
                await self._unmount(link, session)
        session.close()
        return 0 if self._ended else 1

    async def _serve(self, session: Session) -> None:
        await session.serve()
        self._ended = True
        self._root.cancel()

    async def _unmount(self, link: KeeperLink, session: Session) -> None:
        try:
            await link.unmount(lazy=False)
        except MountpointError as exc:
            self._note("busy", str(exc))
            await link.unmount(lazy=True)
            if self._options.impatient:
                session.stop()

    def _on_drain(self, now: bool) -> None:
        self._drains += 1
        if now or not self._options.never_drained:
            self._asked.set()

    def _note(self, name: str, text: str) -> None:
        (self._config.writeback.directory / name).write_text(text)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--standby", action="store_true")
    for fault in (
        "--slow-check",
        "--fail-check",
        "--no-serve",
        "--no-resume",
        "--never-drained",
        "--impatient",
        "--no-takeover",
    ):
        parser.add_argument(fault, action="store_true")
    return trio.run(MemoryWorker(parser.parse_args()).run)


if __name__ == "__main__":
    sys.exit(main())

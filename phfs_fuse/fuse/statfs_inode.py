"""Two of the kernel's requests of which pyfuse3 passes on too little: statfs, and fallocate. Owns no state.

libfuse knows which inode statfs is asked for, pyfuse3 drops it; pyfuse3 has no handler for fallocate, so that one of
any size is answered alike. pyfuse3 gives libfuse a table of its handlers when it makes the session. `telling` puts a
step in between there, for two entries of that table: note the inode and go on as ever; answer fallocate.

The step reaches the call of libfuse where the dynamic linker does, in the table of addresses of pyfuse3's shared
object. Source: ELF-64 object file format; fuse_lowlevel.h of libfuse 3, whose `struct fuse_lowlevel_ops` is part of
its ABI.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

log = logging.getLogger(__name__)

STATFS: Final = 24  # which of the pointers in struct fuse_lowlevel_ops
FALLOCATE: Final = 40
RELA: Final = 4  # Source: ELF, sh_type
_HEADER: Final = struct.Struct("<4sBB58x")
_SECTION: Final = struct.Struct("<IIQQQQIIQQ")
_RELOCATION: Final = struct.Struct("<QQq")
_NEW: Final = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
_HANDLER: Final = (None, ctypes.c_void_p, ctypes.c_uint64)
_FALLOCATE: Final = (*_HANDLER, ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
Refuse = Callable[[int], int]
"""The errno that answers a fallocate which ends at this byte."""
_kept: Final[list[Any]] = []  # functions that libfuse calls as long as the process lives


@contextmanager
def telling(library: Path, tell: Callable[[int], None], refuse: Refuse | None = None) -> Iterator[None]:
    """`tell` hears the inode before each statfs handler of a session that `library` (pyfuse3) makes meanwhile, and
    `refuse` is asked how to answer fallocate.

    Where this cannot be done a warning says so, and neither is called.
    """
    try:
        slot = _base(library) + _slot(library, b"fuse_session_new")
        fuse = ctypes.CDLL(str(library))
        new, reply = fuse.fuse_session_new, fuse.fuse_reply_err
    except (OSError, ValueError, AttributeError, struct.error) as exc:
        log.warning("df shows for every folder what it shows for the mount: %s", exc)
        yield
        return
    reply.argtypes = (ctypes.c_void_p, ctypes.c_int)
    before = _put(slot, _step(_pointer(new), tell, refuse and partial(_refused, reply, refuse)))
    try:
        yield
    finally:
        _put(slot, before)


def _refused(
    reply: Callable[[int, int], int],
    refuse: Refuse,
    request: int,
    ino: int,
    mode: int,
    offset: int,
    size: int,
    fi: int,
) -> None:
    reply(request, refuse(offset + size))


def _step(new: int, tell: Callable[[int], None], fallocate: Callable[..., None] | None = None) -> int:
    """In place of fuse_session_new."""
    call = ctypes.PYFUNCTYPE(*_NEW)(new)

    def replaced(args: int, handlers: int, size: int, data: int) -> Any:
        if size >= (STATFS + 1) * 8:
            entry = ctypes.c_void_p.from_address(handlers + STATFS * 8)
            handler = ctypes.PYFUNCTYPE(*_HANDLER)(entry.value or 0)

            def statfs(request: int, ino: int) -> None:
                tell(ino)
                handler(request, ino)

            entry.value = _pointer(ctypes.CFUNCTYPE(*_HANDLER)(statfs))
        if fallocate is not None and size >= (FALLOCATE + 1) * 8:
            entry = ctypes.c_void_p.from_address(handlers + FALLOCATE * 8)
            entry.value = _pointer(ctypes.CFUNCTYPE(*_FALLOCATE)(fallocate))
        return call(args, handlers, size, data)

    return _pointer(ctypes.CFUNCTYPE(*_NEW)(replaced))


def _pointer(function: Any) -> int:
    """The address of a function, which stays."""
    _kept.append(function)
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def _put(slot: int, address: int) -> int:
    """Returns what was there. Where the table is read-only since it was filled in (RELRO), it is again."""
    page = slot & -mmap.PAGESIZE
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    was_writable = any(start <= slot < end and "w" in mode for start, end, mode, _, _ in _mappings())
    if not was_writable and protect(page, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE):
        raise OSError(ctypes.get_errno(), "mprotect")
    entry = ctypes.c_uint64.from_address(slot)
    before, entry.value = entry.value, address
    if not was_writable:
        protect(page, mmap.PAGESIZE, mmap.PROT_READ)
    return before


def _mappings() -> Iterator[tuple[int, int, str, int, str]]:
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, mode, offset, _, _, *path = line.split(None, 5)
        start, _, end = addresses.partition("-")
        yield int(start, 16), int(end, 16), mode, int(offset, 16), path[0] if path else ""


def _base(library: Path) -> int:
    """Where it is loaded. Raises: ValueError."""
    path = str(library.resolve())
    for start, _, _, offset, name in _mappings():
        if name == path and offset == 0:
            return start
    raise ValueError(f"{library} is not loaded")


def _slot(library: Path, symbol: bytes) -> int:
    """Where, from its base, it keeps the address of a function of another library. Raises: ValueError."""
    raw = library.read_bytes()
    magic, width, order = _HEADER.unpack_from(raw)
    if (magic, width, order) != (b"\x7fELF", 2, 1):
        raise ValueError(f"{library} is no 64-bit little-endian ELF file")
    (at,), (count,) = struct.unpack_from("<Q", raw, 0x28), struct.unpack_from("<H", raw, 0x3C)
    sections = [_SECTION.unpack_from(raw, at + i * _SECTION.size) for i in range(count)]
    for _, kind, _, _, start, size, symbols, *_ in sections:
        if kind != RELA:
            continue
        table, strings = sections[symbols][4], sections[sections[symbols][6]][4]
        for place, info, _ in _RELOCATION.iter_unpack(raw[start : start + size]):
            name = strings + struct.unpack_from("<I", raw, table + (info >> 32) * 24)[0]
            if raw.startswith(symbol + b"\0", name):
                return int(place)
    raise ValueError(f"{library} does not call {symbol.decode()}")

"""Where pyfuse3 keeps the address of libfuse's function, read from its shared object."""

from __future__ import annotations

import ctypes
from functools import partial
from pathlib import Path

import pyfuse3
import pytest

from phfs_fuse.fuse import statfs_inode

LIBRARY = Path(pyfuse3.__file__)


def test_the_table_of_pyfuse3_is_found_and_changed_and_put_back() -> None:
    slot = statfs_inode._base(LIBRARY) + statfs_inode._slot(LIBRARY, b"fuse_session_new")
    entry = ctypes.c_uint64.from_address(slot)
    before = entry.value
    with statfs_inode.telling(LIBRARY, lambda ino: None):
        assert entry.value != before
    assert entry.value == before


def test_a_step_goes_before_the_handler_and_takes_its_arguments_along() -> None:
    heard: list[tuple[str, int, int]] = []
    handler = ctypes.CFUNCTYPE(*statfs_inode._HANDLER)(lambda request, ino: heard.append(("handler", request, ino)))
    handlers = (ctypes.c_void_p * 40)()
    handlers[statfs_inode.STATFS] = ctypes.cast(handler, ctypes.c_void_p).value
    others = list(handlers[: statfs_inode.STATFS]) + list(handlers[statfs_inode.STATFS + 1 :])
    made: list[int] = []

    def session_new(args: int, ops: int, size: int, data: int) -> int:
        made.append(size)
        statfs = ctypes.c_void_p.from_address(ops + statfs_inode.STATFS * 8).value
        ctypes.CFUNCTYPE(*statfs_inode._HANDLER)(statfs or 0)(77, 1 << 40)
        return 1234

    new = ctypes.CFUNCTYPE(*statfs_inode._NEW)(session_new)
    step = statfs_inode._step(
        ctypes.cast(new, ctypes.c_void_p).value or 0, lambda ino: heard.append(("told", 0, ino))
    )
    session = ctypes.CFUNCTYPE(*statfs_inode._NEW)(step)(None, handlers, ctypes.sizeof(handlers), None)
    assert (session, made) == (1234, [320])
    assert heard == [("told", 0, 1 << 40), ("handler", 77, 1 << 40)]
    assert others == list(handlers[: statfs_inode.STATFS]) + list(handlers[statfs_inode.STATFS + 1 :])


def test_fallocate_is_answered_by_the_byte_at_which_it_ends() -> None:
    answers: list[tuple[int, int]] = []
    handlers = (ctypes.c_void_p * 41)()
    statfs = ctypes.CFUNCTYPE(*statfs_inode._HANDLER)(lambda request, ino: None)
    handlers[statfs_inode.STATFS] = ctypes.cast(statfs, ctypes.c_void_p).value

    def session_new(args: int, ops: int, size: int, data: int) -> int:
        fallocate = ctypes.c_void_p.from_address(ops + statfs_inode.FALLOCATE * 8).value
        ctypes.CFUNCTYPE(*statfs_inode._FALLOCATE)(fallocate or 0)(77, 5, 0, 1 << 40, 3, None)
        return 1234

    def reply(request: int, code: int) -> int:
        answers.append((request, code))
        return 0

    new = ctypes.CFUNCTYPE(*statfs_inode._NEW)(session_new)
    refused = partial(statfs_inode._refused, reply, lambda end: end - (1 << 40))
    step = statfs_inode._step(ctypes.cast(new, ctypes.c_void_p).value or 0, lambda ino: None, refused)
    assert ctypes.CFUNCTYPE(*statfs_inode._NEW)(step)(None, handlers, ctypes.sizeof(handlers), None) == 1234
    assert answers == [(77, 3)]


@pytest.mark.parametrize(
    "content", [b"", b"#!/bin/sh", b"\x7fELF\x01\x01" + bytes(100), b"\x7fELF\x02\x01" + bytes(100)]
)
def test_without_it_a_warning_and_no_harm(tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes) -> None:
    library = tmp_path / "lib.so"
    library.write_bytes(content)
    with pytest.raises((ValueError, statfs_inode.struct.error)):
        statfs_inode._slot(library, b"fuse_session_new")
    with statfs_inode.telling(library, lambda ino: None):
        pass
    assert "df shows for every folder what it shows for the mount" in caplog.text
    caplog.clear()

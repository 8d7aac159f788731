"""The thread that tells the kernel, with a pipe for the kernel: what is written, answered, and held meanwhile."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys

from phfs_fuse.host.processes import readable
from phfs_fuse.keeper.kernel_notify import FUSE_EXPIRE_ONLY, KernelNotifier, can_expire

SECONDS = 30.0


def test_names_are_told_and_then_answered() -> None:
    kernel, device = os.pipe()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    expiry = KernelNotifier(device)
    with ours, theirs:
        for number in range(3):
            expiry.expire([(7, b"name"), (8, b"other")], ours, b"answer %d" % number)
            assert readable(expiry.fileno(), SECONDS)
            expiry.answer()
            theirs.settimeout(SECONDS)
            assert theirs.recv(100) == b"answer %d" % number
        told = os.read(kernel, 4096)
    assert (told.count(b"name\0"), told.count(b"other\0")) == (3, 3)


def test_names_are_dropped() -> None:
    kernel, device = os.pipe()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    expiry = KernelNotifier(device)
    with ours, theirs:
        for drop in (True, False):
            expiry.expire([(7, b"name")], ours, b"answer", drop=drop)
            assert readable(expiry.fileno(), SECONDS)
            expiry.answer()
            told = os.read(kernel, 4096)
            (flags,) = struct.unpack_from("<I", told, 28)
            assert flags == (FUSE_EXPIRE_ONLY if can_expire() and not drop else 0)


def test_one_that_waits_holds_nothing_but_the_connection() -> None:
    """In a process of its own: the kernel (a full pipe) does not take the notification."""
    code = """if True:
        import os, sys, time
        from pathlib import Path
        from phfs_fuse.keeper.kernel_notify import KernelNotifier
        kernel, device = os.pipe()
        os.set_blocking(device, False)
        try:
            while True:
                os.write(device, bytes(4096))
        except BlockingIOError:
            os.set_blocking(device, True)
        lock = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
        expiry = KernelNotifier(device)
        expiry.expire([(7, b"name")], None, b"")
        (thread,) = set(os.listdir("/proc/self/task")) - {str(os.getpid())}
        deadline = time.monotonic() + 30
        while len(os.listdir(f"/proc/self/task/{thread}/fd")) != 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        held = [os.readlink(f"/proc/self/task/{thread}/fd/{fd}") for fd in os.listdir(f"/proc/self/task/{thread}/fd")]
        assert sys.argv[1] not in held, held
        assert os.readlink(f"/proc/self/fd/{lock}") == sys.argv[1]
        print(len(held), flush=True)
        os._exit(0)
    """
    lock = f"/tmp/phfs-expiry-{os.getpid()}"
    try:
        done = subprocess.run([sys.executable, "-c", code, lock], capture_output=True, text=True, timeout=SECONDS * 2)
    finally:
        if os.path.exists(lock):
            os.unlink(lock)
    assert (done.stdout, done.stderr) == ("2\n", "")

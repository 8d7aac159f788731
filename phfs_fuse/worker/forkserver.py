"""Keepers and workers as forks of one process that has loaded everything: they start at once and share its memory.

For who has many mounts on one machine. `python -m phfs_fuse.worker.forkserver --fd N` answers on a SOCK_SEQPACKET
socket pair:

    {}                                                                  {"pid": ...}, once all is loaded
    {"config": ..., "holder": ..., "environ": {...}} + descriptors of report pipe and log         {"pid": ...}

It starts the keeper of `config` as `python -m phfs_fuse.keeper` does it, and ends with the other end of the socket;
what it has started goes on. State: the socket. One thread, and none may have been started before a fork.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from typing import Any, Final, NoReturn

from phfs_fuse.config import json_text
from phfs_fuse.host.processes import ended
from phfs_fuse.keeper import keeper
from phfs_fuse.store import warm
from phfs_fuse.worker import main as mount

PACKET_BYTES_MAX: Final = 1 << 20  # an environment has at most some 100 KiB
CLOSED_MAX: Final = 1 << 20


class Fork:
    """A child made by fork(2), with what the keeper uses of `subprocess.Popen`."""

    def __init__(self, run: Callable[[], int]) -> None:
        """`run` is what the child does; its result is the exit code."""
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            _run_and_exit(run)

    def kill(self) -> None:
        if self.returncode is None:
            os.kill(self.pid, signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        """Raises: TimeoutError."""
        if self.returncode is None:
            if not ended(self.pid, timeout):
                raise TimeoutError
            _pid, status = os.waitpid(self.pid, 0)
            self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


def _run_and_exit(run: Callable[[], int]) -> NoReturn:
    """Never returns into the frames of the parent: what they hold is closed there."""
    code = 1
    try:
        code = run()
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def forked_worker(arguments: Sequence[str], fds: Sequence[int]) -> Fork:
    """The worker of a forked keeper. Raises: OSError."""

    def run() -> int:
        os.setsid()
        _be_fresh(fds)
        _call_oneself("phfs-worker")
        return mount.main(arguments)

    return Fork(run)


def _be_fresh(fds: Sequence[int]) -> None:
    """As after an exec: signals as at first, no descriptors but the standard ones and `fds`."""
    signal.set_wakeup_fd(-1)
    for number in (*keeper.SIGNALS, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    last = 2
    for fd in sorted(fds):
        os.closerange(last + 1, fd)
        last = fd
    os.closerange(last + 1, CLOSED_MAX)


def _call_oneself(name: str) -> None:
    """For ps and top, which else show the spawner's name. Source: proc_pid_comm(5)."""
    with contextlib.suppress(OSError), open("/proc/self/comm", "w", encoding="ascii") as comm:
        comm.write(name)


def _keep(request: dict[str, Any], report_fd: int, log_fd: int) -> int:
    os.setsid()
    _be_fresh((report_fd, log_fd))
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(log_fd, 1)
    os.dup2(log_fd, 2)
    os.close(log_fd)
    _call_oneself("phfs-keeper")
    os.environ.clear()
    os.environ.update(request["environ"])
    flags = [f"--holder={request['holder']}"] if request["holder"] else []
    return keeper.main([f"--config={request['config']}", f"--report-fd={report_fd}", *flags], launch=forked_worker)


def serve(channel: socket.socket) -> None:
    """Fork for each request, until the other end is closed."""
    while True:
        packet, fds, _flags, _address = socket.recv_fds(channel, PACKET_BYTES_MAX, 2, socket.MSG_CMSG_CLOEXEC)
        if not packet:
            return
        if not (request := json_text.parse(packet)):
            channel.send(json.dumps({"pid": os.getpid()}).encode())
            continue
        report_fd, log_fd = fds
        try:
            child = Fork(lambda: _keep(request, report_fd, log_fd))  # noqa: B023 - runs before the next turn
            answer: dict[str, object] = {"pid": child.pid}
        except OSError as exc:
            answer = {"error": str(exc)}
        os.close(report_fd)
        os.close(log_fd)
        channel.send(json.dumps(answer).encode())


def _main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m phfs_fuse.worker.forkserver")
    parser.add_argument("--fd", type=int, required=True)
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the keepers
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warm()
    gc.collect()
    gc.freeze()
    with socket.socket(fileno=options.fd) as channel:
        channel.set_inheritable(False)
        serve(channel)
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))

"""The process that holds a mount while its server, the worker, may die or be replaced.

State: the /dev/fuse descriptor, the worker's process and the socket to it, the record in the registry.

The worker first checks the store, then the keeper mounts and hands the descriptor over: a mount that cannot
work never appears. A worker that dies is started again on the same connection, and open files go on. When
that does not help the keeper gives up and ends; the mount point then stays broken (ENOTCONN), never empty.
SIGTERM and SIGINT upload and unmount, a second one unmounts without waiting for uploads. SIGHUP upgrades: a worker
of the version that is installed now takes over (at a terminal, whose end it means, it unmounts).

With `--holder` another process holds the connection too (`holding`). Then the mount also outlives its keeper: the
next one adopts the connection. SIGUSR1 makes room for it: the worker answers what is in work, keeper and worker end,
the mount stays and its requests wait.

Nothing here touches a file of the mount: the call would wait for a worker that waits for the keeper.
Standard library only, no event loop, one thread (and that of `expiry`, which may have to wait for the worker).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, Protocol

from phfs_fuse import fusemount, logs, messages, registry
from phfs_fuse.config import MountConfig
from phfs_fuse.errors import LocalStateError, MountpointError, NotDrained
from phfs_fuse.expiry import Expiry
from phfs_fuse.fusemount import UNMOUNT_SECONDS
from phfs_fuse.held import HeldConnection
from phfs_fuse.holding import HolderLink
from phfs_fuse.localstate import StateLock, keeper_lock
from phfs_fuse.messages import Kind, Message
from phfs_fuse.mountpoint import require_nothing_mounted
from phfs_fuse.registry import MountRecord

log = logging.getLogger("phfs_fuse.keeper")

RESTART_DELAYS: Final = (0.0, 0.2, 1.0, 3.0, 8.0)  # seconds before the n-th restart within RESTARTS_SECONDS
RESTARTS_SECONDS: Final = 60.0  # with one more death in this time than there are delays the keeper gives up
STANDBY_SECONDS: Final = 60.0  # for a worker to load and look at the state, before it may take over
HOLDER_SECONDS: Final = 1.0  # between two tries to reach the holder
END_SECONDS: Final = 5.0  # for a child that has nothing left to do
END_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SIGNALS: Final = (*END_SIGNALS, signal.SIGUSR1)


class Process(Protocol):
    """What is used of a child: `subprocess.Popen`, or a fork."""

    @property
    def pid(self) -> int: ...

    def kill(self) -> None: ...

    def wait(self, timeout: float | None = None) -> int: ...


Launch = Callable[[Sequence[str], Sequence[int]], Process]  # arguments and descriptors of a worker -> its process


@dataclass(frozen=True, slots=True)
class Worker:
    process: Process
    link: socket.socket
    pidfd: int


class Keeper:
    """One mount from its start to its end. `report(exit_code, reason)` is called once: 0 when it is ready."""

    def __init__(
        self,
        config: MountConfig,
        config_path: Path,
        command: Sequence[str],
        report: Callable[[int, str], None],
        holder: Path | None = None,
        launch: Launch | None = None,
    ) -> None:
        self._config = config
        self._arguments = ["--config", str(config_path)]
        self._execute: Launch = partial(_execute, command)
        self._launch = launch or self._execute
        self._report = report
        self._selector = selectors.DefaultSelector()
        self._holder: HolderLink | None = None  # that is watched
        self._held = None if holder is None else HeldConnection(holder, config.kernel.mountpoint)
        self._device: int | None = None
        self._expiry: Expiry | None = None
        self._worker: Worker | None = None
        self._standby: Worker | None = None  # waits to take over
        self._unmounting: subprocess.Popen[bytes] | None = None
        self._due: dict[Callable[[], None], float] = {}
        self._restarts: deque[float] = deque()
        self._serving = False  # this worker has said READY
        self._was_ready = False  # one of them has, of this keeper or of one before
        self._announced = False  # the mount is known to others
        self._releasing = False  # the mount is left to the next keeper
        self._failure = Message(kind=Kind.FAILED)
        self._refusal = Message(kind=Kind.REFUSED)  # what the one on standby says last
        self._drain: Message | None = None  # what was asked, of this worker and of those after it
        self._detached = False  # unmounted, though perhaps still in use
        self._exit_code: int | None = None

    def run(self) -> int:
        """Keep the mount until its end; returns the exit code."""
        with self._hearing_signals():
            if self._held is not None and (device := self._held.adopt()) is not None:
                self._device, self._was_ready = device, True
            self._start_worker()
            while self._exit_code is None:
                self._step()
        self._end_standby()
        self._end_worker()
        return self._exit_code

    def _step(self) -> None:
        now = time.monotonic()
        for action in [action for action, due in self._due.items() if due <= now]:
            del self._due[action]
            action()
        if self._exit_code is not None:
            return
        wait = min((due - time.monotonic() for due in self._due.values()), default=None)
        # One event at a time: what it does may close the descriptor of the next.
        for key, _events in self._selector.select(wait)[:1]:
            key.data()

    @contextlib.contextmanager
    def _hearing_signals(self) -> Iterator[None]:
        heard, wakeup = socket.socketpair()
        with heard, wakeup:
            wakeup.setblocking(False)
            signal.set_wakeup_fd(wakeup.fileno())
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup wants it
                    signal.signal(number, lambda _number, _frame: None)
            self._selector.register(heard, selectors.EVENT_READ, lambda: self._on_signal(heard.recv(1)))
            yield
            signal.set_wakeup_fd(-1)

    def _on_signal(self, number: bytes) -> None:
        if number[0] == signal.SIGUSR1:
            self._release()
        elif number[0] not in END_SIGNALS:
            return
        elif not self._announced:
            self._interrupt()
        elif number[0] == signal.SIGHUP and not os.isatty(sys.stderr.fileno()):
            self._start_upgrade()
        else:
            self._ask_for_drain()

    def _interrupt(self) -> None:
        """End before the mount is ready: one that was made goes, one that was adopted stays with the holder."""
        reason = "interrupted before it was ready"
        if self._was_ready:
            self._finish(1, reason)
        elif self._worker is not None:
            self._failure = Message(kind=Kind.FAILED, reason=reason, exit_code=1)
            self._worker.process.kill()  # it has served nothing

    def _ask_for_drain(self) -> None:
        self._drain = Message(kind=Kind.DRAIN, now=self._drain is not None)
        if self._serving:
            self._send(self._drain)

    # --- the worker

    def _start_worker(self) -> None:
        try:
            launch = self._launch if self._expiry is None else self._execute  # no fork beside another thread
            self._worker = self._spawn(["--resume"] if self._was_ready else [], launch)
        except OSError as exc:  # no memory, or the program is being replaced
            self._failure = Message(kind=Kind.FAILED, reason=f"no worker: {exc}", exit_code=1)
            self._without_worker(1)
            return
        self._listen(self._worker)

    def _listen(self, worker: Worker) -> None:
        """Hear `worker` as the one that serves."""
        self._selector.register(worker.link, selectors.EVENT_READ, self._on_packet)
        self._selector.register(worker.pidfd, selectors.EVENT_READ, self._on_worker_end)

    def _spawn(self, flags: Sequence[str], launch: Launch) -> Worker:
        """Raises: OSError."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        with theirs:
            try:
                process = launch([*self._arguments, "--fd", str(theirs.fileno()), *flags], [theirs.fileno()])
            except OSError:
                ours.close()
                raise
        return Worker(process, ours, os.pidfd_open(process.pid))

    def _end_worker(self) -> None:
        if self._worker is None:
            return
        self._worker.link.close()
        try:
            self._worker.process.wait(END_SECONDS)
        except (subprocess.TimeoutExpired, TimeoutError):
            self._worker.process.kill()

    def _on_packet(self) -> None:
        """Handle one message, or stop listening at the end of file: the end of the process is seen apart."""
        assert self._worker is not None
        handlers: Mapping[Kind, Callable[[Message], None]] = {
            Kind.CHECKED: self._on_checked,
            Kind.FAILED: self._on_failed,
            Kind.READY: self._on_ready,
            Kind.UNMOUNT: self._on_unmount,
            Kind.EXPIRE: self._on_expire,
            Kind.UPGRADE: lambda _message: self._start_upgrade(),
        }
        if not (packet := self._receive(self._worker.link)):
            self._selector.unregister(self._worker.link)
            return
        try:
            message = messages.decode(packet)
            handler = handlers[message.kind]
        except (ValueError, TypeError, KeyError):  # from a newer worker: not a reason to lose the mount
            log.error("not understood, ignored: %r", packet)
        else:
            handler(message)

    def _receive(self, link: socket.socket) -> bytes:
        try:
            return link.recv(messages.PACKET_BYTES_MAX)
        except (ConnectionError, BlockingIOError):
            return b""

    def _send(self, message: Message, fds: Sequence[int] = ()) -> None:
        if self._worker is not None:
            with contextlib.suppress(OSError):  # its end is seen apart
                socket.send_fds(self._worker.link, [messages.encode(message)], fds)

    def _on_checked(self, _message: Message) -> None:
        if self._device is None:
            try:
                if self._held is not None:  # nobody has looked at the mount point
                    require_nothing_mounted(self._config.kernel.mountpoint)
                self._device = fusemount.mount(self._config)
            except MountpointError as exc:
                self._finish(exc.exit_code, str(exc))
                return
        # Who tells the kernel to look again may have to wait for a program, which may wait for the worker. Where the
        # mount is to outlive this process, that would be one that cannot be killed, in a container that cannot end.
        self._send(Message(kind=Kind.DESCRIPTOR, expires=self._held is None), [self._device])

    def _on_expire(self, message: Message) -> None:
        assert self._device is not None
        assert self._worker is not None
        names = [(ino, bytes.fromhex(name)) for ino, name in message.names]
        if self._expiry is None:
            self._expiry = Expiry(self._device)
            self._selector.register(self._expiry, selectors.EVENT_READ, self._expiry.answer)
        self._expiry.expire(names, self._worker.link, messages.encode(Message(kind=Kind.EXPIRED)))

    def _on_failed(self, message: Message) -> None:
        self._failure = message

    def _on_ready(self, _message: Message) -> None:
        self._serving = True
        if self._was_ready:
            log.info("resumed mountpoint=%s", self._config.kernel.mountpoint)
        self._was_ready = True
        self._have_held()
        if not self._announced:
            self._announced = True
            self._announce()
        if self._drain is not None:
            self._send(self._drain)

    def _on_worker_end(self) -> None:
        assert self._worker is not None
        worker, links = self._worker, self._selector.get_map()
        while worker.link in links:
            self._on_packet()  # its last words
        code = self._reap(worker)
        self._worker, self._serving = None, False
        self._without_worker(code)

    def _reap(self, worker: Worker) -> int:
        """Close all that belongs to a worker that has ended, heard to the last word; returns its exit code."""
        for source in (worker.pidfd, worker.link):
            if source in self._selector.get_map():
                self._selector.unregister(source)
        os.close(worker.pidfd)
        worker.link.close()
        return worker.process.wait()

    def _without_worker(self, code: int) -> None:
        if self._exit_code is not None:
            return
        if not self._was_ready:
            self._fail_to_start(code)
        elif self._has_ended(code):
            self._end_cleanly(code)
        elif self._releasing:
            self._leave()
        elif self._standby is not None:
            self._promote()
        else:
            self._plan_restart(code)

    def _has_ended(self, code: int) -> bool:
        """Whether the mount, and not just its worker, is at its end."""
        if self._device is None or not fusemount.is_connected(self._device):
            return True
        # Detached, and the worker did not wait for the last open file.
        return self._detached and code in (0, NotDrained.exit_code)

    def _fail_to_start(self, code: int) -> None:
        if self._device is not None:
            try:
                fusemount.unmount(self._config.kernel.mountpoint, lazy=True, timeout_seconds=END_SECONDS)
            except MountpointError as exc:
                log.error("the mount that failed to start stays: %s", exc)
        reason = self._failure.reason or f"the worker ended with {_ending(code)} before the mount was ready"
        self._finish(self._failure.exit_code or max(code, 1), reason)

    def _plan_restart(self, code: int) -> None:
        now = time.monotonic()
        while self._restarts and self._restarts[0] < now - RESTARTS_SECONDS:
            self._restarts.popleft()
        reason = self._failure.reason or _ending(code)
        if len(self._restarts) == len(RESTART_DELAYS):
            self._give_up(reason)
            return
        delay = RESTART_DELAYS[len(self._restarts)]
        log.error("the worker ended with %s; starting it again in %.1f s", reason, delay)
        self._failure = Message(kind=Kind.FAILED)
        self._restarts.append(now)
        self._due[self._start_worker] = now + delay

    def _give_up(self, reason: str) -> None:
        if self._announced:
            log.error("gave up, the mount is broken: the worker ended with %s", reason)
            self._drop_held()
            self._exit_code = 1
        else:  # adopted: perhaps another version can serve it
            self._finish(self._failure.exit_code or 1, f"the mount could not be taken up again: {reason}")

    def _end_cleanly(self, code: int) -> None:
        self._drop_held()
        if self._unmounting is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._unmounting.wait(END_SECONDS)
        registry.remove(str(self._config.kernel.mountpoint), os.getpid())
        self._exit_code = code if code >= 0 else 1
        log.info("ended mountpoint=%s exit_code=%d", self._config.kernel.mountpoint, self._exit_code)

    def _finish(self, exit_code: int, reason: str) -> None:
        self._exit_code = exit_code
        self._report(exit_code, reason)

    # --- the next keeper

    def _have_held(self) -> None:
        """Now, and each time that the holder is a new one."""
        if self._held is None or self._device is None or self._exit_code is not None:
            return
        if self._holder is not None:
            self._selector.unregister(self._holder)
        self._holder = self._held.keep(self._device)
        if self._holder is not None:
            self._selector.register(self._holder, selectors.EVENT_READ, self._on_holder_gone)
        else:
            self._due[self._have_held] = time.monotonic() + HOLDER_SECONDS

    def _on_holder_gone(self) -> None:
        assert self._held is not None
        assert self._holder is not None
        self._selector.unregister(self._holder)
        self._holder = None
        self._held.close()
        self._due[self._have_held] = time.monotonic() + HOLDER_SECONDS

    def _drop_held(self) -> None:
        if self._held is not None:
            self._held.drop()

    def _release(self) -> None:
        """Leave the mount to the next keeper: what is in work is answered, the rest waits."""
        if self._held is None or not self._held.is_held or self._drain or self._unmounting or self._standby:
            log.error("not released: no holder has the mount, or it is being replaced or ended")
            return
        log.info("releasing mountpoint=%s", self._config.kernel.mountpoint)
        self._releasing = True
        if self._worker is None:
            self._leave()
        elif self._serving:
            self._send(Message(kind=Kind.HANDOVER))
        else:
            self._worker.process.kill()  # what it was asked is asked of the next one

    def _leave(self) -> None:
        registry.remove(str(self._config.kernel.mountpoint), os.getpid())
        self._exit_code = 0
        log.info("released mountpoint=%s", self._config.kernel.mountpoint)

    # --- its replacement

    def _start_upgrade(self) -> None:
        """Start a worker of what is installed now; it takes over once it has seen that it can."""
        if not self._serving or self._standby or self._drain or self._unmounting:
            self._refuse(Message(kind=Kind.REFUSED, reason="the mount is being restarted or ended", exit_code=1))
            return
        try:
            standby = self._standby = self._spawn(["--resume", "--standby"], self._execute)
        except OSError as exc:
            self._refuse(Message(kind=Kind.REFUSED, reason=f"no worker: {exc}", exit_code=1))
            return
        self._refusal = Message(kind=Kind.REFUSED)
        self._selector.register(standby.link, selectors.EVENT_READ, self._on_standby_packet)
        self._selector.register(standby.pidfd, selectors.EVENT_READ, self._on_standby_end)
        self._due[self._end_slow_standby] = time.monotonic() + STANDBY_SECONDS

    def _refuse(self, message: Message) -> None:
        log.error("not upgraded: %s", message.reason)
        self._send(message)

    def _on_standby_packet(self) -> None:
        assert self._standby is not None
        if not (packet := self._receive(self._standby.link)):
            self._selector.unregister(self._standby.link)
            return
        message = messages.decode(packet)
        if message.kind is Kind.STANDBY:
            self._due.pop(self._end_slow_standby, None)
            self._send(Message(kind=Kind.HANDOVER))
        elif message.kind is Kind.FAILED:
            self._refusal = Message(kind=Kind.REFUSED, reason=message.reason, exit_code=message.exit_code)

    def _on_standby_end(self) -> None:
        assert self._standby is not None
        while self._standby.link in self._selector.get_map():
            self._on_standby_packet()
        code = self._reap(self._standby)
        self._standby = None
        self._due.pop(self._end_slow_standby, None)
        reason = self._refusal.reason or f"the new worker ended with {_ending(code)}"
        self._refuse(Message(kind=Kind.REFUSED, reason=reason, exit_code=self._refusal.exit_code or 1))

    def _end_slow_standby(self) -> None:
        if self._standby is not None:
            self._refusal = Message(kind=Kind.REFUSED, reason="the new worker does not get ready", exit_code=1)
            self._standby.process.kill()

    def _promote(self) -> None:
        """The worker has ended, by HANDOVER or by itself: the one on standby goes on."""
        assert self._standby is not None
        self._due.pop(self._end_slow_standby, None)
        worker, self._standby = self._standby, None
        for source in (worker.pidfd, worker.link):
            if source in self._selector.get_map():
                self._selector.unregister(source)
        self._worker = worker
        self._listen(worker)
        self._send(Message(kind=Kind.GO))

    def _end_standby(self) -> None:
        if self._standby is not None:
            self._standby.process.kill()
            self._reap(self._standby)

    # --- the mount

    def _announce(self) -> None:
        kernel = self._config.kernel
        if (device := fusemount.device_of(kernel.mountpoint)) is not None:
            fusemount.set_read_ahead(device, kernel.read_ahead_bytes)
        record = MountRecord(
            mountpoint=str(kernel.mountpoint),
            control_socket=str(self._config.control_socket),
            keeper_pid=os.getpid(),
            url=self._config.store.url,
        )
        try:
            registry.write(record)
        except OSError as exc:
            log.warning("phfs status will not find this mount: %s", exc)
        log.info("ready mountpoint=%s device=%s url=%s", kernel.mountpoint, device, record.url)
        try:
            self._report(0, "")
        except BrokenPipeError:
            if self._held is not None:
                return  # whoever asked has a record of the mount, and finds it
            log.warning("unmounting: the command that asked for the mount was interrupted")
            self._ask_for_drain()

    def _on_unmount(self, message: Message) -> None:
        if self._unmounting is not None:
            return  # asked by a worker that died; its answer serves this one
        try:
            child = fusemount.start_unmount(self._config.kernel.mountpoint, lazy=message.lazy)
        except MountpointError as exc:
            self._send(Message(kind=Kind.BUSY, reason=str(exc)))
            return
        self._unmounting = child
        pidfd = os.pidfd_open(child.pid)
        self._selector.register(pidfd, selectors.EVENT_READ, lambda: self._on_unmount_end(child, pidfd))
        self._due[child.kill] = time.monotonic() + UNMOUNT_SECONDS

    def _on_unmount_end(self, child: subprocess.Popen[bytes], pidfd: int) -> None:
        self._selector.unregister(pidfd)
        os.close(pidfd)
        self._due.pop(child.kill, None)
        self._unmounting = None
        try:
            fusemount.check_unmounted(child, self._config.kernel.mountpoint)
        except MountpointError as exc:
            self._send(Message(kind=Kind.BUSY, reason=str(exc)))
        else:
            self._detached = True
            self._send(Message(kind=Kind.UNMOUNTED))


def _execute(command: Sequence[str], arguments: Sequence[str], fds: Sequence[int]) -> subprocess.Popen[bytes]:
    """A worker of what is installed now. Raises: OSError."""
    return subprocess.Popen(
        [*command, *arguments],
        env=fusemount.environment(),
        stdin=subprocess.DEVNULL,
        pass_fds=fds,
        start_new_session=True,  # Ctrl-C at a terminal is for the keeper alone
    )


def _ending(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"status {code}"


# --- the process


def main(arguments: Sequence[str], *, launch: Launch | None = None) -> int:
    """The process of a keeper, which goes into the background if somebody hears its report. `launch` starts workers
    in place of an exec."""
    from phfs_fuse.settings import load_config

    parser = argparse.ArgumentParser(prog="python -m phfs_fuse.keeper")
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--report-fd", type=int)
    parser.add_argument("--holder", type=Path)
    parser.add_argument("worker", nargs="*")
    options = parser.parse_args(arguments)
    if options.report_fd is not None:
        os.set_inheritable(options.report_fd, False)
        if launch is None and os.fork():
            os._exit(0)
    os.chdir("/")  # hold no directory that somebody wants to unmount
    config = load_config(options.config.read_text(encoding="utf-8"))
    logs.setup(config.log_level, config.log_format, name=config.log_name)
    command = options.worker or [*fusemount.python(), "phfs_fuse.mount"]
    report, lock = _reporter(options.report_fd), keeper_lock(options.config)
    try:
        alone = StateLock(lock.parent, str(os.getpid()), lock.name)
    except LocalStateError as exc:
        report(exc.exit_code, str(exc))
        return exc.exit_code
    try:
        return Keeper(config, options.config, command, report, options.holder, launch).run()
    finally:
        options.config.unlink(missing_ok=True)
        alone.close()


def _reporter(fd: int | None) -> Callable[[int, str], None]:
    def to_command(exit_code: int, reason: str) -> None:
        assert fd is not None
        with open(fd, "w", encoding="utf-8") as pipe:
            json.dump({"exit_code": exit_code, "reason": reason}, pipe)

    def to_user(exit_code: int, reason: str) -> None:
        if exit_code:
            print(f"phfs: {reason}", file=sys.stderr, flush=True)

    return to_user if fd is None else to_command


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The process that holds a mount while its server, the worker, may die or be replaced.

State: the /dev/fuse descriptor, who serves it now, how far the mount has got, the record in the registry. What can
be said without these has its own module: what is waited for (`event_loop`), a worker and its restarts
(`worker_process`), the one that waits to take over (`upgrade`), the unmount (`unmounter`), the duplicate that a
holder has (`holder_client`).

The worker first checks the store, then the keeper mounts and hands the descriptor over: a mount that cannot
work never appears. A worker that dies is started again on the same connection, and open files go on. When
that does not help the keeper gives up and ends; the mount point then stays broken (ENOTCONN), never empty.
SIGTERM and SIGINT upload and unmount, a second one unmounts without waiting for uploads. SIGHUP upgrades: a worker
of the version that is installed now takes over (at a terminal, whose end it means, it unmounts).

With `--holder` another process holds the connection too (`host.holder_link`). Then the mount also outlives its
keeper: the next one adopts the connection. SIGUSR1 makes room for it: the worker answers what is in work, keeper and
worker end, the mount stays and its requests wait.

Nothing here touches a file of the mount: the call would wait for a worker that waits for the keeper.
Standard library only, one thread that does one thing at a time (and that of `kernel_notify`, which may have to wait
for the worker).
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Final

from phfs_fuse.config.model import MountConfig
from phfs_fuse.errors import LocalStateError, MountpointError, NotDrained
from phfs_fuse.host import fusemount, logs, registry
from phfs_fuse.host.locks import StateLock, keeper_lock
from phfs_fuse.host.mount_table import require_nothing_mounted
from phfs_fuse.host.registry import MountRecord
from phfs_fuse.keeper import messages
from phfs_fuse.keeper.event_loop import EventLoop
from phfs_fuse.keeper.holder_client import HolderClient
from phfs_fuse.keeper.kernel_notify import KernelNotifier
from phfs_fuse.keeper.messages import Kind, Message
from phfs_fuse.keeper.unmounter import Unmounter
from phfs_fuse.keeper.upgrade import Successor, refusal
from phfs_fuse.keeper.worker_process import END_SECONDS, Handlers, Launch, Restarts, Worker, ending, execute

log = logging.getLogger("phfs_fuse.keeper")

END_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SIGNALS: Final = (*END_SIGNALS, signal.SIGUSR1)


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
        kernel = config.kernel
        self._config = config
        self._arguments = ["--config", str(config_path)]
        self._execute: Launch = partial(execute, command)
        self._launch = launch or self._execute
        self._report = report
        self._loop = EventLoop()
        self._held = None if holder is None else HolderClient(self._loop, holder, kernel.mountpoint)
        self._unmounting = Unmounter(self._loop, kernel.mountpoint, self._send)
        self._standby = Successor(self._loop, self._start_standby, self._hand_over, self._refuse)
        self._restarts = Restarts()
        self._device: int | None = None
        self._expiry: KernelNotifier | None = None
        self._worker: Worker | None = None
        self._serving = False  # this worker has said READY
        self._was_ready = False  # one of them has, of this keeper or of one before
        self._announced = False  # the mount is known to others
        self._releasing = False  # the mount is left to the next keeper
        self._failure = Message(kind=Kind.FAILED)
        self._drain: Message | None = None  # what was asked, of this worker and of those after it
        self._exit_code: int | None = None

    def run(self) -> int:
        """Keep the mount until its end; returns the exit code."""
        with self._loop.hearing(SIGNALS, self._on_signal):
            if self._held is not None and (device := self._held.adopt()) is not None:
                self._device, self._was_ready = device, True
            self._start_worker()
            while self._exit_code is None:
                self._loop.step()
        self._standby.end()
        if self._worker is not None:
            self._worker.end()
        return self._exit_code

    # --- what is asked from outside

    def _on_signal(self, number: int) -> None:
        if number == signal.SIGUSR1:
            self._release()
        elif number not in END_SIGNALS:
            return
        elif not self._announced:
            self._interrupt()
        elif number == signal.SIGHUP and not os.isatty(sys.stderr.fileno()):
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
            self._worker.kill()  # it has served nothing

    def _ask_for_drain(self) -> None:
        self._drain = Message(kind=Kind.DRAIN, now=self._drain is not None)
        if self._serving:
            self._send(self._drain)

    def _release(self) -> None:
        """Leave the mount to the next keeper: what is in work is answered, the rest waits."""
        if self._held is None or not self._held.is_held or self._is_changing:
            log.error("not released: no holder has the mount, or it is being replaced or ended")
            return
        log.info("releasing mountpoint=%s", self._config.kernel.mountpoint)
        self._releasing = True
        if self._worker is None:
            self._leave()
        elif self._serving:
            self._send(Message(kind=Kind.HANDOVER))
        else:
            self._worker.kill()  # what it was asked is asked of the next one

    def _start_upgrade(self) -> None:
        """Have a worker of what is installed now take over, once it has seen that it can."""
        if not self._serving or self._is_changing:
            self._refuse(refusal("the mount is being restarted or ended"))
        else:
            self._standby.start()

    @property
    def _is_changing(self) -> bool:
        """Whether the worker is being replaced, or the mount ended."""
        return self._standby.is_there or self._drain is not None or self._unmounting.is_under_way

    # --- the worker

    def _start_worker(self) -> None:
        launch = self._launch if self._expiry is None else self._execute  # no fork beside another thread
        flags = ["--resume"] if self._was_ready else []
        try:
            self._listen(Worker(self._loop, launch, [*self._arguments, *flags]))
        except OSError as exc:  # no memory, or the program is being replaced
            self._failure = Message(kind=Kind.FAILED, reason=f"no worker: {exc}", exit_code=1)
            self._without_worker(1)

    def _start_standby(self) -> Worker:
        """Raises: OSError."""
        return Worker(self._loop, self._execute, [*self._arguments, "--resume", "--standby"])

    def _hand_over(self) -> None:
        self._send(Message(kind=Kind.HANDOVER))

    def _refuse(self, message: Message) -> None:
        log.error("not upgraded: %s", message.reason)
        self._send(message)

    def _listen(self, worker: Worker) -> None:
        """Have `worker` serve."""
        handlers: Handlers = {
            Kind.CHECKED: self._on_checked,
            Kind.FAILED: self._on_failed,
            Kind.READY: self._on_ready,
            Kind.UNMOUNT: self._unmounting.start,
            Kind.EXPIRE: self._on_expire,
            Kind.UPGRADE: lambda _message: self._start_upgrade(),
        }
        self._worker = worker
        worker.hear(handlers, self._on_worker_end)

    def _send(self, message: Message) -> None:
        if self._worker is not None:
            self._worker.send(message)

    def _on_checked(self, _message: Message) -> None:
        assert self._worker is not None
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
        expires = messages.EXPIRES_AND_DROPS if self._held is None else 0
        self._worker.send(Message(kind=Kind.DESCRIPTOR, expires=expires), [self._device])

    def _on_expire(self, message: Message) -> None:
        assert self._device is not None
        assert self._worker is not None
        names = [(ino, bytes.fromhex(name)) for ino, name in message.names]
        if self._expiry is None:
            self._expiry = KernelNotifier(self._device)
            self._loop.watch(self._expiry, self._expiry.answer)
        answer = messages.encode(Message(kind=Kind.EXPIRED))
        self._expiry.expire(names, self._worker.link, answer, drop=message.drop)

    def _on_failed(self, message: Message) -> None:
        self._failure = message

    def _on_ready(self, _message: Message) -> None:
        self._serving = True
        if self._was_ready:
            log.info("resumed mountpoint=%s", self._config.kernel.mountpoint)
        self._was_ready = True
        if self._held is not None and self._device is not None:
            self._held.keep(self._device)
        if not self._announced:
            self._announced = True
            self._announce()
        if self._drain is not None:
            self._send(self._drain)

    def _on_worker_end(self, code: int) -> None:
        self._worker, self._serving = None, False
        self._without_worker(code)

    def _without_worker(self, code: int) -> None:
        if self._exit_code is not None:
            return
        if not self._was_ready:
            self._fail_to_start(code)
        elif self._has_ended(code):
            self._end_cleanly(code)
        elif self._releasing:
            self._leave()
        elif self._standby.is_there:  # the other one has ended, by HANDOVER or by itself
            self._listen(self._standby.take())
            self._send(Message(kind=Kind.GO))
        else:
            self._plan_restart(code)

    def _has_ended(self, code: int) -> bool:
        """Whether the mount, and not just its worker, is at its end."""
        if self._device is None or not fusemount.is_connected(self._device):
            return True
        # Detached, and the worker did not wait for the last open file.
        return self._unmounting.is_done and code in (0, NotDrained.exit_code)

    def _plan_restart(self, code: int) -> None:
        reason = self._failure.reason or ending(code)
        if (delay := self._restarts.next_delay()) is None:
            self._give_up(reason)
            return
        log.error("the worker ended with %s; starting it again in %.1f s", reason, delay)
        self._failure = Message(kind=Kind.FAILED)
        self._loop.call_later(delay, self._start_worker)

    # --- beginning and end

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

    def _fail_to_start(self, code: int) -> None:
        if self._device is not None:
            try:
                fusemount.unmount(self._config.kernel.mountpoint, lazy=True, timeout_seconds=END_SECONDS)
            except MountpointError as exc:
                log.error("the mount that failed to start stays: %s", exc)
        reason = self._failure.reason or f"the worker ended with {ending(code)} before the mount was ready"
        self._finish(self._failure.exit_code or max(code, 1), reason)

    def _give_up(self, reason: str) -> None:
        if self._announced:
            log.error("gave up, the mount is broken: the worker ended with %s", reason)
            self._drop_held()
            self._exit_code = 1
        else:  # adopted: perhaps another version can serve it
            self._finish(self._failure.exit_code or 1, f"the mount could not be taken up again: {reason}")

    def _end_cleanly(self, code: int) -> None:
        self._drop_held()
        self._unmounting.wait(END_SECONDS)
        registry.remove(str(self._config.kernel.mountpoint), os.getpid())
        self._exit_code = code if code >= 0 else 1
        log.info("ended mountpoint=%s exit_code=%d", self._config.kernel.mountpoint, self._exit_code)

    def _leave(self) -> None:
        registry.remove(str(self._config.kernel.mountpoint), os.getpid())
        self._exit_code = 0
        log.info("released mountpoint=%s", self._config.kernel.mountpoint)

    def _drop_held(self) -> None:
        if self._held is not None:
            self._held.drop()

    def _finish(self, exit_code: int, reason: str) -> None:
        self._exit_code = exit_code
        self._report(exit_code, reason)


# --- the process


def main(arguments: Sequence[str], *, launch: Launch | None = None) -> int:
    """The process of a keeper, which goes into the background if somebody hears its report. `launch` starts workers
    in place of an exec."""
    from phfs_fuse.config.resolve import load_config

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
            print(f"phfs: {logs.printable(reason)}", file=sys.stderr, flush=True)

    return to_user if fd is None else to_command

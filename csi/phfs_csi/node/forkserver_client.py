"""The plugin's side of `phfs_fuse.worker.forkserver`: keepers as forks of one process, or as ever where that fails.

State: the spawner's process and the socket to it; started when it is needed, and again when it has died.
"""

from __future__ import annotations

import json
import logging
import socket
import subprocess
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from phfs_fuse.config import json_text
from phfs_fuse.host import fusemount
from phfs_fuse.launch import launcher

log = logging.getLogger(__name__)

ANSWER_SECONDS: Final = 30.0  # loading takes some of them
END_SECONDS: Final = 5.0
PACKET_BYTES_MAX: Final = 4096


@dataclass(frozen=True, slots=True)
class _Running:
    process: subprocess.Popen[bytes]
    channel: socket.socket


class ForkServer:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: _Running | None = None

    def start(self) -> None:
        """Let it load already."""
        with self._lock:
            self._ready()

    def wait(self) -> None:
        """Return when it has loaded, or cannot."""
        with self._lock:
            try:
                self._ask({}, ())
            except (OSError, ValueError, KeyError) as exc:
                log.warning("the spawner does not answer: %s", exc)
                self._end()

    def stop(self) -> None:
        """What it has started goes on."""
        with self._lock:
            self._end()

    def __call__(
        self, config_path: Path, holder: Path | None, environ: Mapping[str, str], report_fd: int, log_fd: int
    ) -> int:
        """See `launcher.Spawn`."""
        request = {"config": str(config_path), "holder": str(holder or ""), "environ": fusemount.environment(environ)}
        with self._lock:
            try:
                return self._ask(request, (report_fd, log_fd))
            except (OSError, ValueError, KeyError) as exc:
                log.warning("the spawner does not answer, starting an interpreter of its own: %s", exc)
                self._end()
        return launcher.execute(config_path, holder, environ, report_fd, log_fd)

    def _ask(self, request: Mapping[str, object], fds: Sequence[int]) -> int:
        channel = self._ready().channel
        socket.send_fds(channel, [json.dumps(request).encode()], fds)
        return int(json_text.parse(channel.recv(PACKET_BYTES_MAX))["pid"])

    def _ready(self) -> _Running:
        if self._running is not None and self._running.process.poll() is None:
            return self._running
        self._end()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            process = subprocess.Popen(
                [*fusemount.python(), "phfs_fuse.worker.forkserver", f"--fd={theirs.fileno()}"],
                env=fusemount.environment(),
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                cwd="/",
            )
        ours.settimeout(ANSWER_SECONDS)
        self._running = _Running(process, ours)
        return self._running

    def _end(self) -> None:
        if self._running is None:
            return
        self._running.channel.close()
        try:
            self._running.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._running.process.kill()
        self._running = None

"""Uploads of what volumes have left that are not mounted any more, in the background.

State: a process of `phfs_fuse.worker.drain` per volume and the time of its next try. What is left is on disk, with a
record: it goes on after a restart. One thread looks after all.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Protocol

from phfs_csi.errors import Aborted, CsiError
from phfs_csi.node.records import Records, VolumeRecord
from phfs_fuse.config.model import MountConfig
from phfs_fuse.errors import StartupError
from phfs_fuse.host import fusemount
from phfs_fuse.launch import preflight

log = logging.getLogger(__name__)

LOOK_SECONDS: Final = 1.0
RETRY_SECONDS: Final = (5.0, 15.0, 60.0, 300.0)
END_SECONDS: Final = 10.0
AT_A_TIME: Final = 4  # processes: each has the memory of a worker
TURN_SECONDS: Final = 600.0  # while others wait; twice as long at each further try, for files that take hours
DOUBLINGS_MAX: Final = 8


class DrainConfigs(Protocol):
    def drain_config(self, record: VolumeRecord) -> tuple[MountConfig, Mapping[str, str]]: ...

    def has_leftovers(self, record: VolumeRecord) -> bool: ...


@dataclass(slots=True)
class _Drain:
    volume_id: str
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    tries: int = 0
    due: float = 0.0


class Drains:
    def __init__(self, records: Records, configs: DrainConfigs) -> None:
        self._records = records
        self._configs = configs
        self._lock = threading.Lock()
        self._drains: dict[str, _Drain] = {}
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Go on with all that is recorded."""
        self._stopping.clear()
        self._thread = threading.Thread(target=self._run, name="drains", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End all processes; what is left goes up after the next start."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()
        with self._lock:
            for drain in self._drains.values():
                _end(drain)
            self._drains.clear()

    def cancel(self, record: VolumeRecord) -> None:
        """Let a mount have the local state of this volume. Who calls holds it."""
        with self._lock:
            if (drain := self._drains.pop(record.key, None)) is not None:
                _end(drain)

    def has_leftovers(self, record: VolumeRecord) -> bool:
        """Whether a volume that is not mounted may have something to upload. Raises: CsiError."""
        return self._configs.has_leftovers(record)

    def _run(self) -> None:
        while not self._stopping.wait(LOOK_SECONDS):
            for record in self._records.volumes():
                if record.is_ended and not self._stopping.is_set():
                    try:
                        with self._records.hold(record.volume_id, 0):
                            self._look_after(record)
                    except Aborted:
                        pass
                    except (CsiError, StartupError, OSError):
                        log.exception("volume=%s: not uploaded in the background", record.volume_id)

    def _look_after(self, record: VolumeRecord) -> None:
        now = self._records.current(record)
        if now is None or not now.is_ended:
            return
        with self._lock:
            drain = self._drains.setdefault(record.key, _Drain(record.volume_id))
            if drain.process is not None:
                if (code := drain.process.poll()) is not None:
                    self._on_end(record, drain, code)
            elif not self.has_leftovers(record):
                self._forget(record)
            elif time.monotonic() >= drain.due and self._has_room():
                self._start(record, drain)

    def _has_room(self) -> bool:
        """Whether one more may run. One whose turn is over is ended for it: its store may be away for days."""
        running = [drain for drain in self._drains.values() if drain.process is not None]
        if len(running) < AT_A_TIME:
            return True
        now = time.monotonic()
        over = (one for one in running if now - one.started > TURN_SECONDS * 2 ** min(one.tries, DOUBLINGS_MAX))
        if (drain := next(over, None)) is None:
            return False
        _end(drain)
        self._put_off(drain, "others wait, and not everything is uploaded")
        return True

    def _start(self, record: VolumeRecord, drain: _Drain) -> None:
        try:
            drain.process, drain.started = self._spawn(record), time.monotonic()
        except (CsiError, StartupError, OSError) as exc:  # a full disk, perhaps
            self._put_off(drain, str(exc))

    def _on_end(self, record: VolumeRecord, drain: _Drain, code: int) -> None:
        drain.process = None
        if code == 0:
            self._forget(record)
        else:
            self._put_off(drain, "not everything is uploaded")

    def _put_off(self, drain: _Drain, reason: str) -> None:
        pause = RETRY_SECONDS[min(drain.tries, len(RETRY_SECONDS) - 1)]
        drain.tries += 1
        drain.due = time.monotonic() + pause
        log.error("volume=%s: %s; tried again in %.0f s", drain.volume_id, reason, pause)

    def _forget(self, record: VolumeRecord) -> None:
        self._drains.pop(record.key, None)
        self._records.remove(record)
        log.info("volume=%s: everything is uploaded", record.volume_id)

    def _spawn(self, record: VolumeRecord) -> subprocess.Popen[bytes]:
        config, environ = self._configs.drain_config(record)
        path = preflight.write_config(config)
        log.info("uploading what is left of volume=%s", record.volume_id)
        return subprocess.Popen(
            [*fusemount.python(), "phfs_fuse.worker.drain", f"--config={path}"],
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr,
            start_new_session=True,
            cwd="/",
        )


def _end(drain: _Drain) -> None:
    if drain.process is not None:
        drain.process.kill()  # as safe as any end of a worker
        drain.process.wait(END_SECONDS)
        drain.process = None

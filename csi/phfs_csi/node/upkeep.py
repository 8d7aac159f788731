"""What keeps the volumes of this node without a call of the kubelet: mounts that died are taken up again, each gets
its share of the limits, what is left of ended ones is uploaded.

State: the threads, and of each mount that is not served how often that was tried.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from phfs_csi.errors import Aborted, CsiError
from phfs_csi.node.drains import Drains
from phfs_csi.node.mounter import Mounter, State
from phfs_csi.node.records import Records, VolumeRecord
from phfs_csi.node.volumes import REVIVE_SECONDS, Volumes

log = logging.getLogger(__name__)

LOOK_SECONDS: Final = 2.0
PAUSES: Final = (0.0, 2.0, 5.0, 15.0, 60.0)  # before the n-th try to revive a mount
AT_A_TIME: Final = 4
ADOPTIONS_MAX: Final = 4  # tries, and then the mount is made anew


@dataclass(slots=True)
class _Revival:
    tries: int = 0
    due: float = 0.0


class Upkeep:
    def __init__(self, records: Records, mounter: Mounter, drains: Drains, volumes: Volumes) -> None:
        self._records = records
        self._mounter = mounter
        self._drains = drains
        self._volumes = volumes
        self._revivals: dict[str, _Revival] = {}
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []
        self.is_settled = False  # each mount was looked at once

    def start(self) -> None:
        """Take up what is recorded, and look after it, in the background. Raises: OSError."""
        self._records.read()
        self._stopping.clear()
        self._volumes.changed.set()
        self._threads = [
            threading.Thread(target=self._look_after, name="mounts", daemon=True),
            threading.Thread(target=self._share_out, name="shares", daemon=True),
        ]
        for thread in self._threads:
            thread.start()
        self._drains.start()

    def stop(self) -> None:
        """Leave the mounts as they are."""
        self._stopping.set()
        self._volumes.changed.set()
        for thread in self._threads:
            thread.join()
        self._drains.stop()

    def release(self) -> list[str]:
        """Have all processes of mounts end that the holder can keep without them. After `stop`. Returns the ids of
        the volumes that now wait for others."""
        released: list[str] = []

        def release(record: VolumeRecord) -> None:
            if self._mounter.release(record):
                released.append(record.volume_id)

        self._for_all(self._volumes.mounted, release)
        return released

    def take_up(self, volume_ids: Collection[str]) -> list[str]:
        """Have these volumes served, before `start`; returns what could not be done, for people. Raises: OSError."""
        self._records.read()
        failed: list[str] = []

        def take_up(record: VolumeRecord) -> None:
            try:
                self._volumes.take_up(record, patience_seconds=REVIVE_SECONDS)
            except CsiError as exc:
                failed.append(f"{record.volume_id}: {exc}")

        self._for_all((record for record in self._volumes.mounted if record.volume_id in volume_ids), take_up)
        return failed

    def _look_after(self) -> None:
        while True:
            self._for_all((record for record in self._volumes.mounted if self._is_due(record)), self._try_to_take_up)
            self.is_settled = True
            if self._stopping.wait(LOOK_SECONDS):
                return

    def _is_due(self, record: VolumeRecord) -> bool:
        if self._mounter.state(record) is State.SERVED:
            self._revivals.pop(record.key, None)
            return False
        return time.monotonic() >= self._revivals.setdefault(record.key, _Revival()).due

    def _try_to_take_up(self, record: VolumeRecord) -> None:
        revival = self._revivals.setdefault(record.key, _Revival())
        try:
            self._volumes.take_up(record)
        except Aborted:
            return  # a call is at work
        except CsiError as exc:
            revival.tries += 1
            log.error("volume=%s: not served: %s", record.volume_id, exc)
            if revival.tries == ADOPTIONS_MAX:
                self._volumes.abandon(record)
        except Exception:
            revival.tries += 1
            log.exception("volume=%s: not served", record.volume_id)
        revival.due = time.monotonic() + PAUSES[min(revival.tries, len(PAUSES) - 1)]

    def _for_all(self, records: Iterable[VolumeRecord], call: Callable[[VolumeRecord], object]) -> None:
        with ThreadPoolExecutor(AT_A_TIME, thread_name_prefix="volume") as pool:
            for done in [pool.submit(call, record) for record in records]:
                with suppress(CsiError):
                    done.result()

    def _share_out(self) -> None:
        """Tell the mounts their limits when the number of volumes has changed."""
        while self._volumes.changed.wait() and not self._stopping.is_set():
            self._volumes.changed.clear()
            for record in self._volumes.mounted:
                self._mounter.limit(record)
            self._mounter.tidy_up()

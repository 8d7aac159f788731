"""Start and end of the node service: what it takes over from the plugin before, and leaves to the next.

State: whether this plugin serves, or waits because another pod has taken over.
"""

from __future__ import annotations

import logging
import threading
from typing import Final, Protocol

from phfs_csi.config import NodeConfig
from phfs_csi.handover.handover import HandoverServer, ask
from phfs_csi.handover.succession import Marks, wait_until_alone
from phfs_csi.node.forkserver_client import ForkServer
from phfs_csi.node.upkeep import Upkeep
from phfs_fuse.errors import LocalStateError

log = logging.getLogger(__name__)

ROLE: Final = "plugin"


class Door(Protocol):
    """The part of the server that a hand-over may use."""

    def close_door(self) -> None:
        """Return when no call is in work and none will be."""

    def open_door(self) -> None:
        """Take calls again: the successor did not make it. Raises: LocalStateError."""


class Lifecycle:
    def __init__(self, config: NodeConfig, upkeep: Upkeep, spawner: ForkServer) -> None:
        self._config = config
        self._upkeep = upkeep
        self._spawner = spawner
        self._door: Door | None = None
        self._handover: HandoverServer | None = None
        self._marks: Marks | None = None
        self._ending = threading.Event()
        self._problem = "starting"
        self.is_succeeded = False  # another pod serves, or is about to

    def start(self, door: Door) -> bool:
        """Take over from a plugin that runs, take up what is recorded. Returns whether calls are to be taken: not in
        a pod that was succeeded already.

        Raises: LocalStateError, the plugin before goes on where possible.
        """
        self._door = door
        path = self._config.handover_socket
        if path is None:
            self._begin()
            return True
        self._marks = Marks(path, ROLE)
        self._handover = HandoverServer(path, self._config.pod_uid, self)
        if self._marks.is_set(self._config.pod_uid):
            self._problem = "another pod has taken over"
            self.is_succeeded = True
            threading.Thread(target=self._wait_for_our_turn, name="idle", daemon=True).start()
            return False
        self._take_over()
        return True

    def _take_over(self) -> None:
        assert self._handover is not None
        assert self._marks is not None
        path = self._config.handover_socket
        assert path is not None
        self._spawner.wait()  # so that mounts wait for no program to load
        if (inheritance := ask(path, self._config.pod_uid)) is not None:
            if failed := self._upkeep.take_up(inheritance.released):
                self._upkeep.release()
                inheritance.give_back()
                raise LocalStateError(f"not taken over, the plugin before goes on: {'; '.join(failed)}")
            self._marks.set(inheritance.pod_uid, but=self._config.pod_uid)
            self._handover.start()  # before: its socket would tell the other one that nobody has taken over
            inheritance.took()
        else:
            self._handover.start()
        self._begin()

    def _begin(self) -> None:
        self._spawner.start()
        self._upkeep.start()
        self._problem = ""
        self.is_succeeded = False

    def _wait_for_our_turn(self) -> None:
        assert self._marks is not None
        assert self._door is not None
        assert self._config.handover_socket is not None
        log.info("another pod has taken over: idle")
        wait_until_alone(self._config.handover_socket, self._ending)
        if self._ending.is_set():
            return
        log.warning("the other pod is gone: this plugin goes on")
        self._marks.clear(self._config.pod_uid)
        self._take_over()
        self._door.open_door()

    def stop(self) -> None:
        """Leave the mounts: with a holder their processes end, and the next plugin takes them up at once."""
        self._ending.set()
        is_serving = not self._problem
        if self._handover is not None:
            is_serving = is_serving and not self._handover.is_succeeded
            self._handover.stop()
        if is_serving:
            self._upkeep.stop()
            if self._config.holder_socket is not None:
                self._upkeep.release()
        self._spawner.stop()

    def ready(self) -> str:
        """Why not; "" when ready."""
        if self._problem:
            return self._problem
        return "" if self._upkeep.is_settled else "mounts of the plugin before are being taken up"

    # --- what a successor asks (see `handover.Going`)

    def let_go(self) -> list[str]:
        assert self._door is not None
        self._problem = "another pod takes over"
        self.is_succeeded = True
        self._door.close_door()
        self._upkeep.stop()
        return self._upkeep.release()

    def go_on(self) -> None:
        assert self._door is not None
        if self._marks is not None:
            self._marks.clear(self._config.pod_uid)
        self._begin()
        self._door.open_door()

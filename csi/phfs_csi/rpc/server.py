"""The gRPC server of the plugin: its socket, threads and registration. No event loop here.

State: the server while the door is open. For a successor that takes over the door is closed: calls in work end, none
is taken any more, and the sockets stay until the successor puts its own in their place.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, Protocol

import grpc

from phfs_csi.handover.lifecycle import Door
from phfs_csi.metrics import Metrics, NodeStatus
from phfs_csi.rpc.admission import THREADS
from phfs_csi.rpc.boundary import Boundary
from phfs_csi.rpc.registration import Registration
from phfs_csi.rpc.sockets import SocketFile

log = logging.getLogger(__name__)

END_SECONDS: Final = 20.0  # for calls in work, then they are cancelled; pods get 30 s to end by default
MESSAGE_BYTES_MAX: Final = 1 << 20

AddService = Callable[[grpc.Server], None]


class Node(NodeStatus, Protocol):
    """The Node service, as far as the process around it is concerned."""

    def start(self, door: Door) -> bool:
        """Take over or make anew the mounts of this node. False: this plugin was succeeded, the door stays closed."""

    def ready(self) -> str:
        """Why it is not; "" when it is."""

    def is_succeeded(self) -> bool:
        """Whether another pod serves this node, or is about to."""

    def stop(self) -> None:
        """After the last call."""


def not_ready(node: Node | None, server: PluginServer, fuse_problem: Callable[[], str]) -> str:
    """Why a probe is to say that the plugin is not ready; "" when it is.

    One that was succeeded counts as ready: while a new pod is there, an old one that is not ready is deleted at once,
    and this one may have to go on if the new one does not make it.
    """
    if node is None:
        return server.problem()
    if node.is_succeeded():
        return ""
    return node.ready() or fuse_problem() or server.problem()


class PluginServer:
    def __init__(
        self, path: Path, services: Sequence[AddService], metrics: Metrics, registration: Registration | None = None
    ) -> None:
        self._socket = SocketFile(path)
        self._services = services
        self._boundary = Boundary(metrics)
        self._registration = registration
        self._server: grpc.Server | None = None
        self._lock = threading.Lock()

    def open_door(self) -> None:
        """Listen, then tell the kubelet. Raises: LocalStateError."""
        with self._lock:
            if self._server is None:
                server = self._new_server()
                self._socket.bind(server)
                server.start()
                self._server = server
                log.info("serving socket=%s", self._socket.path)
                if self._registration is not None:
                    self._registration.start()

    def close_door(self) -> None:
        """For a successor: the sockets stay where they are, so that the kubelet does not forget the driver."""
        self._close(remove=False)

    def stop(self) -> None:
        """The end: what is still ours goes."""
        self._close(remove=True)

    def _close(self, *, remove: bool) -> None:
        with self._lock:
            if self._server is not None:
                if self._registration is not None:
                    self._registration.stop(remove=remove)
                if remove:
                    self._socket.remove()
                self._server.stop(END_SECONDS).wait()
                self._server = None
                log.info("closed socket=%s", self._socket.path)

    def problem(self) -> str:
        """Why the kubelet cannot reach the plugin; "" when it can."""
        if self._server is None:
            return "no calls are taken: another plugin takes over, or this one is not ready"
        if not self._socket.is_ours():
            return f"{self._socket.path} is not ours"
        return self._registration.problem() if self._registration is not None else ""

    def _new_server(self) -> grpc.Server:
        server = grpc.server(
            ThreadPoolExecutor(THREADS, thread_name_prefix="call"),
            interceptors=[self._boundary],
            options=(("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),),
            maximum_concurrent_rpcs=THREADS,
        )
        for add in self._services:
            add(server)
        return server

"""The plugin tells the kubelet of itself: the kubelet watches a directory and calls the sockets it finds there.

State: the socket, the kubelet's last word, the thread that puts the socket back. A socket that a successor has put
in its place is left alone. Source: Kubernetes documentation, device and CSI plugin registration (v1).
"""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import grpc

from phfs_csi.config import VERSIONS
from phfs_csi.proto import pluginregistration_pb2, pluginregistration_pb2_grpc
from phfs_csi.rpc.sockets import SocketFile
from phfs_fuse.errors import StartupError

log = logging.getLogger(__name__)

CHECK_SECONDS: Final = 2.0
RETRY_SECONDS_MAX: Final = 60.0
_THREADS: Final = 2
_END_SECONDS: Final = 1.0


class Registration(pluginregistration_pb2_grpc.RegistrationServicer):
    """`endpoint` is the CSI socket as the kubelet sees it."""

    def __init__(self, directory: Path, driver_name: str, endpoint: Path, *, check_seconds: float = CHECK_SECONDS):
        self._info = pluginregistration_pb2.PluginInfo(
            type="CSIPlugin", name=driver_name, endpoint=str(endpoint), supported_versions=VERSIONS
        )
        self._socket = SocketFile(directory / f"{driver_name}-reg.sock")
        self._check_seconds = check_seconds
        self._retry_seconds = check_seconds
        self._server: grpc.Server | None = None
        self._refusal = ""
        self._ending = threading.Event()
        self._refused = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Serve until `stop`. Raises: LocalStateError when the socket cannot be made."""
        self._refusal = ""
        self._ending.clear()
        self._refused.clear()
        self._bind()
        self._thread = threading.Thread(target=self._watch, name="registration", daemon=True)
        self._thread.start()

    def stop(self, *, remove: bool) -> None:
        """The kubelet forgets the plugin when its socket is removed. May be called twice."""
        self._ending.set()
        self._refused.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._unbind(remove=remove)

    def problem(self) -> str:
        """Why the registration does not stand; "" when it does."""
        if self._refusal:
            return f"the kubelet refused the registration: {self._refusal}"
        return "" if self._socket.is_ours() else f"{self._socket.path} is not ours"

    def GetInfo(
        self, request: pluginregistration_pb2.InfoRequest, context: grpc.ServicerContext
    ) -> pluginregistration_pb2.PluginInfo:
        return self._info

    def NotifyRegistrationStatus(
        self, request: pluginregistration_pb2.RegistrationStatus, context: grpc.ServicerContext
    ) -> pluginregistration_pb2.RegistrationStatusResponse:
        if request.plugin_registered:
            self._refusal = ""
            self._retry_seconds = self._check_seconds
            log.info("registered driver=%s", self._info.name)
        else:
            self._refusal = ascii(request.error[:1000])
            log.error("the kubelet refused the registration, it is tried again: %s", self._refusal)
            self._refused.set()
        return pluginregistration_pb2.RegistrationStatusResponse()

    def _watch(self) -> None:
        while not self._ending.is_set():
            if self._refused.wait(self._check_seconds) and not self._ending.is_set():
                self._refused.clear()
                self._ending.wait(self._retry_seconds)
                self._retry_seconds = min(2 * self._retry_seconds, RETRY_SECONDS_MAX)
                self._unbind()
            if self._socket.is_missing() and not self._ending.is_set():
                self._again()

    def _again(self) -> None:
        try:
            self._unbind()
            self._bind()
        except StartupError as exc:
            log.error("the registration cannot be put back: %s", exc)

    def _bind(self) -> None:
        server = grpc.server(ThreadPoolExecutor(_THREADS, thread_name_prefix="registration"))
        pluginregistration_pb2_grpc.add_RegistrationServicer_to_server(self, server)
        self._socket.bind(server)
        server.start()
        self._server = server
        log.info("waiting for the kubelet socket=%s", self._socket.path)

    def _unbind(self, *, remove: bool = True) -> None:
        if remove:
            self._socket.remove()
        if self._server is not None:
            self._server.stop(_END_SECONDS).wait()
            self._server = None

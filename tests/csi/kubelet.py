"""A kubelet as far as the registration goes: it watches the directory and calls what it finds."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from phfs_csi.proto import pluginregistration_pb2 as api
from phfs_csi.proto import pluginregistration_pb2_grpc

SECONDS = 60.0


class Kubelet:
    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def sockets(self) -> list[str]:
        """It passes over names with a dot in front."""
        return sorted(name for name in os.listdir(self.directory) if not name.startswith("."))

    def register(self, error: str = "") -> api.PluginInfo:
        with grpc.insecure_channel(f"unix:{self.directory / self.sockets()[0]}") as channel:
            plugin = pluginregistration_pb2_grpc.RegistrationStub(channel)
            info: api.PluginInfo = plugin.GetInfo(api.InfoRequest(), timeout=SECONDS)
            status = api.RegistrationStatus(plugin_registered=not error, error=error)
            plugin.NotifyRegistrationStatus(status, timeout=SECONDS)
        return info


def eventually(condition: Callable[[], bool]) -> None:
    """The only way to learn of what a thread does to a directory."""
    pause = threading.Event()
    for _ in range(int(SECONDS * 50)):
        if condition():
            return
        pause.wait(0.02)
    pytest.fail("did not happen")

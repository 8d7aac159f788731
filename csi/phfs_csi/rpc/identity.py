"""The Identity service. Owns no state."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Final

import grpc
from google.protobuf.wrappers_pb2 import BoolValue

from phfs_csi.proto import csi_pb2, csi_pb2_grpc

FUSE: Final = Path("/dev/fuse")
_Capability = csi_pb2.PluginCapability


class IdentityService(csi_pb2_grpc.IdentityServicer):
    """`ready` says why the plugin is not; "" when it is."""

    def __init__(self, driver_name: str, ready: Callable[[], str], *, controller: bool) -> None:
        self._driver_name = driver_name
        self._ready = ready
        self._controller = controller

    def GetPluginInfo(
        self, request: csi_pb2.GetPluginInfoRequest, context: grpc.ServicerContext
    ) -> csi_pb2.GetPluginInfoResponse:
        return csi_pb2.GetPluginInfoResponse(name=self._driver_name, vendor_version=version("phfs-fuse"))

    def GetPluginCapabilities(
        self, request: csi_pb2.GetPluginCapabilitiesRequest, context: grpc.ServicerContext
    ) -> csi_pb2.GetPluginCapabilitiesResponse:
        found = [_Capability(volume_expansion=_Capability.VolumeExpansion(type=_Capability.VolumeExpansion.ONLINE))]
        if self._controller:
            found.append(_Capability(service=_Capability.Service(type=_Capability.Service.CONTROLLER_SERVICE)))
        return csi_pb2.GetPluginCapabilitiesResponse(capabilities=found)

    def Probe(self, request: csi_pb2.ProbeRequest, context: grpc.ServicerContext) -> csi_pb2.ProbeResponse:
        return csi_pb2.ProbeResponse(ready=BoolValue(value=not self._ready()))


def fuse_problem(device: Path = FUSE) -> str:
    """Why nothing can be mounted here; "" when it can."""
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except OSError as exc:
        return f"{device}: {exc.strerror}; is the fuse module loaded, and the container privileged?"
    return ""

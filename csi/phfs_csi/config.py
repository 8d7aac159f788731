"""Settings of the plugin as frozen values. Owns no state; reads nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

DRIVER_NAME: Final = "phfs.csi.primehub.io"
INLINE_MAX: Final = 64  # inline volumes of one node
VERSIONS: Final = ("1.0.0",)  # of CSI, as the kubelet asks for them


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeConfig:
    """What the node service needs to know. Paths are those inside of the plugin's container."""

    driver_name: str = DRIVER_NAME
    node_id: str
    kubelet_dir: Path = Path("/var/lib/kubelet")
    state_dir: Path = Path("/var/lib/phfs")  # must outlive the node's pods
    cache_dir: Path = Path("/var/cache/phfs")
    cache_bytes_max: int = 20 << 30  # of all volumes together
    dirty_bytes_max: int = 20 << 30  # the same
    holder_socket: Path | None = None  # None: no holder
    handover_socket: Path | None = None  # None: no hand-over
    drain_seconds: float = 60.0  # how long unstage waits for uploads, where the volume names no time of its own
    inline_max: int = INLINE_MAX  # inline volumes that are mounted at a time; 0: none is
    pod_uid: str = ""  # of the plugin's pod; "": not known
    log_level: str = "info"
    log_format: str = "text"

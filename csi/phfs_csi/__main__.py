"""The `phfs-csi` command: flags and environment -> the roles of the plugin, errors -> one line and an exit code.

State: none; `_serve` is the composition root.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from phfs_csi.config import DRIVER_NAME, INLINE_MAX, NodeConfig
from phfs_fuse import __version__
from phfs_fuse.cli.program import guarded, program
from phfs_fuse.config import values
from phfs_fuse.errors import ConfigError, LocalStateError, StartupError
from phfs_fuse.host import logs

if TYPE_CHECKING:  # gRPC is loaded by the roles that need it, the holder stays small
    from phfs_csi.provision.id_keys import IdKeysFile
    from phfs_csi.rpc.server import AddService, Node

log = logging.getLogger(__name__)
app = program("phfs-csi", "CSI plugin of phfs: mounts prefixes of a bucket into pods.")
PROBE_SECONDS: Final = 10.0
UNIX: Final = "unix://"


def _option(name: str, text: str, **more: Any) -> Any:
    """A flag and its variable: `--node-id` and PHFS_CSI_NODE_ID, for all roles the same."""
    return typer.Option(f"--{name}", envvar=f"PHFS_CSI_{name.upper().replace('-', '_')}", help=text, **more)


Endpoint = Annotated[str, _option("endpoint", "The CSI socket.")]
DriverName = Annotated[str, _option("driver-name", "Name that PersistentVolumes and StorageClasses use.")]
NodeId = Annotated[str, _option("node-id", "Name of this node. [NODE_ID, else the host's name]")]
KubeletDir = Annotated[
    Path, _option("kubelet-dir", "The kubelet's directory; the same path in here and on the host.")
]
RegistrationDir = Annotated[
    str, _option("registration-dir", "plugins_registry of the kubelet; empty: no registration.")
]
Register = Annotated[
    bool, typer.Option("--register/--no-register", envvar="PHFS_CSI_REGISTER", help="Register with the kubelet.")
]
KubeletPath = Annotated[
    str,
    _option(
        "kubelet-registration-path",
        "The CSI socket as the kubelet sees it. [<kubelet-dir>/plugins/<driver>/csi.sock]",
    ),
]
StateDir = Annotated[Path, _option("state-dir", "Unsaved bytes and records; must outlive the pod.")]
CacheDir = Annotated[Path, _option("cache-dir", "Clean blocks; may be emptied.")]
CacheSize = Annotated[str, _option("cache-size", "Limit of the cache of all volumes together.", metavar="SIZE")]
DirtyMax = Annotated[str, _option("dirty-max", "Limit of unsaved bytes of all volumes together.", metavar="SIZE")]
HolderSocket = Annotated[str, _option("holder-socket", "Socket of `phfs-csi hold`; empty: no holder.")]
HandoverSocket = Annotated[str, _option("handover-socket", "Where a successor asks for the mounts; empty: none.")]
DrainTimeout = Annotated[
    str, _option("drain-timeout", "How long an unstage waits for uploads, unless the volume says it.", metavar="TIME")
]
InlineMax = Annotated[
    int,
    _option("inline-max", "Limit of inline volumes that are mounted at a time; 0: none is.", metavar="N", min=0),
]
InlineEndpoints = Annotated[
    str,
    _option(
        "inline-endpoints",
        "Endpoints that inline volumes may use, with commas: URLs, networks, `store` for that of --secrets-dir, "
        "`aws` for none. Empty: any but link-local ones.",
        metavar="LIST",
    ),
]
SecretsDir = Annotated[
    str,
    _option(
        "secrets-dir", "Directory with a secret, a file per key, for volumes that bring none; never for inline ones."
    ),
]
IdKeysPath = Annotated[
    str,
    _option(
        "id-keys",
        "File with the keys that sign the ids of provisioned volumes, one a line: the first signs, all are accepted. "
        "Empty: nothing of a volume is ever deleted.",
    ),
]
MetricsAddress = Annotated[str, _option("metrics-address", "HOST:PORT of /metrics, /healthz, /readyz; empty: none.")]
PodUid = Annotated[str, typer.Option("--pod-uid", envvar="POD_UID", help="Of the plugin's pod.")]
LogLevel = Annotated[str, _option("log-level", "debug, info, warning or error.")]
LogFormat = Annotated[str, _option("log-format", "text or json.")]
SocketPath = Annotated[Path, _option("socket", "Where the plugin finds the holder.")]

ENDPOINT: Final = "unix:///csi/csi.sock"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outer:
    """What a role shows to the outside."""

    endpoint: str
    driver_name: str
    metrics_address: str
    registration_dir: str = ""  # "": none
    kubelet_path: str = ""


# --- the roles


@app.command("node")
def node(
    endpoint: Endpoint = ENDPOINT,
    driver_name: DriverName = DRIVER_NAME,
    node_id: NodeId = "",
    kubelet_dir: KubeletDir = Path("/var/lib/kubelet"),
    registration_dir: RegistrationDir = "/registration",
    register: Register = True,
    kubelet_registration_path: KubeletPath = "",
    state_dir: StateDir = Path("/var/lib/phfs"),
    cache_dir: CacheDir = Path("/var/cache/phfs"),
    cache_size: CacheSize = "20G",
    dirty_max: DirtyMax = "20G",
    holder_socket: HolderSocket = "",
    handover_socket: HandoverSocket = "",
    drain_timeout: DrainTimeout = "60s",
    inline_max: InlineMax = INLINE_MAX,
    inline_endpoints: InlineEndpoints = "",
    secrets_dir: SecretsDir = "",
    metrics_address: MetricsAddress = "",
    pod_uid: PodUid = "",
    log_level: LogLevel = "info",
    log_format: LogFormat = "text",
    controller: Annotated[
        bool, typer.Option("--controller", envvar="PHFS_CSI_CONTROLLER", help="Serve the Controller service too.")
    ] = False,
    id_keys: IdKeysPath = "",
    any_target: Annotated[
        bool,
        typer.Option(
            "--any-target", envvar="PHFS_CSI_ANY_TARGET", help="Take any path below --kubelet-dir, for csi-sanity."
        ),
    ] = False,
) -> None:
    """Serve a node: Identity and Node, and register with the kubelet."""
    _set_up_logs(log_level, log_format)
    config = NodeConfig(
        driver_name=_driver(driver_name),
        node_id=node_id or os.environ.get("NODE_ID") or socket.gethostname(),
        kubelet_dir=_absolute("--kubelet-dir", kubelet_dir),
        state_dir=_absolute("--state-dir", state_dir),
        cache_dir=_absolute("--cache-dir", cache_dir),
        cache_bytes_max=_parsed("--cache-size", values.size, cache_size),
        dirty_bytes_max=_parsed("--dirty-max", values.size, dirty_max),
        holder_socket=Path(holder_socket) if holder_socket else None,
        handover_socket=Path(handover_socket) if handover_socket else None,
        drain_seconds=_parsed("--drain-timeout", values.seconds, drain_timeout),
        inline_max=inline_max,
        pod_uid=pod_uid,
        log_level=log_level,
        log_format=log_format,
    )
    default_path = config.kubelet_dir / "plugins" / config.driver_name / "csi.sock"
    from phfs_csi.request.endpoints import parse_endpoints

    listed = _parsed("--inline-endpoints", parse_endpoints, inline_endpoints)
    outer = Outer(
        endpoint=endpoint,
        driver_name=config.driver_name,
        metrics_address=metrics_address,
        registration_dir=registration_dir if register else "",
        kubelet_path=kubelet_registration_path or str(default_path),
    )
    from phfs_csi.provision.id_keys import IdKeysFile

    keys = IdKeysFile(Path(id_keys)) if id_keys else IdKeysFile(config.state_dir / "id-keys", make=True)
    service = _controller_service(secrets_dir, keys) if controller else None
    _serve(outer, _open_node(config, secrets_dir, listed, any_target=any_target), service)


@app.command("controller")
def controller(
    endpoint: Endpoint = ENDPOINT,
    driver_name: DriverName = DRIVER_NAME,
    secrets_dir: SecretsDir = "",
    id_keys: IdKeysPath = "",
    metrics_address: MetricsAddress = "",
    log_level: LogLevel = "info",
    log_format: LogFormat = "text",
) -> None:
    """Serve dynamic provisioning: Identity and Controller, beside the stock provisioner and resizer."""
    _set_up_logs(log_level, log_format)
    outer = Outer(endpoint=endpoint, driver_name=_driver(driver_name), metrics_address=metrics_address)
    from phfs_csi.provision.id_keys import IdKeysFile

    keys = IdKeysFile(Path(id_keys) if id_keys else None)
    _serve(outer, None, _controller_service(secrets_dir, keys))


@app.command("hold")
def hold(
    socket: SocketPath, pod_uid: PodUid = "", log_level: LogLevel = "info", log_format: LogFormat = "text"
) -> None:
    """Hold the connections of the node's mounts, so that the plugin may be restarted."""
    from phfs_csi.handover import holder

    _set_up_logs(log_level, log_format)
    holder.hold(socket, pod_uid)


@app.command("probe")
def probe(endpoint: Endpoint = ENDPOINT) -> None:
    """Exit with 0 when the plugin that serves the endpoint is ready."""
    import grpc

    from phfs_csi.proto import csi_pb2, csi_pb2_grpc

    with grpc.insecure_channel(f"unix:{_socket_path(endpoint)}") as channel:
        try:
            answer = csi_pb2_grpc.IdentityStub(channel).Probe(csi_pb2.ProbeRequest(), timeout=PROBE_SECONDS)
        except grpc.RpcError as exc:
            raise LocalStateError(f"{endpoint}: no answer ({exc.code().name})") from exc
    if not answer.ready.value:
        raise LocalStateError(f"{endpoint}: not ready, the plugin's /readyz and log say why")


# --- composition


def _open_node(config: NodeConfig, secrets_dir: str, endpoints: Sequence[str], *, any_target: bool) -> Node:
    from phfs_csi.provision.catalog import quota_now
    from phfs_csi.request.endpoints import Endpoints
    from phfs_csi.request.node_requests import Requests
    from phfs_csi.request.secrets_dir import SecretsDirectory
    from phfs_csi.wiring import open_node

    defaults = SecretsDirectory(secrets_dir).read
    requests = Requests(
        kubelet_dir=config.kubelet_dir,
        defaults=defaults,
        quota_now=quota_now,
        drain_seconds=config.drain_seconds,
        any_target=any_target,
        endpoints=Endpoints(endpoints, defaults),
    )
    return open_node(config, requests)


def _serve(outer: Outer, node: Node | None, controller: AddService | None = None) -> None:
    """Serve until SIGTERM or SIGINT."""
    from phfs_csi import metrics
    from phfs_csi.proto import csi_pb2_grpc
    from phfs_csi.rpc import identity, server
    from phfs_csi.rpc.registration import Registration

    counted = metrics.Metrics(node)
    registration = (
        Registration(Path(outer.registration_dir), outer.driver_name, Path(outer.kubelet_path))
        if outer.registration_dir
        else None
    )

    def ready() -> str:
        return server.not_ready(node, door, identity.fuse_problem)

    services: list[AddService] = []
    about = identity.IdentityService(outer.driver_name, ready, controller=controller is not None)
    services.append(lambda to: csi_pb2_grpc.add_IdentityServicer_to_server(about, to))
    if node is not None:
        services.append(lambda to: csi_pb2_grpc.add_NodeServicer_to_server(node, to))
    if controller is not None:
        services.append(controller)
    door = server.PluginServer(_socket_path(outer.endpoint), services, counted, registration)
    ending = _on_signals()
    with ExitStack() as stack:
        if outer.metrics_address:
            stack.enter_context(metrics.serving(outer.metrics_address, counted, ready))
        log.info("phfs-csi %s driver=%s", __version__, outer.driver_name)
        if node is not None:
            stack.callback(node.stop)
        stack.callback(door.stop)
        if node is None or node.start(door):
            door.open_door()
        ending.wait()
        log.info("ending")


def _controller_service(secrets_dir: str, keys: IdKeysFile) -> AddService:
    from phfs_csi.proto import csi_pb2_grpc
    from phfs_csi.request.secrets_dir import SecretsDirectory
    from phfs_csi.rpc.controller import ControllerService

    service = ControllerService(SecretsDirectory(secrets_dir).read, keys=keys.read)
    return lambda to: csi_pb2_grpc.add_ControllerServicer_to_server(service, to)


def _on_signals() -> threading.Event:
    ending = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: ending.set())
    return ending


# --- values


def _driver(name: str) -> str:
    """Source: CSI spec, GetPluginInfo: at most 63 characters, letters or digits at both ends."""
    import re

    if not re.fullmatch(r"[a-zA-Z0-9]([a-zA-Z0-9.-]{0,61}[a-zA-Z0-9])?", name):
        raise ConfigError("--driver-name", name, "a name such as phfs.csi.primehub.io")
    return name


def _socket_path(endpoint: str) -> Path:
    path = Path(endpoint.removeprefix(UNIX) if endpoint.startswith(UNIX) else endpoint.removeprefix("unix:"))
    return _absolute("--endpoint", path)


def _absolute(flag: str, path: Path) -> Path:
    if not path.is_absolute() or ".." in path.parts:
        raise ConfigError(flag, str(path), "an absolute path")
    return path


def _parsed(flag: str, parse: values.Parser, text: str) -> Any:
    try:
        return parse(text)
    except ValueError as exc:
        raise ConfigError(flag, text, str(exc)) from exc


def _set_up_logs(level: str, form: str) -> None:
    choices: Mapping[str, tuple[str, ...]] = {
        "--log-level": ("debug", "info", "warning", "error"),
        "--log-format": ("text", "json"),
    }
    for (flag, allowed), text in zip(choices.items(), (level, form), strict=True):
        _parsed(flag, values.choice(*allowed), text)
    logs.setup(level, form)


# --- entry point


def main() -> None:
    """The `phfs-csi` command."""
    sys.exit(guarded("phfs-csi", _run, debug="--log-level=debug"))


def _run() -> int:
    try:
        return app(prog_name="phfs-csi", standalone_mode=False) or 0
    except ModuleNotFoundError as exc:
        raise StartupError(f"{exc.name} is missing: pip install 'phfs-fuse[csi]'") from exc
    except OSError as exc:
        raise LocalStateError(str(exc)) from exc


if __name__ == "__main__":
    main()

"""Every metric of the plugin, and the HTTP server that shows them beside the probes.

State: the registry with what was counted; gauges of volumes are read at each scrape.
"""

from __future__ import annotations

import logging
import math
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from threading import Thread
from typing import Any, Final, Protocol
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import ThreadingWSGIServer
from prometheus_client.registry import Collector

from phfs_fuse.errors import ConfigError, LocalStateError

log = logging.getLogger(__name__)

_SECONDS: Final = (0.005, 0.025, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)  # a drain takes minutes


class VolumeState(Enum):
    MOUNTED = "mounted"
    DRAINING = "draining"  # not staged any more, its uploads go on in the background


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeStatus:
    """One volume of this node."""

    volume_id: str
    state: VolumeState
    pending_files: int | None  # that are not in the store yet; None: its process does not tell
    pending_bytes: int | None
    refused: int  # changes that the store refuses for good
    starts: int | None  # of its processes, as long as its local state exists


class NodeStatus(Protocol):
    def volumes(self) -> Sequence[VolumeStatus]:
        """Asked at each scrape: one after the other, seconds for a process that does not answer."""


class Metrics:
    """The counters and the registry."""

    def __init__(self, node: NodeStatus | None = None) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "phfs_csi_requests", "Calls that were answered.", ["method", "code"], registry=self.registry
        )
        self.seconds = Histogram(
            "phfs_csi_request_seconds", "Time to the answer.", ["method"], buckets=_SECONDS, registry=self.registry
        )
        ProcessCollector(registry=self.registry)
        if node is not None:
            self.registry.register(_Volumes(node))

    def answered(self, method: str, code: str, seconds: float) -> None:
        self.requests.labels(method, code).inc()
        self.seconds.labels(method).observe(seconds)


class _Volumes(Collector):
    def __init__(self, node: NodeStatus) -> None:
        self._node = node

    def describe(self) -> Iterable[Metric]:
        return ()  # nothing is asked before the first scrape

    def collect(self) -> Iterable[Metric]:
        volumes = self._node.volumes()
        count = GaugeMetricFamily("phfs_csi_volumes", "Volumes by what is done for them.", labels=["state"])
        files = GaugeMetricFamily("phfs_csi_pending_files", "Files that wait for upload.", labels=["volume", "state"])
        size = GaugeMetricFamily("phfs_csi_pending_bytes", "Bytes that wait for upload.", labels=["volume", "state"])
        refused = GaugeMetricFamily(
            "phfs_csi_refused_changes", "Changes that the store refuses for good.", labels=["volume", "state"]
        )
        starts = CounterMetricFamily(
            "phfs_csi_worker_starts", "Processes that the local state has had.", labels=["volume"]
        )
        for state in VolumeState:
            count.add_metric([state.value], sum(volume.state is state for volume in volumes))
        for volume in volumes:
            labels = [volume.volume_id, volume.state.value]
            files.add_metric(labels, _known(volume.pending_files))
            size.add_metric(labels, _known(volume.pending_bytes))
            refused.add_metric(labels, volume.refused)
            starts.add_metric([volume.volume_id], _known(volume.starts))
        return (count, files, size, refused, starts)


def _known(value: int | None) -> float:
    """What is not known is no 0: a node whose uploads are at 0 may be removed."""
    return math.nan if value is None else value


# --- HTTP


class _Handler(WSGIRequestHandler):
    timeout = 30  # seconds of silence on a connection

    def log_message(self, format: str, *args: Any) -> None:
        log.debug("http " + format, *args)


@contextmanager
def serving(address: str, metrics: Metrics, ready: Callable[[], str]) -> Iterator[int]:
    """`/metrics`, `/healthz` and `/readyz` (503 and the reason while `ready` names one) at `HOST:PORT`.

    Yields the port. Raises: LocalStateError when nobody can listen there.
    """
    host, port = parse_address(address)
    try:
        server = make_server(host, port, _application(metrics, ready), _server_class(host), handler_class=_Handler)
    except OSError as exc:
        raise LocalStateError(f"--metrics-address {address}: {exc.strerror}") from exc
    thread = Thread(target=server.serve_forever, name="metrics", daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def parse_address(address: str) -> tuple[str, int]:
    """`HOST:PORT`, `[::1]:PORT` or `:PORT`. Raises: ConfigError."""
    host, colon, port = address.rpartition(":")
    if not colon or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise ConfigError("--metrics-address", address, "HOST:PORT")
    return host.strip("[]"), int(port)


def _server_class(host: str) -> type[WSGIServer]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return type("Server", (ThreadingWSGIServer,), {"address_family": family})


def _application(metrics: Metrics, ready: Callable[[], str]) -> Any:
    scrape: Any = make_wsgi_app(metrics.registry)

    def application(environ: Any, start_response: Any) -> Any:
        if (path := environ["PATH_INFO"]) == "/metrics":
            return scrape(environ, start_response)
        if path == "/healthz":
            status, text = "200 OK", "ok"
        elif path == "/readyz":
            reason = ready()
            status, text = ("503 Service Unavailable", reason) if reason else ("200 OK", "ok")
        else:
            status, text = "404 Not Found", "/metrics, /healthz and /readyz are here"
        start_response(status, [("Content-Type", "text/plain; charset=utf-8")])
        return [f"{text}\n".encode()]

    return application

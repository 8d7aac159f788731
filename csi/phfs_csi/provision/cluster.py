"""Requests of the controller to the cluster: the annotations of a claim, and events of volumes. Owns no state.

Annotations are asked for only where a StorageClass uses them, with the right to get persistentvolumeclaims; an event
needs the right to create events.
Source: Kubernetes documentation, accessing the API from a pod.
"""

from __future__ import annotations

import json
import os
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import quote

import urllib3

from phfs_csi.errors import FailedPrecondition, NotFound, PermissionDenied, Unavailable
from phfs_fuse.config import json_text

ACCOUNT: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount")
EVENTS: Final = "default"  # the namespace of events about what has none
EVENT_CHARS_MAX: Final = 1000  # Source: Kubernetes, validation of events: 1024 bytes
_SECONDS: Final = 10.0


@dataclass(frozen=True, slots=True)
class Cluster:
    url: str
    account: Path  # directory with `token` and `ca.crt`

    @classmethod
    def around(cls, environ: Mapping[str, str] = os.environ, account: Path = ACCOUNT) -> Cluster:
        """Raises: FailedPrecondition outside of a cluster."""
        host, port = environ.get("KUBERNETES_SERVICE_HOST"), environ.get("KUBERNETES_SERVICE_PORT", "443")
        if not host:
            raise FailedPrecondition("annotations of claims can only be read inside of a cluster")
        return cls(f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}", account)

    def annotations(self, namespace: str, name: str) -> Mapping[str, str]:
        """Of the claim. Raises: NotFound, PermissionDenied, Unavailable, FailedPrecondition."""
        claim = f"{namespace}/{name}"
        path = f"/api/v1/namespaces/{quote(namespace, safe='')}/persistentvolumeclaims/{quote(name, safe='')}"
        status, body = self._ask("GET", path)
        if status == 404:
            raise NotFound(f"there is no claim {claim}")
        if status in (401, 403):
            raise PermissionDenied(
                f"claim {claim}: the controller may not get persistentvolumeclaims, see its ClusterRole"
            )
        if status != 200:
            raise Unavailable(f"claim {claim}: the cluster answered {status}")
        try:
            found = json_text.parse(body)["metadata"].get("annotations") or {}
            return {str(key): str(text) for key, text in found.items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise Unavailable(f"claim {claim}: the cluster's answer cannot be read") from None

    def warn_volume(self, name: str, reason: str, text: str) -> None:
        """An event of a PersistentVolume, which `kubectl describe pv` and `kubectl get events` show. Raises:
        PermissionDenied, Unavailable. Source: Kubernetes API reference, Event v1 core."""
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        event = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"generateName": "phfs-csi-", "namespace": EVENTS},
            "involvedObject": {"apiVersion": "v1", "kind": "PersistentVolume", "name": name},
            "type": "Warning",
            "reason": reason,
            "message": text[:EVENT_CHARS_MAX],
            "source": {"component": "phfs-csi"},
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
        }
        status, _body = self._ask("POST", f"/api/v1/namespaces/{EVENTS}/events", json.dumps(event).encode())
        if status in (401, 403):
            raise PermissionDenied("the controller may not create events, see its ClusterRole")
        if status not in (200, 201):
            raise Unavailable(f"the cluster answered {status} to an event")

    def _ask(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        try:
            token = (self.account / "token").read_text().strip()
            ca_certs = str(self.account / "ca.crt") if self.url.startswith("https:") else None
            with urllib3.PoolManager(ca_certs=ca_certs, timeout=_SECONDS, retries=False) as pool:
                headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
                answer = pool.request(method, self.url + path, body=body, headers=headers)
                return answer.status, answer.data
        except (OSError, ssl.SSLError, urllib3.exceptions.HTTPError) as exc:
            raise Unavailable(f"the cluster cannot be asked: {type(exc).__name__}") from None

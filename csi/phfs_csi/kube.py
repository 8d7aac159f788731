"""The one question that is asked of the cluster: the annotations of a claim. Owns no state.

Asked only where a StorageClass uses annotations; it needs the right to get persistentvolumeclaims.
Source: Kubernetes documentation, accessing the API from a pod.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import quote

import urllib3

from phfs_csi.errors import FailedPrecondition, NotFound, PermissionDenied, Unavailable
from phfs_fuse import jsontext

ACCOUNT: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount")
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
        status, body = self._get(path)
        if status == 404:
            raise NotFound(f"there is no claim {claim}")
        if status in (401, 403):
            raise PermissionDenied(
                f"claim {claim}: the controller may not get persistentvolumeclaims, see its ClusterRole"
            )
        if status != 200:
            raise Unavailable(f"claim {claim}: the cluster answered {status}")
        try:
            found = jsontext.parse(body)["metadata"].get("annotations") or {}
            return {str(key): str(text) for key, text in found.items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise Unavailable(f"claim {claim}: the cluster's answer cannot be read") from None

    def _get(self, path: str) -> tuple[int, bytes]:
        try:
            token = (self.account / "token").read_text().strip()
            ca_certs = str(self.account / "ca.crt") if self.url.startswith("https:") else None
            with urllib3.PoolManager(ca_certs=ca_certs, timeout=_SECONDS, retries=False) as pool:
                answer = pool.request("GET", self.url + path, headers={"Authorization": f"Bearer {token}"})
                return answer.status, answer.data
        except (OSError, ssl.SSLError, urllib3.exceptions.HTTPError) as exc:
            raise Unavailable(f"the cluster cannot be asked: {type(exc).__name__}") from None

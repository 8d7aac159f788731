"""Endpoints that inline volumes may use: whoever may start a pod names them, and the node would connect to any host.

Owns no state: names are resolved at each look, and the plugin's own secret is read.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from phfs_csi.errors import PermissionDenied
from phfs_fuse.config import values

STORE: Final = "store"  # stands for the endpoint of the plugin's own secret
AWS: Final = "aws"  # stands for no endpoint
REFUSED: Final = "the endpoint is none that inline volumes may use on this node, see --inline-endpoints"
_VARIABLES: Final = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
_Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_Place = tuple[_Address, int]


@dataclass(frozen=True, slots=True)
class Endpoints:
    """`listed` empty: any but link-local ones. `defaults` is the plugin's secret."""

    listed: Sequence[str] = ()
    defaults: Callable[[], Mapping[str, str]] = dict

    def require(self, url: str) -> None:
        """`url` "": AWS, or that of the plugin's environment. Raises: PermissionDenied, in the same words for all
        reasons: the answer tells nothing of the network."""
        if not url:
            if self.listed and AWS not in self.listed and not any(os.environ.get(name) for name in _VARIABLES):
                raise PermissionDenied(REFUSED)
            return
        urls, networks = self._urls(), [ipaddress.ip_network(text) for text in self.listed if _is_network(text)]
        if url in urls:
            return
        asked = _places(url)
        allowed = {place for one in urls for place in _places(one)}
        if not asked or not all(self._allows(place, allowed, networks) for place in asked):
            raise PermissionDenied(REFUSED)

    def _allows(self, place: _Place, allowed: set[_Place], networks: Sequence[_Network]) -> bool:
        if place in allowed or any(place[0] in network for network in networks):
            return True
        return not self.listed and not place[0].is_link_local

    def _urls(self) -> list[str]:
        own = self.defaults().get("endpoint", "").strip().rstrip("/") if STORE in self.listed else ""
        return [*filter(None, [own]), *(text.rstrip("/") for text in self.listed if "://" in text)]


def parse_endpoints(raw: values.Raw) -> tuple[str, ...]:
    """Words with commas between them. Raises: ValueError, for people."""
    words = tuple(word.strip() for word in str(raw).split(",") if word.strip())
    for word in words:
        if word not in (STORE, AWS) and not _is_network(word):
            try:
                values.endpoint(word)
            except ValueError:
                raise ValueError(f"URLs, networks such as 10.0.0.0/8, {STORE!r} or {AWS!r}, with commas") from None
    return words


def _is_network(text: str) -> bool:
    try:
        ipaddress.ip_network(text)
    except ValueError:
        return False
    return True


def _places(url: str) -> set[_Place]:
    """The addresses that a connection to `url` may go to; empty: it has none."""
    parts = urlsplit(url)
    port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    try:
        found = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return set()
    return {(_address(str(where[0])), port) for *_, where in found}


def _address(text: str) -> _Address:
    found = ipaddress.ip_address(text.partition("%")[0])
    return (found.ipv4_mapped or found) if isinstance(found, ipaddress.IPv6Address) else found

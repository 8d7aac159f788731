"""The reason in plain words why an endpoint cannot be talked to. Owns no state.

HTTP clients name their own exceptions, and one of them for many causes. So after a failed start the connection is
made once more, step by step: name, TCP, TLS.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Mapping
from contextlib import suppress
from typing import Final
from urllib.parse import urlsplit

CONNECT_SECONDS: Final = 2.0

_BY_VERIFY_CODE: Final[Mapping[int, str]] = {  # Source: openssl-verification-options(1), x509_vfy.h
    9: "the store's certificate is not valid yet",
    10: "the store's certificate has expired",
    62: "the store's certificate is for another host",
    64: "the store's certificate is for another host",
}
_NOT_TRUSTED: Final = "the store's certificate is not trusted; name its authority with --ca-bundle"
_BY_SSL_REASON: Final[Mapping[str, str]] = {
    "WRONG_VERSION_NUMBER": "the endpoint speaks http, not https",
    "HTTP_REQUEST": "the endpoint speaks http, not https",
    "RECORD_LAYER_FAILURE": "the endpoint speaks http, not https",
    "UNSUPPORTED_PROTOCOL": "the endpoint speaks a TLS older than 1.2",
    "TLSV1_ALERT_PROTOCOL_VERSION": "the endpoint speaks a TLS older than 1.2",
}


def diagnose(url: str, ca_bundle: str | None) -> str:
    """The reason why the endpoint does not answer; "" if a connection can be made. Blocks, for some seconds at most,
    but for the name's look-up."""
    parts = urlsplit(url)
    is_tls = parts.scheme == "https"
    host = parts.hostname or ""
    try:
        with socket.create_connection((host, parts.port or (443 if is_tls else 80)), CONNECT_SECONDS) as connection:
            return _of_tls(connection, host, ca_bundle) if is_tls else _of_plain(connection, host)
    except (socket.gaierror, UnicodeError):
        return f"no such host: {host}"
    except ConnectionRefusedError:
        return "connection refused"
    except TimeoutError:
        return f"no connection within {CONNECT_SECONDS:g} s"
    except OSError as exc:
        return (exc.strerror or "the connection broke").lower()


def _of_tls(connection: socket.socket, host: str, ca_bundle: str | None) -> str:
    try:
        context = ssl.create_default_context(cafile=ca_bundle)
    except (OSError, ssl.SSLError):
        return f"the file of authorities {ca_bundle} cannot be used"
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        with context.wrap_socket(connection, server_hostname=host):
            return ""
    except ssl.SSLCertVerificationError as exc:
        return _BY_VERIFY_CODE.get(exc.verify_code, _NOT_TRUSTED)
    except ssl.SSLError as exc:
        return _BY_SSL_REASON.get(exc.reason or "", "TLS failed")


def _of_plain(connection: socket.socket, host: str) -> str:
    """An http endpoint that takes connections: maybe it speaks TLS."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with suppress(OSError), context.wrap_socket(connection, server_hostname=host):
        return "the endpoint speaks https, not http"
    return ""

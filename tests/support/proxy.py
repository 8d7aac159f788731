"""An HTTP server between a client and a store (or in place of one), which does what a test says to each request.

Owns its threads and the list of the requests seen.
"""

from __future__ import annotations

import http.client
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

UPSTREAM_SECONDS = 30
HOP_HEADERS = {"connection", "keep-alive", "transfer-encoding"}


@dataclass(frozen=True, slots=True)
class Request:
    method: str
    path: str  # with the query
    headers: Mapping[str, str]  # names in lower case
    body: bytes


@dataclass(frozen=True, slots=True)
class Answer:
    """`drip`: seconds between two bytes of its body."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    drip: float = 0.0


@dataclass(frozen=True, slots=True)
class Raw:
    """Bytes in place of an answer, after which the connection is closed. `drip`: seconds between two of them."""

    data: bytes = b""
    drip: float = 0.0


@dataclass(frozen=True, slots=True)
class Forward:
    """To the store behind. `without`: headers (lower case) that it does not get to see; its answer is `edit`ed, and
    then `lost`, or `cut` after so many bytes of its body. A stream of events begins with the bytes `first`."""

    without: frozenset[str] = frozenset()
    lost: bool = False
    cut: int | None = None
    edit: Callable[[Answer], Answer] | None = None
    first: bytes = b""


Action = Answer | Raw | Forward
Script = Callable[[Request], Action]


def forward_all(_: Request) -> Forward:
    return Forward()


class Proxy:
    def __init__(self, endpoint_url: str) -> None:
        self.endpoint_url = endpoint_url
        self.script: Script = forward_all
        self.requests: list[Request] = []
        self.keeps_requests = True  # in `requests`
        self.streams: list[http.client.HTTPResponse] = []  # streams of events that are passed on

    def cut_streams(self) -> None:
        for response in self.streams[:]:
            with suppress(OSError, ValueError), socket.socket(fileno=os.dup(response.fileno())) as upstream:
                upstream.shutdown(socket.SHUT_RDWR)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that is killed leaves requests behind."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


@contextmanager
def proxy(upstream_url: str = "") -> Iterator[Proxy]:
    """A proxy in front of the store at `upstream_url`; without one its script must answer everything."""
    with _Server(("127.0.0.1", 0), _Handler) as server:
        seen = Proxy(f"http://127.0.0.1:{server.server_address[1]}")
        server.seen = seen  # type: ignore[attr-defined]
        server.upstream = urlsplit(upstream_url).netloc  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield seen
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, self.path, headers, body)
        seen: Proxy = self.server.seen  # type: ignore[attr-defined]
        if seen.keeps_requests:
            seen.requests.append(request)
        action = seen.script(request)
        if isinstance(action, Answer):
            self._reply(action, len(action.body))
            return
        if isinstance(action, Raw):
            self._send(action.data, action.drip)
            self.close_connection = True
            return
        answer = self._forwarded(request, action)
        if answer is None or action.lost:
            self.close_connection = True
        else:
            self._reply(answer, len(answer.body) if action.cut is None else action.cut)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _serve

    def _forwarded(self, request: Request, action: Forward) -> Answer | None:
        """None: it was a stream, which has been passed on."""
        upstream: str = self.server.upstream  # type: ignore[attr-defined]
        connection = http.client.HTTPConnection(upstream, timeout=UPSTREAM_SECONDS)
        hidden = HOP_HEADERS | action.without | {"expect"}
        try:
            connection.putrequest(request.method, request.path, skip_host=True, skip_accept_encoding=True)
            for name, value in request.headers.items():
                if name not in hidden:
                    connection.putheader(name, value)
            connection.endheaders(request.body)
            response = connection.getresponse()
            if response.headers.get_content_type() == "text/event-stream":
                self._stream(response, action.first)
                return None
            headers = {n: v for n, v in response.getheaders() if n.lower() not in HOP_HEADERS}
            answer = Answer(response.status, headers, response.read())
            return action.edit(answer) if action.edit else answer
        finally:
            connection.close()

    def _stream(self, response: http.client.HTTPResponse, piece: bytes) -> None:
        seen: Proxy = self.server.seen  # type: ignore[attr-defined]
        seen.streams.append(response)
        self.send_response(response.status)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        with suppress(OSError, http.client.HTTPException), response:
            while piece := piece or response.read1(65536):
                self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
                piece = b""
        seen.streams.remove(response)

    def _reply(self, answer: Answer, sent: int) -> None:
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            if name.lower() not in ("date", "server", "content-length"):
                self.send_header(name, value)
        lengths = [value for name, value in answer.headers.items() if name.lower() == "content-length"]
        self.send_header("Content-Length", lengths[0] if lengths else str(len(answer.body)))
        self.end_headers()
        if self.command != "HEAD":
            self._send(answer.body[:sent], answer.drip)
        if sent < len(answer.body):
            self.close_connection = True

    def _send(self, data: bytes, drip: float) -> None:
        """Until the client goes away."""
        if not drip:
            self.wfile.write(data)
            return
        with suppress(ConnectionError):
            for at in range(len(data)):
                self.wfile.write(data[at : at + 1])
                time.sleep(drip)

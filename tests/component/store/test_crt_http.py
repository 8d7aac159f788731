"""Connections of awscrt to a server that treats them as stores do."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from functools import partial

import pytest
import trio

from phfs_fuse.config.model import StoreConfig
from phfs_fuse.errors import BadAnswer, PhfsError, StoreTimeout, StoreUnavailable
from phfs_fuse.store.crt_http import Endpoint, HttpClient, build_request
from phfs_fuse.types import MIB

ANSWERS = {
    200: b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
    404: b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
    412: b"HTTP/1.1 412 Precondition Failed\r\nContent-Length: 0\r\n\r\n",
}


class OneRequestEach:
    """Answers the first request of each connection, and closes it only when a second one comes."""

    def __init__(self, status: int) -> None:
        self._answer = ANSWERS[status]
        self.connections = 0

    async def serve(self, stream: trio.SocketStream) -> None:
        self.connections += 1
        async with stream:
            head = b""
            while not head.endswith(b"\r\n\r\n") and (piece := await stream.receive_some()):
                head += piece
            await stream.send_all(self._answer)
            await stream.receive_some()


@pytest.mark.parametrize(("status", "reused"), [(200, True), (404, True), (412, False)])
async def test_a_connection_that_the_store_closes_is_not_used_again(status: int, reused: bool) -> None:
    """MinIO closes one after a 412 without a word: its end may come after the next request."""
    server = OneRequestEach(status)
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, server.serve, 0, host="127.0.0.1"))
        port = listeners[0].socket.getsockname()[1]
        endpoint = Endpoint(is_tls=False, host="127.0.0.1", port=port, path="/", region="r", ca_bundle=None)
        client = HttpClient(endpoint, StoreConfig(bucket="b", connect_seconds=30, read_seconds=30))
        statuses = []
        for _ in range(1 if reused else 3):
            request = build_request("PUT", endpoint, "/key", {}, b"")
            statuses.append((await client.send("put", "key", request)).status)
        assert set(statuses) == {status}
        assert len(client._idle) == (1 if reused else 0)
        assert server.connections == len(statuses)
        await client.aclose()
        nursery.cancel_scope.cancel()


def endpoint_at(port: int) -> Endpoint:
    return Endpoint(is_tls=False, host="127.0.0.1", port=port, path="/", region="r", ca_bundle=None)


@pytest.mark.parametrize("banner", [b"", b"SSH-2.0-OpenSSH_9\r\n", b"HTTP/1.1 99999999999999999999 OK\r\n\r\n"])
async def test_connections_that_are_closed_at_once(banner: bytes) -> None:
    """As by a load balancer without a backend: the store is away, and nothing else."""

    async def serve(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.send_all(banner)

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, serve, 0, host="127.0.0.1"))
        endpoint = endpoint_at(listeners[0].socket.getsockname()[1])
        client = HttpClient(endpoint, StoreConfig(bucket="b", connect_seconds=30, read_seconds=30))
        for _ in range(20):
            with pytest.raises(PhfsError):
                await client.send("put", "key", build_request("PUT", endpoint, "/key", {}, b"x"))
        await client.aclose()
        nursery.cancel_scope.cancel()


class Closed:
    """A connection that ends between the look at it and the request."""

    def request(self, *_: object, **__: object) -> None:
        raise RuntimeError("AWS_ERROR_HTTP_CONNECTION_CLOSED")

    def close(self) -> None:
        """Nothing to close."""


async def test_a_connection_that_ends_before_its_request() -> None:
    endpoint = endpoint_at(9)
    client = HttpClient(endpoint, StoreConfig(bucket="b", connect_seconds=1, read_seconds=1))

    async def connection(_op: str, _subject: str) -> Closed:
        return Closed()

    client._connection = connection  # type: ignore[method-assign, assignment]
    with pytest.raises(StoreUnavailable):
        await client.send("put", "key", build_request("PUT", endpoint, "/key", {}, b"x"))


class Endless:
    """Answers of which no end comes: `first` at once, then `piece` again and again, `pause_seconds` between them."""

    def __init__(self, first: bytes, piece: bytes, pause_seconds: float) -> None:
        self._first, self._piece, self._pause_seconds = first, piece, pause_seconds
        self.sent_bytes = 0

    async def serve(self, stream: trio.SocketStream) -> None:
        async with stream:
            with suppress(trio.BrokenResourceError):
                await stream.receive_some()
                await stream.send_all(self._first)
                while True:
                    await stream.send_all(self._piece)
                    self.sent_bytes += len(self._piece)
                    await trio.sleep(self._pause_seconds)


class Keep:
    """Takes `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self._room = limit

    def begin(self, headers: Mapping[str, str]) -> None:
        """Nothing to check."""

    def feed(self, chunk: memoryview) -> bool:
        self._room -= len(chunk)
        if self._room < 0:
            raise BadAnswer("get", "key", "more bytes than asked for")
        return True


CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"
PIECE = b"10000\r\n" + b"x" * 65536 + b"\r\n"


@pytest.mark.parametrize(
    ("server", "error"),
    [
        (Endless(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n", b"<", 0.1), StoreTimeout),
        (Endless(b"HTTP/1.1 200 OK\r\n", b"X-A: b\r\n", 0.1), StoreTimeout),
        (Endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.1), StoreTimeout),
        (Endless(b"HTTP/1.1 200 OK\r\n" + CHUNKED, PIECE, 0), BadAnswer),
        (Endless(b"HTTP/1.1 500 Oops\r\n" + CHUNKED, PIECE, 0), BadAnswer),
        (Endless(b"HTTP/1.1 200 OK\r\n" + b"X-A: b\r\n" * 20_000 + CHUNKED, PIECE, 0), BadAnswer),
    ],
    ids=["a dripping body", "a dripping head", "interim answers", "an endless body", "an endless error", "headers"],
)
async def test_answers_without_end(server: Endless, error: type[PhfsError]) -> None:
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, server.serve, 0, host="127.0.0.1"))
        endpoint = endpoint_at(listeners[0].socket.getsockname()[1])
        client = HttpClient(endpoint, StoreConfig(bucket="b", connect_seconds=30, read_seconds=1))
        with trio.fail_after(30), pytest.raises(error):
            await client.send("get", "key", build_request("GET", endpoint, "/key", {}, None), Keep(MIB))
        assert server.sent_bytes < 64 * MIB
        await client.aclose()
        nursery.cancel_scope.cancel()

"""Connections of awscrt to a server that treats them as stores do."""

from __future__ import annotations

from functools import partial

import pytest
import trio

from phfs_fuse.errors import PhfsError, StoreUnavailable
from phfs_fuse.store.crt_http import Endpoint, HttpClient, build_request

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
        client = HttpClient(endpoint, connect_seconds=30, read_seconds=30)
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
        client = HttpClient(endpoint, connect_seconds=30, read_seconds=30)
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
    client = HttpClient(endpoint, connect_seconds=1, read_seconds=1)

    async def connection(_op: str, _subject: str) -> Closed:
        return Closed()

    client._connection = connection  # type: ignore[method-assign, assignment]
    with pytest.raises(StoreUnavailable):
        await client.send("put", "key", build_request("PUT", endpoint, "/key", {}, b"x"))

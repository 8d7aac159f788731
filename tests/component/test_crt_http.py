"""Connections of awscrt to a server that treats them as stores do."""

from __future__ import annotations

from functools import partial

import pytest
import trio

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

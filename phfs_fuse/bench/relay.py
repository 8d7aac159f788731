"""A TCP relay in front of the store: adds a delay, counts requests and bytes. A process of its own.

The delay is that of a longer line: each chunk towards the store leaves later than it came, in order, however many
are under way, so throughput, keep-alive and pipelining stay as they are; a new connection waits one round trip for
its handshake. All of the delay is on the way to the store, which is the same for whoever waits for an answer.
State: the connections, the counts since the start.

Standard output gets the port, then the counts as JSON for each line of standard input; its end ends the relay.
"""

from __future__ import annotations

import asyncio
import json
import re
import selectors
import sys
from collections import Counter, deque
from typing import Any, Final

BUFFER_BYTES: Final = 32 << 20  # per direction; above it the sender waits
HEAD_BYTES_MAX: Final = 64 << 10
_LENGTH: Final = re.compile(rb"(?im)^content-length:[ \t]*(\d+)")
_CHUNKED: Final = re.compile(rb"(?im)^transfer-encoding:[ \t]*chunked")


class RequestCounter:
    """Finds the HTTP/1.1 requests in the bytes of one connection. Source: RFC 9112."""

    def __init__(self, counts: Counter[str]) -> None:
        self._counts = counts
        self._head = b""
        self._body = 0  # bytes of the current body that are still to come
        self._lost = False  # a form that this cannot follow

    def feed(self, data: bytes) -> None:
        while data and not self._lost:
            if self._body:
                skipped = min(self._body, len(data))
                self._body -= skipped
                data = data[skipped:]
                continue
            self._head += data
            head, end, data = self._head.partition(b"\r\n\r\n")
            if not end:
                self._lost = len(head) > HEAD_BYTES_MAX
                return
            self._head = b""
            self._count(head)

    def _count(self, head: bytes) -> None:
        line = head.lstrip(b"\r\n").partition(b" ")[0].decode("ascii", "replace")
        self._counts[line] += 1
        length = _LENGTH.search(head)
        self._body = int(length[1]) if length else 0
        if _CHUNKED.search(head):
            self._counts["unknown"] += 1
            self._lost = True


class Line(asyncio.Protocol):
    """One end of a connection; what it receives goes to `peer`, `delay` seconds later."""

    transport: asyncio.Transport

    def __init__(self, relay: Relay, direction: str, delay: float) -> None:
        self._relay, self._direction, self._delay = relay, direction, delay
        self.peer: Line | None = None
        self._waiting: deque[tuple[float, bytes | None]] = deque()  # (due, chunk); None: the end
        self._waiting_bytes = 0
        self._counter = RequestCounter(relay.counts) if direction == "up" else None
        self._handshake_until = 0.0
        self._task: asyncio.Task[None] | None = None
        self._held = False  # by a peer that cannot send fast enough

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.set_write_buffer_limits(high=BUFFER_BYTES)
        if self._direction == "up":
            transport.pause_reading()
            self._handshake_until = self._now() + self._delay
            self._task = asyncio.get_running_loop().create_task(self._connect())

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            _, peer = await loop.create_connection(lambda: Line(self._relay, "down", 0), *self._relay.store)
        except OSError:
            self.transport.abort()
            return
        peer.peer, self.peer = self, peer
        self.transport.resume_reading()

    def data_received(self, data: bytes) -> None:
        self._relay.counts[self._direction + "_bytes"] += len(data)
        if self._counter is not None:
            self._counter.feed(data)
        self._later(data)

    def eof_received(self) -> bool:
        self._later(None)
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self._later(None)

    def pause_writing(self) -> None:
        if self.peer is not None:
            self.peer.hold(True)

    def resume_writing(self) -> None:
        if self.peer is not None:
            self.peer.hold(False)

    def hold(self, held: bool) -> None:
        self._held = held
        if held or self._waiting_bytes > BUFFER_BYTES:
            self.transport.pause_reading()
        elif not self.transport.is_closing():
            self.transport.resume_reading()

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def _later(self, chunk: bytes | None) -> None:
        if not self._delay:
            self._pass(chunk)
            return
        due = max(self._now(), self._handshake_until) + self._delay
        self._waiting.append((due, chunk))
        self._waiting_bytes += len(chunk or b"")
        self.hold(self._held)
        if len(self._waiting) == 1:
            asyncio.get_running_loop().call_at(due, self._flush)

    def _flush(self) -> None:
        while self._waiting and self._waiting[0][0] <= self._now():
            _, chunk = self._waiting.popleft()
            self._waiting_bytes -= len(chunk or b"")
            self._pass(chunk)
        if self._waiting:
            asyncio.get_running_loop().call_at(self._waiting[0][0], self._flush)
        self.hold(self._held)

    def _pass(self, chunk: bytes | None) -> None:
        if self.peer is None or self.peer.transport.is_closing():
            self.transport.close()
        elif chunk is None:
            self.peer.transport.close()
        else:
            self.peer.transport.write(chunk)


class Relay:
    def __init__(self, store: tuple[str, int], delay: float) -> None:
        self.store, self._delay = store, delay
        self.counts: Counter[str] = Counter()

    async def serve(self) -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: Line(self, "up", self._delay), "127.0.0.1", 0, backlog=512)
        print(server.sockets[0].getsockname()[1], flush=True)
        asked = asyncio.StreamReader()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(asked), sys.stdin)
        while await asked.readline():
            print(json.dumps(self.counts), flush=True)


def main(argv: list[str]) -> None:
    """`HOST PORT DELAY_SECONDS`."""
    relay = Relay((argv[0], int(argv[1])), float(argv[2]))
    # select(2) takes microseconds; epoll through Python rounds up to a millisecond.
    options: dict[str, Any] = {"loop_factory": lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())}
    with asyncio.Runner(**options) as runner:
        runner.run(relay.serve())


if __name__ == "__main__":
    main(sys.argv[1:])

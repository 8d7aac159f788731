"""HTTP/1.1 over awscrt, awaited from trio without a thread hop. Owns the connections to one endpoint.

Callbacks run on the one event-loop thread of the CRT and touch nothing but the exchange that they belong to;
trio is told by `run_sync_soon`. An await here ends only after the last callback of its exchange.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Final, Protocol

import trio
from awscrt.auth import AwsCredentialsProvider, AwsSignedBodyHeaderType, AwsSigningAlgorithm, AwsSigningConfig
from awscrt.auth import aws_sign_request as sign_request
from awscrt.exceptions import AwsCrtError
from awscrt.http import HttpClientConnection, HttpHeaders, HttpRequest
from awscrt.io import (
    ClientBootstrap,
    ClientTlsContext,
    DefaultHostResolver,
    EventLoopGroup,
    SocketOptions,
    TlsConnectionOptions,
    TlsContextOptions,
    TlsVersion,
)

from phfs_fuse.config.model import StoreConfig
from phfs_fuse.errors import BadAnswer, PhfsError, StoreTimeout, StoreUnavailable
from phfs_fuse.store.error_codes import reading
from phfs_fuse.types import KIB

log = logging.getLogger(__name__)

ERROR_BODY_BYTES_MAX: Final = 64 * KIB
HEADERS_CHARS_MAX: Final = 64 * KIB
CLOSE_SECONDS: Final = 5.0
KEEPALIVE_SECONDS: Final = 15
KEEPALIVE_PROBES: Final = 4


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where the bucket is. `path` leads to its objects and ends in "/"."""

    is_tls: bool
    host: str
    port: int
    path: str
    region: str
    ca_bundle: str | None

    @property
    def host_header(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.is_tls else 80) else f"{host}:{self.port}"


class Unreadable(BadAnswer):
    """A header that is not UTF-8, as foreign metadata may be: awscrt gives up on the whole answer."""


class Consumer(Protocol):
    """Takes a good answer, on the event-loop thread; what it raises ends the exchange."""

    def begin(self, headers: Mapping[str, str]) -> None: ...

    def feed(self, chunk: memoryview) -> bool: ...


_KINDS: Final[Mapping[str, type[PhfsError]]] = {
    "AWS_IO_SOCKET_TIMEOUT": StoreTimeout,
    "AWS_IO_TLS_NEGOTIATION_TIMEOUT": StoreTimeout,
    "AWS_ERROR_HTTP_PROTOCOL_ERROR": BadAnswer,
    "AWS_ERROR_HTTP_PARSE": BadAnswer,
    "AWS_ERROR_UNKNOWN": Unreadable,  # what awscrt makes of an exception in its own Python code
}

_WORDS: Final[Mapping[str, str]] = {  # by what the names of awscrt's errors begin with; the first that fits
    "AWS_IO_SOCKET_CONNECTION_REFUSED": "connection refused",
    "AWS_IO_SOCKET_TIMEOUT": "no answer in time",
    "AWS_IO_SOCKET_NETWORK_DOWN": "the network is down",
    "AWS_IO_SOCKET_NO_ROUTE": "no route to the host",
    "AWS_IO_SOCKET": "the connection was closed",
    "AWS_IO_BROKEN_PIPE": "the connection was closed",
    "AWS_IO_DNS": "no such host",
    "AWS_IO_TLS_NEGOTIATION_TIMEOUT": "TLS was not agreed on in time",
    "AWS_IO_TLS_ERROR_NEGOTIATION_FAILURE": "TLS failed: certificate not trusted, or not TLS",
    "AWS_IO_TLS": "TLS failed",
    "AWS_ERROR_HTTP_CONNECTION_CLOSED": "the connection was closed",
    "AWS_ERROR_HTTP_SERVER_CLOSED": "the connection was closed",
    "AWS_ERROR_HTTP": "the answer is no HTTP",
    "AWS_ERROR_UNKNOWN": "a header that is not UTF-8",
}


class Exchange:
    """One request under way. `progress` grows with each sign of life from the store; `stop` ends it early."""

    def __init__(self, consumer: Consumer | None, stop: Callable[[], object]) -> None:
        self.status = 0
        self.headers: Mapping[str, str] = {}
        self.error_body = b""
        self.failure: Exception | None = None
        self.progress = 0
        self._consumer = consumer
        self._stop = stop

    @property
    def is_good(self) -> bool:
        return 200 <= self.status < 300

    @property
    def leaves_open(self) -> bool:
        """Whether the store goes on with the connection. MinIO closes it after a 412 without saying so; who is
        quick sends the next request into the void."""
        return self.is_good or self.status == 404

    def on_response(self, status_code: int, headers: Sequence[tuple[str, str]], **_: object) -> None:
        self.progress += 1
        self.status = status_code
        self.headers = {name.lower(): value for name, value in headers}
        if sum(len(name) + len(value) for name, value in headers) > HEADERS_CHARS_MAX:
            self._fail(BadAnswer("read", "headers", f"over {HEADERS_CHARS_MAX // KIB} KiB of headers"))
        elif self.is_good and self._consumer is not None:
            self._guarded(self._consumer.begin, self.headers)

    def on_body(self, chunk: bytes, **_: object) -> None:
        self.progress += 1
        if self.failure is not None:
            return
        if not self.is_good:
            self.error_body += chunk
            if len(self.error_body) > ERROR_BODY_BYTES_MAX:
                self._fail(BadAnswer("read", "an error", f"over {ERROR_BODY_BYTES_MAX // KIB} KiB of text"))
        elif self._consumer is not None:
            self._guarded(self._consumer.feed, memoryview(chunk))

    def _guarded(self, call: Any, argument: object) -> None:
        """awscrt prints what a callback raises; keep it for the task that waits instead."""
        try:
            call(argument)
        except Exception as exc:
            self._fail(exc)

    def _fail(self, exc: Exception) -> None:
        """The rest of the answer may be without end: it is not waited for."""
        self.failure = exc
        self._stop()


class HttpClient:
    """Keeps connections for reuse; how many are open at a time is up to the callers' limits."""

    def __init__(self, endpoint: Endpoint, config: StoreConfig) -> None:
        self.endpoint = endpoint
        self._config = config
        self._idle: list[HttpClientConnection] = []
        group = EventLoopGroup(1)
        self._bootstrap = ClientBootstrap(group, DefaultHostResolver(group))
        self._socket = SocketOptions()
        self._socket.connect_timeout_ms = int(config.connect_seconds * 1000)
        self._socket.keep_alive = True  # a store that is gone is found out while it should be copying
        self._socket.keep_alive_timeout_secs = self._socket.keep_alive_interval_secs = KEEPALIVE_SECONDS
        self._socket.keep_alive_max_probes = KEEPALIVE_PROBES
        self._tls = _tls_options(endpoint) if endpoint.is_tls else None

    async def send(
        self,
        op: str,
        subject: str,
        request: HttpRequest,
        consumer: Consumer | None = None,
        *,
        moved_bytes: int = 0,
        copied_bytes: int = 0,
    ) -> Exchange:
        """The answer, whole. The deadline follows from how much is sent and answered (`moved_bytes`) and how much the
        store copies before it answers.
        Raises: StoreUnavailable, StoreTimeout, BadAnswer, or what `consumer` raised."""
        connection = await self._connection(op, subject)
        exchange = Exchange(consumer, connection.close)
        deadline = trio.current_time() + self._config.total_seconds(moved_bytes + copied_bytes)
        silent_seconds = self._config.silent_seconds(copied_bytes)
        try:
            stream = connection.request(request, on_response=exchange.on_response, on_body=exchange.on_body)
            stream.activate()
            future = stream.completion_future
            await self._completion(op, subject, future, exchange, connection, deadline, silent_seconds)
        except PhfsError:
            raise
        except Exception as exc:
            connection.close()
            if exchange.failure is None:
                raise _error_of(exc, op, subject) from exc
        if exchange.failure is not None:
            connection.close()
            with reading(op, subject):
                raise exchange.failure
        if exchange.leaves_open and connection.is_open():
            self._idle.append(connection)
        else:
            connection.close()
        return exchange

    async def aclose(self) -> None:
        closing = [connection.close() for connection in self._idle]
        self._idle.clear()
        with trio.move_on_after(CLOSE_SECONDS):
            for future in closing:
                await _done(future).wait()

    async def _connection(self, op: str, subject: str) -> HttpClientConnection:
        while self._idle:
            if (connection := self._idle.pop()).is_open():
                return connection
        with told(op, subject):
            future = HttpClientConnection.new(
                self.endpoint.host,
                self.endpoint.port,
                self._bootstrap,
                self._socket,
                self._tls,
            )
        try:
            with trio.fail_after(self._config.connect_seconds):  # of the name look-up and TLS too
                await _done(future).wait()
        except BaseException as exc:
            future.add_done_callback(_close_late)
            if isinstance(exc, trio.TooSlowError):
                raise StoreTimeout(op, subject, "no connection in time") from exc
            raise
        with told(op, subject):
            return future.result()

    async def _completion(
        self,
        op: str,
        subject: str,
        future: Future[int],
        exchange: Exchange,
        connection: HttpClientConnection,
        deadline: float,
        silent_seconds: float,
    ) -> None:
        """Wait for the end of an exchange; end it when nothing moves, at its deadline, or when cancelled."""
        done = _done(future)
        try:
            while not done.is_set():
                seen = exchange.progress
                silent_at = trio.current_time() + silent_seconds
                with trio.move_on_at(min(silent_at, deadline)):
                    await done.wait()
                if not done.is_set() and exchange.progress == seen and trio.current_time() >= silent_at:
                    raise StoreTimeout(op, subject, f"nothing came for {silent_seconds:g} s")
                if not done.is_set() and trio.current_time() >= deadline:
                    raise StoreTimeout(op, subject, "the answer comes too slowly to end in time")
        finally:
            if not done.is_set():
                connection.close()
                with trio.CancelScope(shield=True):  # short: the connection is closed
                    await done.wait()
        future.result()


def _done(future: Future[Any]) -> trio.Event:
    """Set, on the trio thread, when `future` is done."""
    event = trio.Event()
    token = trio.lowlevel.current_trio_token()

    def tell(_: object) -> None:
        try:
            token.run_sync_soon(event.set)
        except trio.RunFinishedError:
            return  # nobody waits any more

    future.add_done_callback(tell)
    return event


def _close_late(future: Future[HttpClientConnection]) -> None:
    if future.exception() is None:
        future.result().close()


def _tls_options(endpoint: Endpoint) -> TlsConnectionOptions:
    context = TlsContextOptions()
    context.min_tls_ver = TlsVersion.TLSv1_2
    if endpoint.ca_bundle:
        context.override_default_trust_store_from_path(None, endpoint.ca_bundle)
    options = ClientTlsContext(context).new_connection_options()
    options.set_server_name(endpoint.host)
    return options


@contextmanager
def told(op: str, subject: str) -> Iterator[None]:
    """Let what awscrt raises leave the block as a `PhfsError`."""
    try:
        yield
    except Exception as exc:
        raise _error_of(exc, op, subject) from exc


def _error_of(exc: Exception, op: str, subject: str) -> PhfsError:
    """awscrt raises its own errors, RuntimeError for a connection that the other side has closed already, and
    Python's own for some of its codes."""
    if isinstance(exc, AwsCrtError):
        log.debug("%s %s: %s", op, subject, exc.name)
        reason = next((words for name, words in _WORDS.items() if exc.name.startswith(name)), "the request failed")
        return _KINDS.get(exc.name, StoreUnavailable)(op, subject, reason)
    reason = "the connection was closed" if isinstance(exc, RuntimeError) else type(exc).__name__
    return StoreUnavailable(op, subject, reason)


def build_request(method: str, endpoint: Endpoint, path: str, headers: Mapping[str, str], body: bytes | None) -> Any:
    """A request that is not signed yet; `path` is encoded."""
    pairs = [("Host", endpoint.host_header), *headers.items()]
    if body is not None:
        pairs.append(("Content-Length", str(len(body))))
    return HttpRequest(method, path, HttpHeaders(pairs), None if body is None else BytesIO(body))


async def sign(request: HttpRequest, provider: AwsCredentialsProvider, region: str, payload_hash: str) -> None:
    """Add a Signature Version 4. `payload_hash` as in `x-amz-content-sha256`."""
    config = AwsSigningConfig(
        algorithm=AwsSigningAlgorithm.V4,
        credentials_provider=provider,
        region=region,
        service="s3",
        signed_body_value=payload_hash,
        signed_body_header_type=AwsSignedBodyHeaderType.X_AMZ_CONTENT_SHA_256,
        use_double_uri_encode=False,
        should_normalize_uri_path=False,
    )
    future = sign_request(request, config)
    if not future.done():  # with known credentials it is
        await _done(future).wait()
    future.result()

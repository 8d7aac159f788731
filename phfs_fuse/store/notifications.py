"""MinIO's stream of changes. Owns one connection, the thread that reads it and what is not delivered yet.

Source: MinIO's ListenBucketNotification: `GET /bucket?events=...&prefix=...&ping=SECONDS` answers 200 with type
text/event-stream and one line of JSON for each change, or without records as a ping; the head of the answer comes
with the first line. Keys are not URL-encoded there (unlike those of bucket notifications). Older versions do not
know `ping` and send a blank twice a second. Other stores take the request for a listing.

MinIO of October 2025 and later (52eee5a2f) does not flush what it writes: lines come when some kilobytes have
gathered, cut anywhere. So the stream counts as open when two pieces in a row end with a line, and as lost when none
does for a while.

The server drops events for a reader that is too slow, and does not say so. Then it had a full queue, which it
delivers afterwards: many events at once mean that some may be missing.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, Final
from urllib.parse import quote, urlsplit

import trio
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.httpsession import URLLib3Session
from botocore.utils import get_environ_proxies

from phfs_fuse.config import json_text
from phfs_fuse.config.model import StoreConfig
from phfs_fuse.errors import BadAnswer, CredentialsRefused, NotSupported, PhfsError, StoreUnavailable
from phfs_fuse.store.base import Listener, StoreEvent
from phfs_fuse.store.clients import Clients, translated
from phfs_fuse.store.error_codes import error_code, error_of, reading
from phfs_fuse.store.headers import size_of, user_metadata
from phfs_fuse.types import KIB, MIB, ETag, ObjectKey

PING_SECONDS: Final = 1
SILENT_SECONDS: Final = 5.0  # without a byte: the connection is dead
WHOLE_CHUNKS: Final = 2
CHUNK_BYTES: Final = 64 * KIB
LINE_BYTES_MAX: Final = MIB
EVENTS_MAX: Final = 20_000  # read and not delivered
SLICE: Final = 200  # events delivered in one go
# So many events in so many seconds may be what a server had held back, and more that it has dropped; its queue is as
# long as the number of requests that it allows at a time, thousands by default.
BURSTS: Final = ((1000, 2.0), (5000, 30.0))
CREATED: Final = "s3:ObjectCreated:"
REMOVED: Final = "s3:ObjectRemoved:"


class EventStream:
    """Of the changes below `prefix`, from `run` on."""

    def __init__(self, clients: Clients, config: StoreConfig, prefix: str, listener: Listener) -> None:
        self._clients = clients
        self._config = config
        self._prefix = prefix
        self._listener = listener
        self._read: deque[StoreEvent | None] = deque()  # None: the stream is open
        self._dropped = False
        self._is_flushed = False  # lines come when they are written
        self._is_open = False  # the listener knows
        self._wake = trio.Event()
        self._token = trio.lowlevel.current_trio_token()
        self._ended = False
        self._failure: PhfsError = StoreUnavailable("listen", prefix, "the stream has ended")
        self._times: deque[float] = deque(maxlen=max(count for count, _ in BURSTS))  # of the last events

    async def run(self) -> None:
        """Raises: PhfsError, always."""
        async with trio.open_nursery() as nursery:

            async def read() -> None:
                try:
                    await trio.to_thread.run_sync(
                        self._read_all, abandon_on_cancel=True, limiter=trio.CapacityLimiter(1)
                    )
                except PhfsError as exc:
                    self._failure = exc
                except OSError as exc:  # of the connection: nothing else is read there
                    self._failure = StoreUnavailable("listen", self._prefix, exc.strerror or type(exc).__name__)
                nursery.cancel_scope.cancel()

            nursery.start_soon(read)
            try:
                await self._deliver()
            finally:
                self._ended = True
        raise self._failure

    # -- on the trio thread

    async def _deliver(self) -> None:
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            while self._read or self._dropped:
                if self._dropped:
                    self._dropped = False
                    self._listener.missed()
                self._deliver_slice()
                await trio.lowlevel.checkpoint()

    def _deliver_slice(self) -> None:
        events: list[StoreEvent] = []
        while len(events) < SLICE:
            try:
                event = self._read.popleft()
            except IndexError:  # the other thread may just have thrown them away
                break
            if event is None:
                self._is_open = True
                self._listener.opened()
            else:
                events.append(event)
        if not events:
            return
        now = trio.current_time()
        self._times.extend([now] * len(events))
        if any(len(self._times) >= count and now - self._times[-count] < seconds for count, seconds in BURSTS):
            self._listener.missed()
        self._listener.heard(events)

    # -- on the thread that reads: as fast as events come, whatever the other thread does

    def _read_all(self) -> None:
        with reading("listen", self._prefix), translated("listen", self._prefix):
            response = self._open()
            try:
                for line in self._lines(response.raw):
                    for event in parse_events(line):
                        if event.key.startswith(self._prefix):
                            self._tell(event)
            finally:
                response.raw.close()

    def _tell(self, event: StoreEvent | None) -> None:
        if len(self._read) >= EVENTS_MAX:
            self._read.clear()
            self._dropped = True
            if not self._is_open:
                self._read.append(None)
        self._read.append(event)
        try:
            self._token.run_sync_soon(self._set_wake, idempotent=True)
        except trio.RunFinishedError:
            self._ended = True

    def _set_wake(self) -> None:
        self._wake.set()

    def _open(self) -> Any:
        request = AWSRequest("GET", self._url())
        credentials = self._clients.session.get_credentials()
        if credentials is None:
            raise CredentialsRefused("listen", self._prefix, "the credentials are gone")
        S3SigV4Auth(credentials.get_frozen_credentials(), "s3", self._clients.region).add_auth(request)
        prepared = request.prepare()
        prepared.stream_output = True
        session: Any = URLLib3Session  # takes more than its stubs say
        http = session(
            verify=self._clients.ca_bundle or True,
            proxies=get_environ_proxies(prepared.url),
            timeout=(self._config.connect_seconds, SILENT_SECONDS),
        )
        response: Any = http.send(prepared)
        if response.status_code != 200:
            raise error_of("listen", self._prefix, error_code(response.content), response.status_code)
        if "event-stream" not in response.headers.get("content-type", ""):
            response.raw.close()
            raise NotSupported("listen", self._prefix, "the store has no stream of events")
        return response

    def _url(self) -> str:
        bucket = self._clients.plain.generate_presigned_url("list_objects_v2", Params={"Bucket": self._config.bucket})
        parts = urlsplit(bucket)
        query = {"prefix": self._prefix, "ping": str(PING_SECONDS), "max-keys": "1"}
        pairs = [*query.items(), ("events", CREATED + "*"), ("events", REMOVED + "*")]
        text = "&".join(f"{name}={quote(value, safe='-_.~')}" for name, value in sorted(pairs))
        return f"{parts.scheme}://{parts.netloc}{parts.path}?{text}"

    def _lines(self, raw: Any) -> Iterator[bytes]:
        """Raises: BadAnswer for a line without end."""
        rest, whole, whole_at = b"", 0, time.monotonic()
        for chunk in raw.stream(CHUNK_BYTES, decode_content=False):
            if self._ended:
                return
            *lines, rest = (rest + chunk).split(b"\n")
            yield from lines
            rest = rest.lstrip()  # blanks of the old form
            if len(rest) > LINE_BYTES_MAX:
                raise BadAnswer("listen", self._prefix, "a line without end")
            now = time.monotonic()
            whole, whole_at = (0, whole_at) if rest else (whole + 1, now)
            if whole == WHOLE_CHUNKS and not self._is_flushed:
                self._is_flushed = True
                self._tell(None)
            elif now - whole_at > SILENT_SECONDS:
                raise StoreUnavailable("listen", self._prefix, "the store, or a proxy before it, holds events back")


def parse_events(line: bytes) -> list[StoreEvent]:
    """The changes in one line. Raises: BadAnswer."""
    if not line.strip():
        return []
    with reading("listen", "event"):
        records = json_text.parse(line).get("Records") or ()
        return [event for record in records if (event := _event(record)) is not None]


def _event(record: Mapping[str, Any]) -> StoreEvent | None:
    found, name = record["s3"]["object"], record["eventName"]
    key = ObjectKey(str(found["key"]))
    key.encode()  # half surrogates are no key
    if name.startswith(REMOVED):
        return StoreEvent(key=key, etag=None, size=0, metadata={})
    if not name.startswith(CREATED):
        return None
    headers = {str(field): str(value) for field, value in (found.get("userMetadata") or {}).items()}
    etag = ETag(str(found.get("eTag", "")).strip('"'))
    size = size_of(str(found.get("size", 0)), "listen", key)
    return StoreEvent(key=key, etag=etag, size=size, metadata=user_metadata(headers))

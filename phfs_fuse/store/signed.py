"""Signed requests to one bucket by awscrt. Owns the HTTP client and the credentials that are signed with."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Mapping
from typing import Final
from urllib.parse import quote, urlencode, urlsplit

import trio
from awscrt.auth import AwsCredentialsProvider, AwsSignedBodyValue
from botocore.utils import get_environ_proxies

from phfs_fuse import metrics
from phfs_fuse.config.model import StoreConfig
from phfs_fuse.store.clients import Clients, translated
from phfs_fuse.store.clock import StoreClock
from phfs_fuse.store.crt_http import Consumer, Endpoint, HttpClient, build_request, sign, told
from phfs_fuse.store.error_codes import error_code, error_of, reading
from phfs_fuse.types import ObjectKey

log = logging.getLogger(__name__)

CREDENTIALS_SECONDS: Final = 30.0  # how long they are taken for fresh; botocore renews minutes ahead
UNSIGNED: Final[str] = AwsSignedBodyValue.UNSIGNED_PAYLOAD
NO_BODY: Final[str] = AwsSignedBodyValue.EMPTY_SHA256
UNRESERVED: Final = "/-_.~"


class Credentials:
    """Those of the boto3 session, in the form that signing takes."""

    def __init__(self, clients: Clients) -> None:
        self._clients = clients
        self._provider: AwsCredentialsProvider | None = None
        self._stale_at = 0.0

    async def provider(self) -> AwsCredentialsProvider:
        now = time.monotonic()
        if self._provider is None or now >= self._stale_at:
            frozen = await trio.to_thread.run_sync(self._clients.credentials)
            self._provider = AwsCredentialsProvider.new_static(
                frozen.access_key, frozen.secret_key, frozen.token or None
            )
            self._stale_at = now + CREDENTIALS_SECONDS
        return self._provider


class Signed:
    """Signed requests to one bucket."""

    def __init__(self, clients: Clients, endpoint: Endpoint, config: StoreConfig, clock: StoreClock) -> None:
        self.clients, self._clock = clients, clock
        self._endpoint = endpoint
        self._credentials = Credentials(clients)
        self._http = HttpClient(endpoint, config)

    async def send(
        self,
        op: str,
        method: str,
        key: ObjectKey,
        headers: Mapping[str, str],
        *,
        query: Mapping[str, str] | None = None,
        body: bytes | None = None,
        payload_hash: str = NO_BODY,
        consumer: Consumer | None = None,
        moved_bytes: int = 0,
        copied_bytes: int = 0,
    ) -> Mapping[str, str]:
        """A request about an object. Returns the headers of a good answer, names in lower case. `moved_bytes`: in the
        answer; `copied_bytes`: within the store. Raises: what the answer means otherwise."""
        path = self._endpoint.path + quote(key, safe=UNRESERVED)
        return await self._send(
            op, key, method, path, headers, query, body, payload_hash, consumer, moved_bytes, copied_bytes
        )

    async def ask_bucket(
        self, op: str, subject: str, query: Mapping[str, str], consumer: Consumer
    ) -> Mapping[str, str]:
        """A GET about the bucket; as `send`."""
        path = self._endpoint.path.rstrip("/") or "/"
        return await self._send(op, subject, "GET", path, {}, query, None, NO_BODY, consumer)

    async def _send(
        self,
        op: str,
        subject: str,
        method: str,
        path: str,
        headers: Mapping[str, str],
        query: Mapping[str, str] | None,
        body: bytes | None,
        payload_hash: str,
        consumer: Consumer | None,
        moved_bytes: int = 0,
        copied_bytes: int = 0,
    ) -> Mapping[str, str]:
        target = f"{path}?{urlencode(query, quote_via=quote)}" if query else path
        provider = await self._credentials.provider()
        with told(op, subject):
            request = build_request(method, self._endpoint, target, headers, body)
            await sign(request, provider, self._endpoint.region, payload_hash)
        metrics.STORE_REQUESTS.add(1, op)
        moved_bytes += len(body or b"")
        exchange = await self._http.send(
            op, subject, request, consumer, moved_bytes=moved_bytes, copied_bytes=copied_bytes
        )
        self._clock.heard(exchange.headers)
        if not exchange.is_good:
            raise error_of(op, subject, error_code(exchange.error_body), exchange.status)
        return exchange.headers

    def payload_hash(self, body: bytes) -> str:
        """Over TLS the channel protects the body; else the signature has to cover it."""
        if self._endpoint.is_tls:
            return UNSIGNED
        return hashlib.sha256(body).hexdigest()

    async def aclose(self) -> None:
        await self._http.aclose()


def endpoint_of(clients: Clients, bucket: str) -> Endpoint | None:
    """The place to which botocore would send requests for objects of `bucket`; None if only botocore can: through a
    proxy. Blocks."""
    with reading("connect", bucket), translated("connect", bucket):
        url = clients.plain.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": "k"})
        parts = urlsplit(url)
        if parts.hostname is None or parts.scheme in get_environ_proxies(url):
            log.info("boto3 does all requests: there is a proxy")
            return None
    is_tls = parts.scheme == "https"
    return Endpoint(
        is_tls=is_tls,
        host=parts.hostname,
        port=parts.port or (443 if is_tls else 80),
        path=parts.path.removesuffix("k"),
        region=clients.region,
        ca_bundle=clients.authorities,
    )

"""boto3's clients for one bucket, and botocore's exceptions to `PhfsError`s. Owns no state.

Creating a client reads files and may ask a metadata service: always on a thread.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import boto3.session
import botocore.exceptions as bexc
import botocore.session
import urllib3.exceptions
from botocore.auth import AUTH_TYPE_MAPS, S3SigV4Auth
from botocore.config import Config
from botocore.credentials import ReadOnlyCredentials
from botocore.httpsession import get_cert_path
from botocore.loaders import Loader, create_loader
from botocore.parsers import ResponseParserError
from botocore.session import Session
from botocore.utils import get_environ_proxies

from phfs_fuse.config.model import StoreConfig
from phfs_fuse.errors import BadAnswer, CredentialsRefused, InvalidArgument, PhfsError, StoreTimeout, StoreUnavailable
from phfs_fuse.store.error_codes import error_of, reading
from phfs_fuse.store.listing_xml import is_xml, parse_listing

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

log = logging.getLogger(__name__)

DEFAULT_REGION: Final = "us-east-1"
PAGE: Final = "PhfsListing"  # name of the parsed page in the answer of list_objects_v2
HEADERS: Final = "PhfsHeaders"  # parameter of a call by boto3: headers to be sent as they are
SILENCE: Final = "PhfsSilence"  # likewise: seconds without a byte, in place of the configured ones

_NO_CREDENTIALS: Final = "no usable credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or name a profile"
_NO_TRUST: Final = "TLS failed; name the authority of the store's certificate with --ca-bundle"
_CREDENTIAL_ERRORS: Final = (
    bexc.NoCredentialsError,
    bexc.PartialCredentialsError,
    bexc.CredentialRetrievalError,
    bexc.ConfigNotFound,
    bexc.ConfigParseError,
    bexc.SSOError,
    bexc.TokenRetrievalError,
    bexc.InvalidConfigError,
    bexc.UnknownCredentialError,
    bexc.RefreshWithMFAUnsupportedError,
)
_BY_TYPE: Final[Sequence[tuple[tuple[type[Exception], ...], type[PhfsError], str]]] = (  # the first that fits
    (_CREDENTIAL_ERRORS, CredentialsRefused, _NO_CREDENTIALS),
    ((bexc.ConnectTimeoutError,), StoreTimeout, "no connection in time"),
    ((bexc.ReadTimeoutError, urllib3.exceptions.TimeoutError), StoreTimeout, "no answer in time"),
    ((bexc.SSLError,), StoreUnavailable, _NO_TRUST),
    ((bexc.ProxyConnectionError,), StoreUnavailable, "the proxy cannot be reached"),
    ((bexc.EndpointConnectionError,), StoreUnavailable, "no connection"),
    ((bexc.IncompleteReadError,), BadAnswer, "the answer broke off"),
    ((ResponseParserError,), BadAnswer, "the answer is no S3"),
    (
        (bexc.HTTPClientError, bexc.ConnectionError, urllib3.exceptions.HTTPError),
        StoreUnavailable,
        "the connection broke",
    ),
)


_WRITTEN: Final = ("env", "explicit", "shared-credentials-file", "config-file")  # botocore's words for static sources
FileState = tuple[int, int, int] | None
"""Inode, size in bytes and time of change in ns of a file; None: it is not there."""


def _file_state(path: str) -> FileState:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


@dataclass(frozen=True, slots=True)
class Clients:
    """`listing` asks for user metadata in listings, `plain` does not. Both may be used by many threads."""

    session: Session
    plain: S3Client
    listing: S3Client
    ca_bundle: str | None  # from --ca-bundle, AWS_CA_BUNDLE or the profile
    files: Mapping[str, FileState]  # what credentials and certificates were read from

    @property
    def endpoint_url(self) -> str:
        return self.plain.meta.endpoint_url

    @property
    def region(self) -> str:
        return self.plain.meta.region_name

    @property
    def authorities(self) -> str | None:
        """The file of those that the store's certificate is checked against."""
        return self.ca_bundle or get_cert_path(True)

    @property
    def proxies(self) -> Mapping[str, str]:
        """Proxies by scheme of the URL, as the environment names them for the endpoint."""
        return get_environ_proxies(self.endpoint_url)

    @property
    def is_aws(self) -> bool:
        return _is_aws(self.endpoint_url)

    def is_outdated(self) -> bool:
        """Whether a file has changed that credentials or certificates were read from. Blocks."""
        return any(_file_state(path) != state for path, state in self.files.items())

    def credentials(self) -> ReadOnlyCredentials:
        """Those to sign with now. Blocks where they have to be renewed. Raises: CredentialsRefused."""
        with reading("sign", "credentials"), translated("sign", "credentials"):
            if (source := self.session.get_credentials()) is None:  # open_clients found some
                raise CredentialsRefused("sign", "request", "the credentials are gone")
            return source.get_frozen_credentials()

    @property
    def has_source_of_credentials(self) -> bool:
        """Whether others may be had without a change of `files`: from a service, a role or a program."""
        source = self.session.get_credentials()
        return source is None or source.method not in _WRITTEN

    def has_credentials_of(self, other: Clients) -> bool:
        """Blocks. Raises: CredentialsRefused."""
        return self.credentials() == other.credentials()

    def bucket_region(self, bucket: str) -> str | None:
        """The region that the store names for the bucket. Blocks."""
        try:
            return self.plain.head_bucket(Bucket=bucket).get("BucketRegion")
        except (bexc.BotoCoreError, bexc.ClientError) as exc:
            log.info("the region of the bucket is not told: %s", type(exc).__name__)
            return None

    def close(self) -> None:
        self.plain.close()
        self.listing.close()


def open_clients(config: StoreConfig, core: Session | None = None, region: str | None = None) -> Clients:
    """Blocks. `core` brings credentials of its own; None: the usual chain. `region` goes before all others.

    Raises: CredentialsRefused without credentials, InvalidArgument for a wrong endpoint or profile.
    """
    name = endpoint_name(config)
    try:
        with translated("connect", name):
            return _open_clients(config, name, core or _session(), region)
    except ValueError as exc:  # botocore's for a wrong endpoint
        raise InvalidArgument("connect", name, str(exc)) from exc


def _session() -> Session:
    core = botocore.session.get_session()
    core.register_component("data_loader", _loader(core.get_config_variable("data_path")))
    return core


@cache
def _loader(data_path: str | None) -> Loader:
    """botocore's models, read once for all clients of this process and its forks."""
    return create_loader(data_path)


def warm() -> None:
    """Make clients that are never used: what they load and parse stays."""
    core = _session()
    core.set_credentials("none", "none")
    open_clients(StoreConfig(bucket="none", endpoint_url="http://127.0.0.1:9", region=DEFAULT_REGION), core).close()


def _open_clients(config: StoreConfig, name: str, core: Session, region: str | None) -> Clients:
    given = {"profile": config.profile, "region": region or config.region, "ca_bundle": config.ca_bundle}
    for variable, value in given.items():
        if value is not None:
            core.set_config_variable(variable, str(value))
    ca_bundle = core.get_config_variable("ca_bundle")
    paths = [core.get_config_variable("credentials_file"), core.get_config_variable("config_file"), ca_bundle]
    files = {path: _file_state(path) for path in map(os.path.expanduser, filter(None, paths))}
    if core.get_credentials() is None:
        raise CredentialsRefused("connect", name, _NO_CREDENTIALS)
    maker = boto3.session.Session(botocore_session=core)
    style = "auto" if config.path_style is None else "path" if config.path_style else "virtual"
    plain = _client(maker, config, style)
    if config.path_style is None and not _is_aws(plain.meta.endpoint_url):
        style = "path"  # known only now: the endpoint may come from a profile or a variable
        plain = _client(maker, config, style)
    listing = _client(maker, config, style)
    listing.meta.events.register("before-call.s3.ListObjectsV2", _ask_for_metadata)
    clients = Clients(core, plain, listing, ca_bundle, files)
    if region is not None or not clients.is_aws:
        return clients
    found = clients.bucket_region(config.bucket)  # AWS answers only there
    if found in (None, clients.region):
        return clients
    clients.close()
    return _open_clients(config, name, _session(), found)


def endpoint_name(config: StoreConfig) -> str:
    """The endpoint for messages: without user and password."""
    parts = urlsplit(config.endpoint_url or "")
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}" if parts.netloc else "the S3 endpoint"


def _is_aws(endpoint_url: str) -> bool:
    host = urlsplit(endpoint_url).hostname or ""
    return host.endswith((".amazonaws.com", ".amazonaws.com.cn"))


def _client(maker: boto3.session.Session, config: StoreConfig, style: str) -> S3Client:
    settings = Config(
        connect_timeout=config.connect_seconds,
        read_timeout=config.read_seconds,
        max_pool_connections=config.reads_max + config.writes_max,
        retries={"total_max_attempts": 1, "mode": "standard"},  # ours are in store.retry
        # GCS and older stores refuse trailing checksums (`aws-chunked`). Over HTTP the signature covers the
        # SHA-256 of the body, over HTTPS the channel protects it.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        s3={"addressing_style": style},  # type: ignore[arg-type]
        tcp_keepalive=True,
        user_agent_extra="phfs-fuse",
    )
    # With awscrt there botocore signs by that, which reads the body 4 KiB at a time, each a call of the interpreter.
    AUTH_TYPE_MAPS["s3v4"] = S3SigV4Auth
    region = maker.region_name or DEFAULT_REGION
    client = maker.client("s3", region_name=region, endpoint_url=config.endpoint_url, config=settings)
    client.meta.events.register("before-parse.s3.ListObjectsV2", _parse_listing)
    client.meta.events.register("before-call.s3.DeleteObjects", _add_md5)
    client.meta.events.register("provide-client-params.s3", _take_own)
    client.meta.events.register("before-call.s3", _send_headers)
    return client


def _take_own(params: dict[str, Any], context: dict[str, Any], **_: object) -> None:
    """botocore's parameters say less than headers can: what an answer told goes into the request as it was."""
    context[HEADERS] = params.pop(HEADERS, {})
    if (seconds := params.pop(SILENCE, None)) is not None:
        context["read_timeout"] = seconds  # before botocore 1.44 without effect


def _send_headers(params: dict[str, Any], context: dict[str, Any], **_: object) -> None:
    params["headers"].update(context.get(HEADERS, {}))


def _ask_for_metadata(params: dict[str, Any], **_: object) -> None:
    params["url"] += "&metadata=true"


def _add_md5(params: dict[str, Any], **_: object) -> None:
    """Older stores ask for Content-MD5 and do not know the CRC32 that botocore sends."""
    digest = hashlib.md5(params["body"], usedforsecurity=False).digest()
    params["headers"]["Content-MD5"] = base64.b64encode(digest).decode()


def _parse_listing(response_dict: dict[str, Any], customized_response_dict: dict[str, Any], **_: object) -> None:
    """Parse the page here; botocore gets an empty one in its place."""
    status, body = response_dict["status_code"], response_dict["body"]
    if status == 200:
        customized_response_dict[PAGE] = parse_listing("page", body)
        response_dict["body"] = b"<ListBucketResult/>"
    elif status == 500 and not is_xml(body):  # botocore has turned a 200 whose body is no XML into this
        raise BadAnswer("list", "page", "no XML")


@contextmanager
def translated(op: str, subject: str) -> Iterator[None]:
    """Let only `PhfsError`s, and errors that are none of botocore's, leave the block."""
    try:
        yield
    except (bexc.BotoCoreError, bexc.ClientError, ResponseParserError, urllib3.exceptions.HTTPError) as exc:
        raise _error_of(exc, op, subject) from exc


def _error_of(exc: Exception, op: str, subject: str) -> PhfsError:
    if isinstance(exc, bexc.ClientError):
        status = exc.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500)
        return error_of(op, subject, exc.response.get("Error", {}).get("Code", ""), status)
    if isinstance(exc, bexc.ProfileNotFound):
        return CredentialsRefused(op, subject, str(exc))
    for types, kind, reason in _BY_TYPE:  # the text of some names secrets (the output of a credential process)
        if isinstance(exc, types):
            log.debug("%s %s: %s", op, subject, type(exc).__name__)
            return kind(op, subject, reason)
    return InvalidArgument(op, subject, str(exc))  # of the settings: the text says which

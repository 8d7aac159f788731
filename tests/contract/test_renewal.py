"""Credentials, regions and certificates that are other than at the start, or than was configured."""

from __future__ import annotations

import json
import os
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import trio

from phfs_fuse.config.model import StoreConfig
from phfs_fuse.errors import AccessDenied, StoreUnavailable
from phfs_fuse.store import access
from phfs_fuse.store.base import Expect
from phfs_fuse.store.diagnosis import diagnose
from phfs_fuse.store.s3 import S3Store
from tests.contract.conftest import BUCKET
from tests.contract.faulty import BIG, SMALL, opened
from tests.support.servers import ACCESS_KEY, SECRET_KEY, Server, minio, silent, unreachable

pytestmark = pytest.mark.usefixtures("credentials")


@pytest.fixture
def credentials_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only source of credentials; it holds the right ones."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    path = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(path))
    write(path, SECRET_KEY)
    return path


def write(path: Path, secret: str) -> None:
    new = path.with_suffix(".new")
    new.write_text(f"[default]\naws_access_key_id={ACCESS_KEY}\naws_secret_access_key={secret}\n")
    new.replace(path)


@pytest.mark.minio
async def test_a_refusal_has_changed_credentials_read(
    kind: type[S3Store], minio_server: Server, credentials_file: Path
) -> None:
    write(credentials_file, "not-the-secret")
    async with opened(kind, minio_server.endpoint_url) as place:
        with pytest.raises(AccessDenied):
            await place.store.check_bucket()
        write(credentials_file, SECRET_KEY)
        await place.store.check_bucket(create=True)
        await place.store.delete_many({place.key("x"): None})  # of another test with this store
        calls = (
            lambda: place.put("x", SMALL, expect=Expect(None)),
            lambda: place.put("y", BIG),
            lambda: place.read("x", 0, len(SMALL)),
            lambda: place.head("x"),
            lambda: place.list(),
            lambda: place.store.delete_many({place.key("x"): None}),
            lambda: place.store.create_multipart(place.key("m"), {}),
        )
        for call in calls:
            write(credentials_file, SECRET_KEY)
            await call()
            write(credentials_file, f"not-the-secret-{calls.index(call)}")
            await renewed_now(place.store)


async def renewed_now(store: object) -> None:
    """Have the store look at its files as if `LOOK_SECONDS` had passed."""
    assert isinstance(store, S3Store)
    store._calls.access._look_at = 0.0
    await store._calls.clients()


@pytest.mark.minio
async def test_a_changed_file_is_taken_up_in_time(
    kind: type[S3Store], minio_server: Server, credentials_file: Path
) -> None:
    async with opened(kind, minio_server.endpoint_url) as place:
        await place.store.check_bucket(create=True)
        write(credentials_file, "not-the-secret")
        await place.list()  # the old ones are good for a while
        await renewed_now(place.store)
        with pytest.raises(AccessDenied):
            await place.list()


@pytest.mark.minio
async def test_a_file_that_is_gone_changes_nothing(
    kind: type[S3Store], minio_server: Server, credentials_file: Path
) -> None:
    async with opened(kind, minio_server.endpoint_url) as place:
        await place.store.check_bucket(create=True)
        await trio.to_thread.run_sync(credentials_file.unlink)
        await renewed_now(place.store)
        await place.put("x", SMALL)
        assert await place.read("x", 0, len(SMALL)) == SMALL


@pytest.mark.minio
@pytest.mark.parametrize(("source", "opened_at_most"), [("variables", 1), ("program", 2)])
async def test_refusals_in_a_row_ask_for_credentials_once(
    kind: type[S3Store],
    source: str,
    opened_at_most: int,
    minio_server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where others may be had at all: variables do not change."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret")
    if source == "program":
        said = {"Version": 1, "AccessKeyId": ACCESS_KEY, "SecretAccessKey": "not-the-secret"}
        (tmp_path / "said").write_text(json.dumps(said))
        (tmp_path / "config").write_text(f"[default]\ncredential_process = cat {tmp_path}/said\n")
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
    opened_clients = 0
    real = access.open_clients

    def count(*arguments: object) -> object:
        nonlocal opened_clients
        opened_clients += 1
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(access, "open_clients", count)
    async with opened(kind, minio_server.endpoint_url) as place:
        for _ in range(5):
            with pytest.raises(AccessDenied):
                await place.read("x", 0, 1)
    assert opened_clients == opened_at_most


@pytest.mark.minio
@pytest.mark.parametrize("configured", [None, "us-east-1"])
async def test_the_region_is_found(
    kind: type[S3Store], configured: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    with minio(region="eu-lab-1") as server:
        monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-lab-1")
        async with opened(kind, server.endpoint_url) as place:
            await place.store.check_bucket(create=True)
        monkeypatch.delenv("AWS_DEFAULT_REGION")
        store = kind(StoreConfig(bucket=BUCKET, endpoint_url=server.endpoint_url, region=configured))
        await store.check_bucket()
        key = place.key("x")
        await store.put(key, SMALL, {}, expect=Expect(None))
        assert (await store.head(key)).size == len(SMALL)
        await store.aclose()


@pytest.mark.minio
async def test_an_address_of_ip_version_6(kind: type[S3Store]) -> None:
    with minio(host="[::1]") as server:
        async with opened(kind, server.endpoint_url) as place:
            await place.store.check_bucket(create=True)
            for body in (SMALL, BIG):
                await place.put("x", body)
                assert await place.read("x", 0, len(body)) == body


# ---- TLS, and what is said where nothing works


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Of localhost and the loopback addresses: certificate, key."""
    folder = tmp_path_factory.mktemp("tls")
    names = "subjectAltName=DNS:localhost,IP:127.0.0.1,IP:::1"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -keyout key.pem -out cert.pem"
    subprocess.run([*command.split(), "-addext", names], cwd=folder, check=True, capture_output=True)
    return folder / "cert.pem", folder / "key.pem"


@contextmanager
def tls_before(
    server: Server, certificate: tuple[Path, Path], versions: tuple[ssl.TLSVersion, ssl.TLSVersion] | None = None
) -> Iterator[int]:
    """The port on which a TLS front for `server` listens."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    if versions is not None:
        context.set_ciphers("ALL:@SECLEVEL=0")
        context.minimum_version, context.maximum_version = versions
    context.load_cert_chain(*certificate)
    port = int(server.endpoint_url.rpartition(":")[2])
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:

        def serve() -> None:
            while True:
                try:
                    raw, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=pipe, args=(raw,), daemon=True).start()

        def pipe(raw: socket.socket) -> None:
            with (
                raw,
                suppress(OSError),
                context.wrap_socket(raw, server_side=True) as front,
                socket.create_connection(("127.0.0.1", port)) as back,
            ):
                answers = threading.Thread(target=pump, args=(back, front))
                answers.start()
                pump(front, back)
                answers.join()

        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


def pump(source: socket.socket, target: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        return


@pytest.mark.minio
@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
async def test_a_private_authority(
    kind: type[S3Store], host: str, minio_server: Server, certificate: tuple[Path, Path]
) -> None:
    with tls_before(minio_server, certificate) as port:
        url = f"https://{host}:{port}"
        store = kind(StoreConfig(bucket=BUCKET, endpoint_url=url, ca_bundle=certificate[0]))
        await store.check_bucket(create=True)
        async with opened(kind, minio_server.endpoint_url) as place:
            for body in (SMALL, BIG):
                await store.put(place.key("tls"), body, {}, expect=None)
                assert await place.read("tls", 0, len(body)) == body
        await store.aclose()


@pytest.mark.minio
async def test_a_certificate_that_is_not_trusted(
    kind: type[S3Store], minio_server: Server, certificate: tuple[Path, Path]
) -> None:
    with tls_before(minio_server, certificate) as port:
        store = kind(StoreConfig(bucket=BUCKET, endpoint_url=f"https://localhost:{port}", attempts_max=1))
        with pytest.raises(StoreUnavailable, match="certificate is not trusted; name its authority with --ca-bundle"):
            await store.check_bucket()
        await store.aclose()


@pytest.mark.minio
@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
async def test_tls_before_1_2_is_refused(
    kind: type[S3Store], minio_server: Server, certificate: tuple[Path, Path]
) -> None:
    old = ssl.TLSVersion.TLSv1_1
    with tls_before(minio_server, certificate, (ssl.TLSVersion.TLSv1, old)) as port:
        url = f"https://localhost:{port}"
        store = kind(StoreConfig(bucket=BUCKET, endpoint_url=url, ca_bundle=certificate[0], attempts_max=1))
        with pytest.raises(StoreUnavailable, match=r"a TLS older than 1\.2"):
            await store.check_bucket()
        await store.aclose()


def https(server: Server) -> str:
    return server.endpoint_url.replace("http:", "https:")


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        (https, "the endpoint speaks http, not https"),
        (lambda server: server.endpoint_url, ""),
        (lambda _: "http://no-such-host.invalid", "no such host: no-such-host.invalid"),
        (lambda _: "http://127.0.0.1:1", "connection refused"),
    ],
    ids=["http", "good", "host", "port"],
)
def test_reasons(url: Callable[[Server], str], reason: str, moto_server: Server) -> None:
    assert diagnose(url(moto_server), None) == reason


def test_an_endpoint_that_speaks_tls(moto_server: Server, certificate: tuple[Path, Path]) -> None:
    with tls_before(moto_server, certificate) as port:
        assert diagnose(f"http://127.0.0.1:{port}", None) == "the endpoint speaks https, not http"
        assert diagnose(f"https://127.0.0.1:{port}", str(certificate[0])) == ""
        assert diagnose(f"https://127.0.0.2:{port}", str(certificate[0])) in (
            "connection refused",
            "the store's certificate is for another host",
        )


async def test_the_reason_is_in_the_error(kind: type[S3Store]) -> None:
    with unreachable() as url:
        async with opened(kind, url) as place:
            with pytest.raises(StoreUnavailable, match="connection refused"):
                await place.store.check_bucket()


def test_a_silent_endpoint_has_no_reason_of_its_own() -> None:
    with silent() as url:
        assert diagnose(url, None) == ""


def test_a_file_of_authorities_that_is_none(moto_server: Server) -> None:
    assert "cannot be used" in diagnose(https(moto_server), os.devnull)

"""Real object stores for tests: each on a loopback port of its own, with its data in a temporary folder.

Owns the server processes: each ends, by its id, with the `with` block that started it.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

READY_SECONDS = 60.0
END_SECONDS = 10.0
ACCESS_KEY = "phfs-test"
SECRET_KEY = "phfs-test-secret"


@dataclass(frozen=True, slots=True)
class Server:
    """A store that answers. The credentials are made up for the test."""

    endpoint_url: str
    access_key: str
    secret_key: str
    pid: int
    log: Path

    @property
    def env(self) -> Mapping[str, str]:
        """For a client in a subprocess, or for monkeypatch.setenv."""
        return credentials_env(self.access_key, self.secret_key)


def credentials_env(access_key: str = ACCESS_KEY, secret_key: str = SECRET_KEY) -> Mapping[str, str]:
    return {
        "AWS_ACCESS_KEY_ID": access_key,
        "AWS_SECRET_ACCESS_KEY": secret_key,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def minio_binary() -> Path | None:
    """The MinIO server: $PHFS_TEST_MINIO, else what `./dev test` has built."""
    return _built("minio", os.environ.get("PHFS_TEST_MINIO"))


def _built(name: str, instead: str | None = None) -> Path | None:
    """A program in the cache folder that `./dev test` fills, or the one given `instead`."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = Path(instead or cache / "phfs-tests" / "bin" / name)
    return path if os.access(path, os.X_OK) else None


@contextmanager
def minio(
    access_key: str = ACCESS_KEY, secret_key: str = SECRET_KEY, *, region: str = "", host: str = "127.0.0.1"
) -> Iterator[Server]:
    """A MinIO server; skips the test where there is no binary. `host` as in a URL."""
    if (binary := minio_binary()) is None:
        pytest.skip("no MinIO server: set PHFS_TEST_MINIO or run .ci/run, which installs one")
    env = {"MINIO_ROOT_USER": access_key, "MINIO_ROOT_PASSWORD": secret_key, "MINIO_BROWSER": "off"}
    env |= {"MINIO_SITE_REGION": region} if region else {}
    with _folder() as folder, _port() as port:
        data = folder / "data"
        data.mkdir()
        command = [str(binary), "server", "--quiet", "--address", f"{host}:{port}", str(data)]
        url = f"http://{host}:{port}"
        with _running(command, env, folder, url + "/minio/health/live") as (pid, log):
            yield Server(url, access_key, secret_key, pid, log)


@contextmanager
def versitygw(access_key: str = ACCESS_KEY, secret_key: str = SECRET_KEY) -> Iterator[Server]:
    """A Versity S3 Gateway over a local folder; skips the test where there is no binary."""
    if (binary := _built("versitygw")) is None:
        pytest.skip("no versitygw: ./dev test builds it where there is go")
    env = {"ROOT_ACCESS_KEY": access_key, "ROOT_SECRET_KEY": secret_key}
    with _folder() as folder, _port() as port:
        data = folder / "data"
        data.mkdir()
        command = [str(binary), "--port", f"127.0.0.1:{port}", "--keep-alive", "--quiet", "--health", "/health"]
        command += ["posix", str(data)]
        with _running(command, env, folder, f"http://127.0.0.1:{port}/health") as (pid, log):
            yield Server(f"http://127.0.0.1:{port}", access_key, secret_key, pid, log)


@contextmanager
def moto(access_key: str = ACCESS_KEY, secret_key: str = SECRET_KEY) -> Iterator[Server]:
    """moto's S3 server, in a process of its own. It checks no credentials."""
    with _folder() as folder, _port() as port:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        with _running(command, {}, folder, f"http://127.0.0.1:{port}/moto-api/") as (pid, log):
            yield Server(f"http://127.0.0.1:{port}", access_key, secret_key, pid, log)


def real_store() -> AbstractContextManager[Server]:
    """The store that mounts are tested on: the one named by $PHFS_TEST_STORE, else MinIO where it was built."""
    stores = {"minio": minio, "moto": moto, "versitygw": versitygw}
    return stores[os.environ.get("PHFS_TEST_STORE") or ("minio" if minio_binary() else "moto")]()


@contextmanager
def silent() -> Iterator[str]:
    """The URL of a server that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@contextmanager
def unreachable() -> Iterator[str]:
    """A URL where nobody listens; the port is kept from others meanwhile."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{holder.getsockname()[1]}"


@contextmanager
def _folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="phfs-test-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _port() -> Iterator[int]:
    """A loopback port that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    yield port


@contextmanager
def _running(command: Sequence[str], env: Mapping[str, str], folder: Path, url: str) -> Iterator[tuple[int, Path]]:
    """The server process and its log, once it answers at `url`."""
    log = folder / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env={**os.environ, **env}, cwd=folder, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        _wait_ready(process, url, log)
        yield process.pid, log
    finally:
        _end(process)


def _wait_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        try:
            with opener.open(url, timeout=1):
                return
        except (urllib.error.URLError, OSError):
            if process.poll() is not None:
                break
            time.sleep(0.05)  # the only way to learn of another process's readiness
    raise RuntimeError(f"{process.args!r} did not get ready:\n{log.read_text(errors='replace')}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """SIGCONT too: a test may have stopped it to play a store that hangs."""
    process.terminate()
    if process.poll() is None:
        os.kill(process.pid, signal.SIGCONT)
    try:
        process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()

"""The question to the cluster, and the directory of a secret."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from phfs_csi.errors import CsiError, FailedPrecondition, NotFound, PermissionDenied, Unavailable
from phfs_csi.provision.cluster import Cluster
from phfs_csi.request.secrets_dir import SecretsDirectory

TOKEN = "t0ken-of-the-account"


class FakeApi(ThreadingHTTPServer):
    answer: tuple[int, Any] = (200, {})
    asked: list[tuple[str, str]]


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, FakeApi)
        server.asked.append((self.path, self.headers["Authorization"]))
        status, body = server.answer
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body if isinstance(body, bytes) else json.dumps(body).encode())

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def api() -> Iterator[FakeApi]:
    with FakeApi(("127.0.0.1", 0), Handler) as server:
        server.asked = []
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def cluster(api: FakeApi, tmp_path: Path) -> Cluster:
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    return Cluster(f"http://127.0.0.1:{api.server_port}", tmp_path)


def test_annotations_of_a_claim(api: FakeApi, cluster: Cluster) -> None:
    api.answer = (200, {"metadata": {"annotations": {"primehub.io/group": "a"}}})
    assert cluster.annotations("hub", "data") == {"primehub.io/group": "a"}
    assert api.asked == [("/api/v1/namespaces/hub/persistentvolumeclaims/data", f"Bearer {TOKEN}")]


def test_a_claim_without_annotations(api: FakeApi, cluster: Cluster) -> None:
    api.answer = (200, {"metadata": {}})
    assert cluster.annotations("hub", "data") == {}


def test_names_stay_in_their_place(api: FakeApi, cluster: Cluster) -> None:
    api.answer = (200, {"metadata": {}})
    cluster.annotations("../../secrets", "a/b?c")
    assert api.asked[0][0] == "/api/v1/namespaces/..%2F..%2Fsecrets/persistentvolumeclaims/a%2Fb%3Fc"


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ((404, {}), NotFound),
        ((403, {}), PermissionDenied),
        ((401, {}), PermissionDenied),
        ((500, {}), Unavailable),
        ((200, b"<html>"), Unavailable),
        ((200, []), Unavailable),
        ((200, {"metadata": {"annotations": [1]}}), Unavailable),
    ],
)
def test_answers_that_are_none(
    api: FakeApi, cluster: Cluster, answer: tuple[int, Any], error: type[CsiError]
) -> None:
    api.answer = answer
    with pytest.raises(error, match="hub/data") as failure:
        cluster.annotations("hub", "data")
    assert TOKEN not in str(failure.value)


def test_a_cluster_that_cannot_be_asked(tmp_path: Path) -> None:
    with pytest.raises(Unavailable):
        Cluster("http://127.0.0.1:1", tmp_path).annotations("hub", "data")  # no token either
    with pytest.raises(FailedPrecondition, match="inside of a cluster"):
        Cluster.around({})


@pytest.mark.parametrize(
    ("host", "url"), [("10.0.0.1", "https://10.0.0.1:443"), ("fd00::1", "https://[fd00::1]:443")]
)
def test_where_the_cluster_is(host: str, url: str) -> None:
    assert Cluster.around({"KUBERNETES_SERVICE_HOST": host, "KUBERNETES_SERVICE_PORT": "443"}).url == url


# --- secrets as files


def test_a_secret_as_the_kubelet_mounts_it(tmp_path: Path) -> None:
    data = tmp_path / "..2026_11_24"
    data.mkdir()
    (data / "s3-access-key-id").write_text("AKIA")
    (data / "configData").write_text("[s3]\ntype = s3\n")
    (tmp_path / "..data").symlink_to(data.name)
    for name in ("s3-access-key-id", "configData"):
        (tmp_path / name).symlink_to(f"..data/{name}")
    assert SecretsDirectory(str(tmp_path)).read() == {"s3-access-key-id": "AKIA", "configData": "[s3]\ntype = s3\n"}


def test_no_directory_is_an_empty_one(tmp_path: Path) -> None:
    assert SecretsDirectory("").read() == {}
    assert SecretsDirectory(str(tmp_path / "none")).read() == {}


def test_a_secret_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "accessKey").write_bytes(b"\xff\xfe")
    with pytest.raises(FailedPrecondition, match="accessKey"):
        SecretsDirectory(str(tmp_path)).read()

"""Which stores an inline volume may use: looked at after name resolution, and refused in the same words."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from phfs_csi.errors import PermissionDenied
from phfs_csi.request.endpoints import Endpoints, parse_endpoints

NAMES = {
    "minio.hub": ["10.0.0.7"],
    "alias.example.org": ["10.0.0.7"],
    "metadata.example.org": ["169.254.169.254"],
    "two.example.org": ["10.0.0.7", "169.254.169.254"],
    "elsewhere.example.org": ["192.0.2.9"],
}


@pytest.fixture(autouse=True)
def resolver(monkeypatch: pytest.MonkeyPatch) -> None:
    real = socket.getaddrinfo

    def resolve(host: str, port: int, **more: Any) -> list[Any]:
        if host in NAMES:
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in NAMES[host]]
        if host.endswith(".org"):
            raise socket.gaierror("no such host")
        return list(real(host, port, **more))

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)


def reason(url: str, *listed: str) -> str:
    try:
        Endpoints(listed, lambda: {"endpoint": "http://minio.hub:9000/"}).require(url)
    except PermissionDenied as exc:
        return str(exc)
    return ""


LINK_LOCAL = [
    "http://169.254.169.254",
    "http://2852039166:80",  # the same
    "http://[::ffff:169.254.169.254]/x",
    "http://[fe80::1]:9000",
    "http://metadata.example.org",
    "http://two.example.org:9000",
]


@pytest.mark.parametrize("url", LINK_LOCAL)
def test_link_local_addresses_are_refused_unless_listed(url: str) -> None:
    assert reason(url)
    assert reason(url, "store")
    assert not reason(url, url)
    assert not reason(url, "169.254.0.0/16", "fe80::/10", "10.0.0.0/8")


@pytest.mark.parametrize(
    "url", ["", "http://127.0.0.1:9000", "http://minio.hub:9000", "http://elsewhere.example.org"]
)
def test_without_a_list_any_other_may_be_used(url: str) -> None:
    assert not reason(url)


@pytest.mark.parametrize(
    ("url", "listed", "is_allowed"),
    [
        ("http://minio.hub:9000", ["store"], True),
        ("http://alias.example.org:9000", ["store"], True),
        ("http://10.0.0.7:9000", ["store"], True),
        ("http://10.0.0.7:22", ["store"], False),
        ("http://elsewhere.example.org:9000", ["store"], False),
        ("http://127.0.0.1:9000", ["store"], False),
        ("http://127.0.0.1:9000", ["store", "127.0.0.0/8"], True),
        ("http://elsewhere.example.org", ["http://elsewhere.example.org:80"], True),
        ("http://two.example.org:9000", ["10.0.0.0/8"], False),
        ("http://unknown.example.org:9000", ["store"], False),
        ("", ["store"], False),
        ("", ["store", "aws"], True),
    ],
)
def test_a_list(url: str, listed: list[str], is_allowed: bool) -> None:
    assert (not reason(url, *listed)) is is_allowed


def test_the_endpoint_of_the_plugin_s_environment_is_the_administrator_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://minio.hub:9000")
    assert not reason("", "store")


def test_refusals_read_alike() -> None:
    urls = [*LINK_LOCAL, "http://unknown.example.org", "http://127.0.0.1:1", "http://10.0.0.7:22", ""]
    assert len({reason(url, "store") for url in urls}) == 1


@pytest.mark.parametrize("text", ["minio", "ftp://a", "10.0.0.1/8", "store,http://a:b:c"])
def test_lists_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="networks"):
        parse_endpoints(text)
    assert parse_endpoints(" store, 10.0.0.0/8,") == ("store", "10.0.0.0/8")

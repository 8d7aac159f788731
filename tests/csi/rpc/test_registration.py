"""The plugin registers, and its socket is its own, whoever starts and ends meanwhile."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from phfs_csi.rpc.registration import Registration
from tests.csi.kubelet import Kubelet, eventually


@pytest.fixture
def kubelet(tmp_path: Path) -> Kubelet:
    return Kubelet(tmp_path)


def new(directory: Path) -> Registration:
    return Registration(
        directory, "phfs.test", Path("/var/lib/kubelet/plugins/phfs.test/csi.sock"), check_seconds=0.02
    )


@pytest.fixture
def registration(tmp_path: Path) -> Iterator[Registration]:
    found = new(tmp_path)
    found.start()
    yield found
    found.stop(remove=True)


def made_at(path: Path) -> int:
    """0: it is not there. The number of an inode may be that of the file before."""
    try:
        return path.lstat().st_mtime_ns
    except FileNotFoundError:
        return 0


def test_what_the_kubelet_is_told(registration: Registration, kubelet: Kubelet) -> None:
    assert kubelet.sockets() == ["phfs.test-reg.sock"]
    info = kubelet.register()
    assert (info.type, info.name, info.endpoint, list(info.supported_versions)) == (
        "CSIPlugin",
        "phfs.test",
        "/var/lib/kubelet/plugins/phfs.test/csi.sock",
        ["1.0.0"],
    )
    assert registration.problem() == ""


def test_the_socket_goes_with_the_plugin(tmp_path: Path, kubelet: Kubelet) -> None:
    registration = new(tmp_path)
    registration.start()
    registration.stop(remove=True)
    registration.stop(remove=True)
    assert os.listdir(tmp_path) == []
    assert registration.problem()


def test_after_a_kill_the_socket_that_is_left_is_replaced(tmp_path: Path, kubelet: Kubelet) -> None:
    killed = new(tmp_path)
    killed.start()
    killed.stop(remove=False)
    assert kubelet.sockets() == ["phfs.test-reg.sock"]
    registration = new(tmp_path)
    registration.start()
    assert kubelet.register().name == "phfs.test"
    registration.stop(remove=True)


def test_a_socket_that_somebody_removes_comes_back(registration: Registration, kubelet: Kubelet) -> None:
    (kubelet.directory / "phfs.test-reg.sock").unlink()
    eventually(lambda: kubelet.sockets() != [])
    eventually(lambda: registration.problem() == "")
    assert kubelet.register().name == "phfs.test"


def test_a_successor_keeps_its_socket(registration: Registration, tmp_path: Path, kubelet: Kubelet) -> None:
    successor = new(tmp_path)
    successor.start()
    mark = made_at(tmp_path / "phfs.test-reg.sock")
    assert registration.problem()
    registration.stop(remove=True)
    assert made_at(tmp_path / "phfs.test-reg.sock") == mark
    assert kubelet.register().name == "phfs.test"
    assert successor.problem() == ""
    successor.stop(remove=True)


def test_a_registration_that_is_refused_is_tried_again(
    registration: Registration, kubelet: Kubelet, caplog: pytest.LogCaptureFixture
) -> None:
    before = made_at(kubelet.directory / "phfs.test-reg.sock")
    kubelet.register(error="no such\nfeature")
    assert "no such\\nfeature" in registration.problem()
    assert "no such\\nfeature" in caplog.text
    eventually(lambda: made_at(kubelet.directory / "phfs.test-reg.sock") not in (0, before))
    kubelet.register()
    eventually(lambda: registration.problem() == "")

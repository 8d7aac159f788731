"""The stubs are what the definitions say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CSI = Path(__file__).parents[2] / "csi"


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stubs")
    subprocess.run([sys.executable, CSI / "proto" / "generate.py", out], check=True, timeout=120)
    return out / "phfs_csi" / "proto"


def stubs(directory: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in directory.glob("*_pb2*")}


def test_the_stubs_come_out_the_same_when_generated_again(generated: Path) -> None:
    again = stubs(generated)
    assert len(again) == 6
    assert again == stubs(CSI / "phfs_csi" / "proto")

"""A Python environment on the mount: made, installed into, run."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import pytest

from tests.mount.place import Place, run, saved

pytestmark = pytest.mark.fuse
ENV = {
    "PIP_NO_INDEX": "1",
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    "PIP_ROOT_USER_ACTION": "ignore",
    "PYTHONPATH": "",
}


def wheel(folder: Path, version: str) -> Path:
    """A wheel of a package with a command that prints its version, and 100 modules."""
    info = f"tiny-{version}.dist-info"
    files = {
        "tiny/__init__.py": f"def main() -> None:\n    print('tiny {version}')\n",
        **{f"tiny/m{number}.py": f"NUMBER = {number}\n" for number in range(100)},
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: tiny\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": "[console_scripts]\ntiny = tiny:main\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in (*files, f"{info}/RECORD"))
    path = folder / f"tiny-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


def test_venv_and_pip(place: Place, mnt: Path, tmp_path: Path) -> None:
    env = mnt / "env"
    run(sys.executable, "-m", "venv", env, env=ENV)
    pip = (env / "bin/python", "-m", "pip")
    run(*pip, "install", "-q", wheel(mnt, "1.0"), env=ENV)
    assert run(env / "bin/tiny", env=ENV) == "tiny 1.0\n"
    run(*pip, "install", "-q", "--upgrade", wheel(mnt, "2.0"), env=ENV)
    assert run(env / "bin/tiny", env=ENV) == "tiny 2.0\n"
    run(*pip, "check", env=ENV)
    place.remount()
    assert run(env / "bin/tiny", env=ENV) == "tiny 2.0\n"
    run(*pip, "uninstall", "-q", "-y", "tiny", env=ENV)
    assert not list(env.rglob("tiny*"))
    saved(place, mnt, tmp_path / "stored")

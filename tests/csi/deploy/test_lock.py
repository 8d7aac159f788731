"""The lock file of the image: it fits what pyproject.toml asks for, and each package has its hashes."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[3]
PINNED = re.compile(
    r"^([a-z0-9-]+)==([^ ;\\]+)([^\\]*)\\\n((?: +--hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", re.MULTILINE
)


def locked() -> dict[str, str]:
    text = (ROOT / "csi/requirements.lock").read_text()
    found = {name: version for name, version, _, _ in PINNED.findall(text)}
    assert len(found) == len(re.findall(r"^[a-z]", text, re.MULTILINE))  # none without a hash
    return found


def test_what_is_asked_for_is_locked() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [Requirement(text) for text in [*project["dependencies"], *project["optional-dependencies"]["csi"]]]
    versions = locked()
    assert wanted
    for requirement in wanted:
        assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), requirement


def test_the_image_installs_nothing_else() -> None:
    """What is installed without the lock file brings no package along."""
    installs = re.findall(r"/opt/phfs/bin/pip install (.*?)(?: \\)?\n", (ROOT / "Dockerfile").read_text())
    assert installs == ["--no-cache-dir --require-hashes -r requirements.lock", "--no-cache-dir --no-deps ."]
    assert "!csi/requirements.lock" in (ROOT / ".dockerignore").read_text().splitlines()

"""The layers of the plugin, held against its imports: nothing imports upward, not even for types.

A new module gets its place in `ORDER`. What the holder loads is small, and so is what knows the store.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import phfs_csi

ROOT = Path(phfs_csi.__file__).parent

# From the top: a module imports only modules of later lines.
ORDER = """
__main__
node controller
life
handover
upkeep
volumes
drains
mounter spawning
mountconfigs programs
shares
caches
records
server
registration boundary identity
admission
sockets metrics
requests
busy catalog
idkeys
template volumeid kube secretsdir
attributes endpoints
rclone
holder
succession
params
config errors
proto
"""
RANK = {name: rank for rank, line in enumerate(ORDER.split("\n")) for name in line.split()}

USERS = {  # of third-party packages
    "boto3": "",
    "botocore": "catalog",
    "google": "identity",
    "grpc": "__main__ boundary controller errors identity node registration server sockets",
    "prometheus_client": "metrics",
    "trio": "catalog",
    "typer": "__main__",
    "urllib3": "kube",
}
STORE = {"catalog", "controller"}  # who may know of `phfs_fuse.store`


@cache
def imports() -> dict[str, frozenset[str]]:
    """Module -> everything it imports, also within functions; ours without the name of the package."""
    return {path.stem: frozenset(_imports_of(path)) for path in ROOT.glob("*.py") if path.stem != "__init__"}


def _imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("phfs_csi.") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            if module in ("phfs_csi", "phfs_fuse"):
                yield from (f"{module}.{alias.name}".removeprefix("phfs_csi.") for alias in node.names)
            else:
                yield module.removeprefix("phfs_csi.")


def ours(name: str) -> set[str]:
    return {target.partition(".")[0] for target in imports()[name]} & RANK.keys()


def test_every_module_has_its_place() -> None:
    assert imports().keys() - RANK.keys() == set()


@pytest.mark.parametrize("name", sorted(imports()))
def test_nothing_imports_upward(name: str) -> None:
    assert {target for target in ours(name) if RANK[target] <= RANK.get(name, -1)} == set()


def test_third_party_packages_have_few_users() -> None:
    found = {
        (package, name)
        for name, targets in imports().items()
        for package in USERS.keys() & {target.partition(".")[0] for target in targets}
    }
    assert {(package, name) for package, name in found if name not in USERS[package].split()} == set()


def test_the_store_is_known_to_the_controller_alone() -> None:
    users = {name for name, targets in imports().items() if any(to.startswith("phfs_fuse.store") for to in targets)}
    assert users <= STORE


def test_the_holder_stays_small() -> None:
    """It lives beside every mount of a node, and must not die of what the others load."""
    code = "import sys, phfs_csi.holder; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    foreign = {"grpc", "google", "boto3", "botocore", "trio", "typer", "awscrt", "prometheus_client", "pyfuse3"}
    assert foreign & set(done.stdout.split()) == set()

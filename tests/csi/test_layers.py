"""The wings of the plugin, held against its imports: nothing imports upward, not even for types.

A new module needs no line here, only a wing. What the holder loads is small, and so is what knows the store.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import phfs_csi

ROOT = Path(phfs_csi.__file__).parent

# From the top. A wing imports itself, what its row names, and the vocabulary.
MAY = {
    "rpc": "handover node provision request",
    "handover": "node",
    "node": "request",
    "provision": "request",
    "request": "",
}
TOP = {"__main__", "wiring"}  # which may import all
VOCABULARY = {"volume_locks", "config", "errors", "metrics", "proto"}
# What each may know of phfs_fuse, beside its vocabulary, its settings and the machine.
FUSE = ("attrs", "config", "errors", "extents", "host", "keys", "metrics", "tasks", "types", "phfs_fuse")
FUSE_MORE = {
    "__main__": "cli.program",
    "node": "launch state.journal state.refusal",
    "provision": "store",
    "rpc.controller": "store.base",
}

USERS = {  # of third-party packages
    "boto3": "",
    "botocore": "provision.catalog",
    "google": "rpc.identity",
    "grpc": "__main__ rpc errors",
    "prometheus_client": "metrics",
    "trio": "provision.catalog",
    "typer": "__main__",
    "urllib3": "provision.cluster",
}


@cache
def imports() -> dict[str, frozenset[str]]:
    """Module -> everything it imports, also within functions; ours without the name of the package."""
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[-1] != "__init__" and parts[0] != "proto":
            found[".".join(parts)] = frozenset(_imports_of(path))
    return found


def _imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [_target(node.module or "", alias.name) for alias in node.names]
        else:
            continue
        yield from (name.removeprefix("phfs_csi.") for name in names)


def _target(module: str, name: str) -> str:
    """A name imported from a package is a submodule, or belongs to the package itself."""
    if module.startswith("phfs_fuse"):
        return module if module.count(".") > 1 else f"{module}.{name}"
    path = ROOT.parent.joinpath(*module.split("."), name)
    is_module = path.with_suffix(".py").exists() or (path / "__init__.py").exists()
    return f"{module}.{name}" if module.startswith("phfs_csi") and is_module else module


def ours(name: str) -> frozenset[str]:
    return imports()[name] & imports().keys()


def wing(name: str) -> str:
    return name.partition(".")[0]


def test_every_module_is_in_a_wing() -> None:
    assert {wing(name) for name in imports()} | {"proto"} == MAY.keys() | TOP | VOCABULARY


@pytest.mark.parametrize("name", sorted(imports()))
def test_a_module_imports_only_what_its_wing_may(name: str) -> None:
    row = VOCABULARY | {wing(name), *MAY.get(wing(name), "").split()}
    above = {target for target in ours(name) if wing(target) not in row}
    assert above == set() or name in TOP


def test_no_circle() -> None:
    TopologicalSorter({name: ours(name) - {name} for name in imports()}).prepare()


def test_third_party_packages_have_few_users() -> None:
    found = {
        (package, name)
        for name, targets in imports().items()
        for package in USERS.keys() & {target.partition(".")[0] for target in targets}
    }
    assert {(user, name) for user, name in found if not {name, wing(name)} & set(USERS[user].split())} == set()


@pytest.mark.parametrize("name", sorted(imports()))
def test_few_know_more_of_the_file_system_than_its_vocabulary(name: str) -> None:
    """Above all the store, which is known to the controller alone."""
    row = {*FUSE, *FUSE_MORE.get(name, "").split(), *FUSE_MORE.get(wing(name), "").split()}
    targets = {to.removeprefix("phfs_fuse.") for to in imports()[name] if to.startswith("phfs_fuse")}
    known = {to for to in targets if any(to == part or to.startswith(part + ".") for part in row)}
    assert {to for to in targets - known if not to.startswith("__")} == set()


def test_the_holder_stays_small() -> None:
    """It lives beside every mount of a node, and must not die of what the others load."""
    code = "import sys, phfs_csi.handover.holder; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    foreign = {"grpc", "google", "boto3", "botocore", "trio", "typer", "awscrt", "prometheus_client", "pyfuse3"}
    assert foreign & set(done.stdout.split()) == set()

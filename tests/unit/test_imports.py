"""The table of wings, held against the imports as they are: nothing imports upward, not even for types.

A new module needs no line here, only a wing. A third-party package has few users, so that it can be replaced.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = "phfs_fuse"
ROOT = Path(__file__).parents[2] / PACKAGE

# From the top. A wing imports itself, the vocabulary, `config`, and what its row names: wings, or single modules.
MAY = {
    "cli": "bench launch host",
    "bench": "host",
    "launch": "host",
    "worker": "keeper fuse vfs namespace writeback pending quota tree cache state store host",
    "keeper": "host",
    "fuse": "vfs quota tree",
    "vfs": "namespace writeback pending quota tree cache state host.saved_files store.base",
    "namespace": "pending tree store.base",
    "writeback": "pending tree cache state store.base store.retry",
    "pending": "quota tree state store.base",
    "quota": "state store.base",
    "tree": "cache state store.base",
    "cache": "store.base",
    "state": "host",
    "store": "",
    "host": "",
    "config": "",
}
VOCABULARY = {"errors", "types", "metrics", "keys", "attrs", "extents", "tasks", "localfile"}
# Names of processes, which stay: what each of them runs.
PROCESSES = {"__main__": "cli.main", "mount": "worker.main", "fusemount": "host.fusemount"}
FILES_MAX = 12  # directly in the package

USERS = {
    "awscrt": "store cache.file_format",
    "boto3": "store cli.demo bench",
    "botocore": "store bench",
    "matplotlib": "bench",
    "moto": "cli.demo bench",
    "pyfuse3": "fuse",
    "rich": "cli.display cli.main bench",
    "typer": "cli.main cli.program cli.saved",
}
PURE = {"tree.dirty", "state.refusal", "quota.limits", "extents", "keys", "attrs", "config.model", "errors", "types"}
AWAITS = {"tree.kernel_log"}  # in the wings without an await: its compaction goes on beside requests
FORBIDDEN = {"phfs_csi", "tests"}


@cache
def imports() -> dict[str, frozenset[str]]:
    """Module -> everything it imports, also within functions; ours without the name of the package."""
    return {name: frozenset(_imports_of(path)) for name, path in modules().items()}


@cache
def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            found[name] = path
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
        yield from (name.removeprefix(PACKAGE + ".") for name in names)


def _target(module: str, name: str) -> str:
    """A name imported from a package is a submodule, or belongs to the package itself."""
    path = ROOT.parent.joinpath(*module.split("."), name)
    is_module = path.with_suffix(".py").exists() or (path / "__init__.py").exists()
    return f"{module}.{name}" if module.startswith(PACKAGE) and is_module else module


def ours(name: str) -> frozenset[str]:
    return imports()[name] & imports().keys()


def wing(name: str) -> str:
    """Its wing, or the name itself where it lies directly in the package."""
    return name.partition(".")[0]


def may_import(name: str, target: str) -> bool:
    if name in PROCESSES:
        return target == PROCESSES[name]
    if name in VOCABULARY:
        return target in VOCABULARY | {"config.model"}
    row = {wing(name), "config", *MAY[wing(name)].split()}
    return target in VOCABULARY or target in row or wing(target) in row


def test_every_module_is_in_a_wing() -> None:
    assert {wing(name) for name in imports()} == MAY.keys() | VOCABULARY | PROCESSES.keys()
    assert len(list(ROOT.glob("*.py"))) <= FILES_MAX


def test_a_row_names_only_wings_below() -> None:
    order = list(MAY)
    for name, row in MAY.items():
        assert {wing(target) for target in row.split()} <= set(order[order.index(name) + 1 :]), name


@pytest.mark.parametrize("name", sorted(imports()))
def test_a_module_imports_only_what_its_wing_may(name: str) -> None:
    assert {target for target in ours(name) if not may_import(name, target)} == set()


def test_no_circle() -> None:
    TopologicalSorter({name: ours(name) - {name} for name in imports()}).prepare()


@pytest.mark.parametrize("name", sorted(name for name in imports() if wing(name) in ("pending", "tree")))
def test_nothing_waits_while_the_tree_and_what_is_pending_change(name: str) -> None:
    kinds = (ast.AsyncFunctionDef, ast.AsyncFor, ast.AsyncWith, ast.Await)
    waits = any(isinstance(node, kinds) for node in ast.walk(ast.parse(modules()[name].read_text())))
    assert waits == (name in AWAITS)


@pytest.mark.parametrize("name", sorted(name for name in MAY if (ROOT / name).is_dir()))
def test_each_wing_has_a_sign(name: str) -> None:
    sign = ast.get_docstring(ast.parse((ROOT / name / "__init__.py").read_text())) or ""
    assert len(sign.splitlines()) >= 4


def test_third_party_packages_have_few_users() -> None:
    found = {
        (package, name)
        for name, targets in imports().items()
        for package in USERS.keys() & {target.partition(".")[0] for target in targets}
    }
    wrong = {(package, name) for package, name in found if not {name, wing(name)} & set(USERS[package].split())}
    assert wrong == set()


def test_keeper_and_host_need_the_standard_library_alone() -> None:
    names = [name for name in imports() if wing(name) in ("keeper", "host")]
    assert _foreign(set().union(*(_closure(name) for name in names))) == set()


@pytest.mark.parametrize("name", sorted(PURE))
def test_pure_modules_have_no_event_loop_and_no_third_party(name: str) -> None:
    assert _foreign({name}) == set()


def test_nothing_imports_the_plugin_or_the_tests() -> None:
    tops = {target.partition(".")[0] for targets in imports().values() for target in targets}
    assert tops & FORBIDDEN == set()


def _closure(name: str) -> set[str]:
    found, pending = set(), [name]
    while pending:
        if (current := pending.pop()) not in found:
            found.add(current)
            pending += ours(current)
    return found


def _foreign(names: set[str]) -> set[str]:
    tops = {target.partition(".")[0] for name in names for target in imports()[name] - imports().keys()}
    return tops - sys.stdlib_module_names - {PACKAGE}

"""The layers, held against the imports as they are: nothing imports upward, not even for types.

A new module gets its place in `ORDER`. A third-party package has few users, so that it can be replaced.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = "phfs_fuse"
ROOT = Path(__file__).parents[2] / PACKAGE

# From the top: a module imports only modules of later lines. A name stands for its submodules too.
ORDER = """
__main__
cli
bench.command
bench.run bench.plot bench.report
bench.workloads
bench.trial
bench.processes bench.actor bench.relay
bench.systems bench.figures bench.usage bench.store bench.sizes
bench.loads
bench
demo settle salvage
display entry
client prepare
spawner
starting
keeper
held standby unmounting
workers
fusemount
drain
mount
answers services
wiring
control quotakeeper
ops session
events
vfs
fileattrs names
openfiles dirstream
storable
listahead
namespace
doubts lookup
listings
merging probes
known
writeback
deletes
undo
conflicts claims
sources markers settling aside
upload changes
multiparts
removed keyusers dirtyfiles
uploadqueue quota
recovery resume
kernelstate memory
namewalks defaults attempts endings refusals writable
inodes trust places
questions
nodes
blocks staging
adoption
version
fills
blockfile
cachedisk
journal readahead cachedir
database
cachefile logspace
gone demand journalrows transaction
store
store.crt
store.s3
store.guard
store.trials
store.calls store.signed store.events
store.crt_http
store.access store.checksums store.paging
store.session store.transfer store.conditions store.diagnosis store.limits
store.clock store.documents store.listing store.retry tasks
store.headers store.answers
store.base
attrs dirty
refusal
extents keys
messages
expiry loop
settings
options
values
saved
registry mountpoint localstate localfile holding reserve statfsino eager
dirs logs waiting jsontext confinement
metrics
config
errors
types
"""
RANK = {name: rank for rank, line in enumerate(ORDER.split("\n")) for name in line.split()}

# What the commands may see of a mount: its config and its control socket, never its insides.
BENCH = {name for name in RANK if name.partition(".")[0] == "bench"}
FRONT = BENCH | {
    "__main__",
    "cli",
    "demo",
    "salvage",
    "display",
    "entry",
    "settle",
    "client",
    "prepare",
    "starting",
    "keeper",
    "held",
    "standby",
    "unmounting",
    "workers",
    "fusemount",
}
FRONT_SEES = FRONT | {
    "messages", "expiry", "loop", "settings", "options", "holding", "localstate", "saved", "values", "registry",
    "mountpoint",
    "dirs", "logs", "waiting", "jsontext",
    "config", "errors", "types",
}  # fmt: skip

USERS = {
    "awscrt": "store cachefile",
    "boto3": "store demo bench",
    "botocore": "store bench",
    "matplotlib": "bench",
    "moto": "demo bench",
    "pyfuse3": "ops session eager",
    "rich": "display cli bench",
    "typer": "cli entry salvage",
}
PURE = ("dirty", "refusal", "quota", "extents", "keys", "attrs", "config", "errors", "types")
FORBIDDEN = {"phfs_csi", "tests"}


@cache
def imports() -> dict[str, frozenset[str]]:
    """Module -> everything it imports, also within functions; ours without the name of the package."""
    return {name: frozenset(_imports_of(path)) for name, path in _modules()}


def _modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            yield name, path


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


def test_every_module_has_its_place() -> None:
    assert imports().keys() - RANK.keys() == set()


@pytest.mark.parametrize("name", sorted(imports()))
def test_nothing_imports_upward(name: str) -> None:
    upward = {target for target in ours(name) & RANK.keys() if RANK[target] <= RANK.get(name, -1)}
    assert upward == set()


@pytest.mark.parametrize("name", sorted(imports().keys() & FRONT))
def test_the_commands_do_not_see_the_insides_of_a_mount(name: str) -> None:
    assert ours(name) <= FRONT_SEES


def test_third_party_packages_have_few_users() -> None:
    found = {
        (package, name)
        for name, targets in imports().items()
        for package in USERS.keys() & {target.partition(".")[0] for target in targets}
    }
    wrong = {(package, name) for package, name in found if name.partition(".")[0] not in USERS[package].split()}
    assert wrong == set()


def test_the_keeper_needs_the_standard_library_alone() -> None:
    assert _foreign(_closure("keeper")) == set()


@pytest.mark.parametrize("name", PURE)
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

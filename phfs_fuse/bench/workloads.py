"""The workloads: what is in the store before, what is done, what must be in the store after. Owns the table of them.

A workload is written once, against a `Trial`, for all systems.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Final

from phfs_fuse.bench.loads import MIB, STAMP, Load, Loads, Piece, random_places, small_files
from phfs_fuse.bench.sizes import Sizes
from phfs_fuse.bench.trial import Trial

KIB: Final = 1024


Run = Callable[[Trial], None]
Seed = Callable[[Sizes], Loads]


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """`measures` name -> what it is, sizes in braces. `seed` is in the store before the mount."""

    name: str
    measures: Mapping[str, str]
    run: Run
    seed: Seed = field(default=lambda sizes: {})
    changes: bool = True  # False: all systems may read the same seed
    reference: Run | None = None
    programs: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()  # of this Python


WORKLOADS: dict[str, Workload] = {}


def _workload(
    name: str,
    measures: Mapping[str, str],
    *,
    seed: Seed = lambda sizes: {},
    changes: bool = True,
    reference: Run | None = None,
    programs: tuple[str, ...] = (),
    modules: tuple[str, ...] = (),
) -> Callable[[Run], Run]:
    def add(run: Run) -> Run:
        WORKLOADS[name] = Workload(
            name=name,
            measures=measures,
            run=run,
            seed=seed,
            changes=changes,
            reference=reference,
            programs=programs,
            modules=modules,
        )
        return run

    return add


def _write_reference(t: Trial) -> None:
    load = Load(1, t.sizes.big)
    local = t.scratch("upload")
    with local.open("wb") as file:
        file.writelines(load.chunks())
    t.take("write-stored", t.do("upload_file", local=str(local), **t.address("file")))
    t.expect({"file": load})


@_workload(
    "write",
    {
        "write": "write {big} in 1 MiB writes, to close",
        "write-stored": "the same until it is in the store",
    },
    reference=_write_reference,
)
def _write(t: Trial) -> None:
    load = Load(1, t.sizes.big)
    done = t.do("write", path=t.path("file"), load=load.dump(), unit=MIB)
    t.take("write", done)
    t.take_stored("write-stored", done, {"file": load})


@_workload("write-4k", {"write-4k": "4 KiB writes, {small_writes}, to close"})
def _write_4k(t: Trial) -> None:
    load = Load(2, t.sizes.small_writes)
    t.take("write-4k", t.do("write", path=t.path("file"), load=load.dump(), unit=4 * KIB))
    t.expect({"file": load})


def _big(sizes: Sizes) -> Loads:
    return {"file": Load(3, sizes.big)}


def _read_reference(t: Trial) -> None:
    done = t.do("ranged_gets", **t.address("file"), size=t.sizes.big, unit=8 * MIB)
    t.same(done.value, t.sizes.big, "the bytes of all ranges")
    t.take("read-cold", done)


@_workload(
    "read",
    {
        "read-cold": "read {big} cold, in sequence",
        "read-again": "read it again (new open)",
        "read-disk": "the same from the cache disk, page cache dropped",
    },
    seed=_big,
    changes=False,
    reference=_read_reference,
)
def _read(t: Trial) -> None:
    load = _big(t.sizes)["file"]
    want = load.heads_sha256()
    for measure in ("read-cold", "read-again", "read-disk"):
        if measure == "read-disk" and not t.drop_page_cache():
            break
        done = t.do("read", path=t.path("file"))
        t.same(done.value, want, "the bytes that were read")
        t.take(measure, done)
    t.same(t.do("sums", root=t.path(), names=["file"]).value, [load.sha256()], "all bytes, read once more")


@_workload("first-byte", {"first-byte": "first byte of a cold file of {big}"}, seed=_big, changes=False)
def _first_byte(t: Trial) -> None:
    done = t.do("first_byte", path=t.path("file"))
    t.same(done.value, f"{STAMP:02x}", "the first byte")
    t.take("first-byte", done)


@_workload(
    "random",
    {
        "random-cold": "{randoms} random 64 KiB reads of {big}, cold",
        "random-again": "the same reads again",
    },
    seed=_big,
    changes=False,
)
def _random(t: Trial) -> None:
    want = _random_sum(_big(t.sizes)["file"], t.sizes.randoms, 64 * KIB)
    for measure in ("random-cold", "random-again"):
        done = t.do("read_random", path=t.path("file"), size=t.sizes.big, count=t.sizes.randoms, unit=64 * KIB)
        t.same(done.value, want, "the bytes that were read")
        t.take(measure, done)


def _random_sum(load: Load, count: int, unit: int) -> str:
    digest = hashlib.sha256()
    for place in random_places(load.size, count, unit):
        digest.update(load.range(place, unit))
    return digest.hexdigest()


@_workload(
    "create",
    {
        "create": "create {files} files of 4 KiB, to close",
        "create-stored": "the same until all are in the store",
    },
)
def _create(t: Trial) -> None:
    loads = small_files(t.sizes.files)
    done = t.do("write_files", root=t.path(), loads={name: load.dump() for name, load in loads.items()})
    t.take("create", done)
    t.take_stored("create-stored", done, loads)


@_workload(
    "small-read",
    {
        "small-cold": "read {files} files of 4 KiB cold, 8 threads",
        "small-again": "read them again, 1 thread",
    },
    seed=lambda sizes: small_files(sizes.files),
    changes=False,
)
def _small_read(t: Trial) -> None:
    loads = small_files(t.sizes.files)
    want = hashlib.sha256(b"".join(chunk for load in loads.values() for chunk in load.chunks())).hexdigest()
    for measure, threads in (("small-cold", 8), ("small-again", 1)):
        done = t.do("read_files", root=t.path(), names=list(loads), threads=threads)
        t.same(done.value, want, "the bytes that were read")
        t.take(measure, done)


@_workload(
    "list",
    {
        "list-cold": "ls -lR of {listed} files in {folders} folders, cold",
        "list-again": "the same again",
    },
    seed=lambda sizes: small_files(sizes.listed, 100, sizes.folders),
    changes=False,
)
def _list(t: Trial) -> None:
    for measure in ("list-cold", "list-again"):
        done = t.do("run", command=["ls", "-lR", "."], cwd=t.path())
        t.same(done.value["files"], t.sizes.listed, "the number of files listed")
        t.take(measure, done)


@_workload(
    "rename",
    {"rename-stored": "rename a folder of {files} files, in the store"},
    seed=lambda sizes: small_files(sizes.files, root="old"),
)
def _rename(t: Trial) -> None:
    done = t.do("rename", old=t.path("old"), new=t.path("new"))
    loads = small_files(t.sizes.files, root="new")
    t.take_stored("rename-stored", done, loads)


@_workload(
    "edit",
    {"edit-stored": "change 4 KiB inside a stored file of {big}, until in the store"},
    seed=_big,
)
def _edit(t: Trial) -> None:
    edit = Piece(t.sizes.big // 2 + 12 * KIB, 1001, 4 * KIB)
    done = t.do("overwrite", path=t.path("file"), offset=edit.offset, seed=edit.seed, size=edit.size)
    t.take_stored("edit-stored", done, {"file": Load(3, t.sizes.big, edit)}, edit)


@_workload(
    "append",
    {"append-stored": "append 4 KiB ten times to a stored file of {middle}, until in the store"},
    seed=lambda sizes: {"file": Load(4, sizes.middle)},
)
def _append(t: Trial) -> None:
    tail = tuple(Piece(t.sizes.middle + number * 4 * KIB, 2000 + number, 4 * KIB) for number in range(10))
    done = t.do("append", path=t.path("file"), pieces=[(one.seed, one.size) for one in tail])
    t.take_stored("append-stored", done, {"file": Load(4, t.sizes.middle, tail=tail)})


@_workload(
    "git",
    {"git-clone": "git clone of {git} files", "git-status": "git status in it, the second"},
    programs=("git",),
)
def _git(t: Trial) -> None:
    source = str(t.sources.git_repository(t.sizes.git))
    t.take("git-clone", t.do("run", command=["git", "clone", "--quiet", source, "clone"], cwd=t.path()))
    status = ["git", "status", "--porcelain"]
    # git's first one reads again all that changed in the second of its index: 0 to 400 files, by chance
    t.do("run", command=status, cwd=t.path("clone"))
    done = t.do("run", command=status, cwd=t.path("clone"))
    t.same(done.value["count"], 0, "the number of files that git status finds changed")
    t.take("git-status", done)
    t.do("run", command=["git", "fsck", "--no-progress"], cwd=t.path("clone"))


@_workload("pip", {"pip-install": "pip install of a package with {modules} files"}, modules=("pip",))
def _pip(t: Trial) -> None:
    flags = ["--quiet", "--no-index", "--no-deps", "--no-cache-dir", "--disable-pip-version-check"]
    flags += ["--root-user-action", "ignore", "--prefix", t.path("env")]
    wheel = str(t.sources.wheel(t.sizes.modules))
    command = [sys.executable, "-m", "pip", "install", *flags, wheel]
    t.take("pip-install", t.do("run", command=command, cwd="/"))
    done = t.do("run", command=["find", "env", "-name", "module*.py", "-size", "+2k"], cwd=t.path())
    t.same(done.value["count"], t.sizes.modules, "the number of modules installed")


@_workload(
    "remove",
    {
        "remove": "rm -rf of {listed} files in one folder",
        "remove-stored": "the same until they are gone from the store",
    },
    seed=lambda sizes: small_files(sizes.listed, 100),
)
def _remove(t: Trial) -> None:
    # -f: a folder without an object of its own may end with its last file, before rm comes to it
    done = t.do("run", command=["rm", "-rf", "files"], cwd=t.path())
    t.take("remove", done)
    t.take_stored("remove-stored", done, {})


def _quarters(sizes: Sizes) -> Loads:
    return {f"file{number}": Load(10 + number, sizes.quarter) for number in range(4)}


@_workload(
    "parallel",
    {"parallel-cold": "four processes read four files of {quarter} cold at once"},
    seed=_quarters,
    changes=False,
)
def _parallel(t: Trial) -> None:
    names = list(_quarters(t.sizes))
    done = t.do("readers", paths=[t.path(name) for name in names])
    t.same(done.value, [t.sizes.quarter] * 4, "the bytes that were read")
    t.take("parallel-cold", done)


def title(measure: str, sizes: Sizes) -> str:
    """What is measured, in words and with its sizes."""
    text = next(workload.measures[measure] for workload in WORKLOADS.values() if measure in workload.measures)
    return text.format(**sizes.in_words())


def missing_program(workload: Workload) -> str | None:
    missing = [name for name in workload.programs if shutil.which(name) is None]
    missing += [name for name in workload.modules if find_spec(name) is None]
    return next(iter(missing), None)

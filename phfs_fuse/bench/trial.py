"""One system on one repetition of one workload: what `workloads` are written against. State: what it measured."""

from __future__ import annotations

import os
import subprocess
import tempfile
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Final

from phfs_fuse.bench import loads as made
from phfs_fuse.bench.loads import Loads, Piece
from phfs_fuse.bench.processes import Actor, Done, Failed
from phfs_fuse.bench.sizes import Sizes
from phfs_fuse.bench.store import Arrival, Store, wait_until

SYNC_SECONDS: Final = 60


class Sources:
    """What git and pip install from, made once per run on the local disk."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.git_repository = cache(self._git_repository)
        self.wheel = cache(self._wheel)

    def _git_repository(self, files: int) -> Path:
        return made.git_repository(self._fresh(), files)

    def _wheel(self, files: int) -> Path:
        return made.wheel(self._fresh(), files)

    def _fresh(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self._folder))


@dataclass(slots=True, kw_only=True)
class Trial:
    """`root` is where the system's files are; without `store` the files themselves are all that can be asked."""

    root: Path
    work: Path
    sizes: Sizes
    actor: Actor
    sources: Sources
    store: Store | None
    prefix: str  # of the store, "" without one
    endpoint_url: str | None  # as the system sees it
    timeout_seconds: float
    measured: dict[str, float] = field(default_factory=dict)

    # --- what the workload does

    def path(self, *parts: str) -> str:
        return os.path.join(self.root, *parts)

    def scratch(self, name: str) -> Path:
        """A file outside the mount."""
        return self.work / name

    def address(self, name: str) -> dict[str, Any]:
        assert self.store is not None
        return {"endpoint_url": self.endpoint_url, "bucket": self.store.bucket, "key": self.prefix + name}

    def do(self, action: str, **arguments: object) -> Done:
        return self.actor.do(action, self.timeout_seconds, **arguments)

    # --- what it measures

    def take(self, measure: str, done: Done) -> None:
        self.measured[measure] = done.seconds

    def take_stored(self, measure: str, done: Done, loads: Loads, edit: Piece | None = None) -> None:
        """From the begin of `done` until the store has `loads`; where no store can be asked, only the check."""
        if self.store is not None:
            self.measured[measure] = self._stored_at(loads, edit) - done.began
        self.expect(loads)

    def _stored_at(self, loads: Loads, edit: Piece | None) -> float:
        store = self.store
        assert store is not None
        sizes = {name: load.full_size for name, load in loads.items()}

        def is_edited() -> bool:
            assert edit is not None
            return store.range(self.prefix + next(iter(sizes)), edit.offset, edit.size) == edit.content()

        arrived = is_edited if edit is not None else Arrival(store, self.prefix, sizes).is_there
        try:
            return wait_until(arrived, self.timeout_seconds)
        except TimeoutError as exc:
            raise Failed(str(exc)) from exc

    # --- what must be right

    def expect(self, loads: Loads) -> None:
        """Raises: Failed unless the store (or the directory) gets to have exactly these bytes."""
        if self.store is None:
            found = self.do("sums", root=self.path(), names=list(loads)).value
            self.same(found, [load.sha256() for load in loads.values()], "the bytes of the files")
            return
        self._stored_at(loads, None)
        if wrong := self.store.wrong(self.prefix, loads):
            raise Failed(wrong)

    def same(self, found: object, wanted: object, what: str) -> None:
        if found != wanted:
            raise Failed(f"{what}: {str(found)[:80]}, not {str(wanted)[:80]}")

    def drop_page_cache(self) -> bool:
        """False when this user may not."""
        return drop_page_cache(self.work)


def drop_page_cache(folder: Path) -> bool:
    """Write back what lies on the disk of `folder` and drop what the kernel keeps of any file.

    False when this user may not. Not sync(2): it waits for every mount of the machine. Source: proc_sys_vm(5).
    """
    with suppress(OSError, subprocess.TimeoutExpired):
        subprocess.run(["sync", "-f", str(folder)], timeout=SYNC_SECONDS, check=False)
    with suppress(OSError):
        Path("/proc/sys/vm/drop_caches").write_text("3")
        return True
    return False

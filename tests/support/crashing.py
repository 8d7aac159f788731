"""`phfs` with workers that can be killed at one step: each commit of the journal and each change of the store is two
steps, before and after.

    python -m tests.support.crashing COMMAND...     as `phfs COMMAND...`
    python -m tests.support.crashing --keeper...                 a keeper that does not give up
    python -m tests.support.crashing --config FILE --fd N...     a worker, as the keeper starts it

The file `crash-at` in the state directory arms it with a number and a step ("2 after put"); the steps from then on
are appended to `steps`, and the worker dies (SIGKILL) at that one, which disarms it.
"""

from __future__ import annotations

import os
import signal
import sqlite3
import sys
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from phfs_fuse.cli import main as cli
from phfs_fuse.config.model import MountConfig, StoreConfig
from phfs_fuse.config.resolve import load_config
from phfs_fuse.keeper import keeper, worker_process
from phfs_fuse.launch import launcher
from phfs_fuse.state.journal import Journal
from phfs_fuse.store import base, open_store
from phfs_fuse.types import MIB
from phfs_fuse.worker import main as mount
from phfs_fuse.worker import wiring
from phfs_fuse.writeback import multipart_uploads

CHANGES = {
    "put", "copy", "delete", "delete_many", "create_multipart", "upload_part", "upload_part_copy",
    "complete_multipart", "abort_multipart",
}  # fmt: skip
WRITES = ("INSERT", "UPDATE", "DELETE")


class Steps:
    def __init__(self, directory: Path) -> None:
        self._armed, self._log = directory / "crash-at", directory / "steps"

    def __call__(self, name: str) -> None:
        try:
            number, _, target = self._armed.read_text().partition(" ")
        except FileNotFoundError:
            return
        with self._log.open("a+") as log:
            print(name, file=log, flush=True)
            log.seek(0)
            count = log.read().splitlines().count(name)
        if name == target and count == int(number):
            self._armed.unlink()
            os.kill(os.getpid(), signal.SIGKILL)


class CrashingStore:
    def __init__(self, config: StoreConfig, step: Steps) -> None:
        self._inner, self._step = open_store(config), step

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        return partial(self._change, name, found) if name in CHANGES else found

    async def _change(
        self, name: str, call: Callable[..., Awaitable[object]], *args: object, **more: object
    ) -> object:
        step = name.removesuffix("_many")  # how many keys are due at once is a matter of time
        self._step(f"before {step}")
        found = await call(*args, **more)
        self._step(f"after {step}")
        return found


def crash_at_commits(step: Steps) -> None:
    inner = Journal._execute

    def execute(self: Journal, sql: str, values: Sequence[object]) -> sqlite3.Cursor:
        if not (sql == "COMMIT" or (sql.startswith(WRITES) and not self._db.in_transaction)):
            return inner(self, sql, values)
        step("before commit")
        found = inner(self, sql, values)
        step("after commit")
        return found

    Journal._execute = execute  # type: ignore[method-assign]


def worker() -> int:
    config = load_config(Path(sys.argv[sys.argv.index("--config") + 1]).read_text())
    step = Steps(config.writeback.directory)
    crash_at_commits(step)
    multipart_uploads.BEGIN_NS = multipart_uploads.CLOCK_NS = multipart_uploads.IDLE_NS = (
        2 * multipart_uploads.SECOND_NS
    )  # type: ignore[misc]
    base.COPY_BYTES_MAX = 16 * MIB  # type: ignore[misc]
    wiring.open_store = lambda config, _owner, _notes: CrashingStore(config, step)  # type: ignore[assignment, return-value]
    return mount.main()


def patient_keeper() -> int:
    """A keeper that replaces every worker, and at once."""
    worker_process.RESTART_DELAYS = (0.0,) * 1000  # type: ignore[misc, assignment]
    return keeper.main(sys.argv[2:])


def command() -> None:
    """With this module in place of the keeper and of the workers."""
    here = [sys.executable, "-m", "tests.support.crashing"]

    def start(config: MountConfig, path: Path, *, foreground: bool) -> int:
        paths = ["--config", str(path.absolute())]
        launcher.start_logged(config, [*here, "--keeper", *paths], [*here, *paths])
        return 0

    launcher.start = start  # type: ignore[assignment]
    cli.main()


if __name__ == "__main__":
    sys.exit(worker() if "--fd" in sys.argv else patient_keeper() if "--keeper" in sys.argv else command())

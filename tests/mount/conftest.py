"""One mount a module, one folder of it a test, and a watchdog that turns a hang into a failure."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.mount.place import LOCAL_ROOT, LocalPlace, MountPlace, Place

HANG_SECONDS = 600  # of one module
WATCHDOG = """
import select, sys
if not select.select([sys.stdin], [], [], float(sys.argv[2]))[0]:
    open(f"/sys/fs/fuse/connections/{sys.argv[1]}/abort", "w").write("1")
"""


@contextmanager
def watchdog(path: Path) -> Iterator[None]:
    """Abort the mount's connection if the body takes too long: each call that hangs then ends with an error.

    In a process of its own: a hanging page fault stops every thread of this one.
    """
    minor = os.minor(os.stat(path).st_dev)
    argv = [sys.executable, "-c", WATCHDOG, str(minor), str(HANG_SECONDS)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE):  # leaving closes its stdin, which ends it
        yield


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    if LOCAL_ROOT:
        with tempfile.TemporaryDirectory(dir=LOCAL_ROOT) as path:
            yield LocalPlace(Path(path))
        return
    from tests.support.mounts import mounted

    with mounted() as mount, watchdog(mount.path):
        yield MountPlace(mount)


@pytest.fixture
def mnt(place: Place, request: pytest.FixtureRequest) -> Path:
    """An empty folder of its own in the mount."""
    return Path(tempfile.mkdtemp(prefix=request.node.originalname[:40] + ".", dir=place.path))

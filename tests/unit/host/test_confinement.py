"""What a confined process has given up, read from the kernel."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import ctypes, resource, sys
from phfs_fuse.host.confinement import confine
confine()
libc = ctypes.CDLL(None)
print(libc.prctl(39, 0, 0, 0, 0), libc.prctl(3, 0, 0, 0, 0), *resource.getrlimit(resource.RLIMIT_CORE))
"""


@pytest.mark.parametrize("is_open", [False, True])
def test_a_confined_process(is_open: bool) -> None:
    environ = {**os.environ, "PHFS_OPEN_TO_PROFILERS": "1" if is_open else ""}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environ, capture_output=True, text=True, check=True)
    privileges, dumpable, *core = map(int, done.stdout.split())
    assert privileges == 1
    assert dumpable == is_open
    assert (core == [0, 0]) or is_open


def test_workers_are_confined() -> None:
    """All processes that serve a mount or upload what one has left come by this function."""
    code = "import inspect, phfs_fuse.worker.main as m; print('confine()' in inspect.getsource(m.prepare_process))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"

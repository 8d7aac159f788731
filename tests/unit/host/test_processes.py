"""What is waited for has ended, or has not."""

from __future__ import annotations

import os
import resource
import subprocess
import sys

import pytest

from phfs_fuse.host.processes import ended


def test_the_end_of_a_process_is_waited_for() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert not ended(child.pid, 0)
    child.communicate(b"\n")
    assert ended(child.pid, 0)


def test_any_number_of_descriptors_may_be_open() -> None:
    """select(2) would take no descriptor from 1024 on."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2000:
        pytest.skip("needs 2000 descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2000), hard))
    many = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        assert not ended(os.getpid(), 0)
    finally:
        for fd in many:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

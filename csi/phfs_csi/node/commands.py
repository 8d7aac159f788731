"""Programs that do one system call on a mount, and may hang as it may: children with a deadline. Owns no state."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from typing import Final

from phfs_csi.errors import DeadlineExceeded, Internal

CHILD_SECONDS: Final = 20.0


def run(command: Sequence[str], seconds: float = CHILD_SECONDS) -> str:
    """The output. A child that hangs is left behind: even SIGKILL may not end it. Raises: CsiError."""
    try:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/"
        )
    except OSError as exc:
        raise Internal(f"{command[0]}: {exc.strerror}") from exc
    try:
        output, reason = child.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        child.kill()
        raise DeadlineExceeded(f"{' '.join(command)}: no answer in {seconds:.0f} s") from None
    if child.returncode:
        raise Internal(f"{' '.join(command)}: {' '.join(reason.split())}")
    return output

"""Two directories and one agent in each: every call goes to both. State: the agents' processes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from phfs_fuse.host.processes import readable
from tests.model import agent

CALL_SECONDS = 60.0


class Agent:
    """A process that makes calls below `root`; see agent.py."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._process = subprocess.Popen(
            [sys.executable, str(agent.__file__), str(root)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def call(self, *request: object) -> Any:
        """The answer to `[method, argument...]`; AssertionError if none comes in time."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        assert readable(self._process.stdout.fileno(), CALL_SECONDS), f"{request} hangs below {self._root}"
        line = self._process.stdout.readline()
        assert line, f"{request} ended the agent below {self._root}"
        return json.loads(line)

    def end(self) -> None:
        self._process.kill()
        self._process.communicate(timeout=30)


class Pair:
    """`subject` is judged by `model`."""

    def __init__(self, subject: Path, model: Path) -> None:
        self._roots = (subject, model)
        self._agents = [Agent(root) for root in self._roots]

    def both(self, *request: object) -> Any:
        """Make the call in both; what the model answered. AssertionError if the subject answers otherwise."""
        got, wanted = (agent.call(*request) for agent in self._agents)
        assert got == wanted, f"{request}: {got} instead of {wanted}"
        return wanted

    def model(self, *request: object) -> Any:
        return self._agents[1].call(*request)

    def agree_within(self, seconds: float) -> None:
        """Compare the trees until they agree."""
        wanted, deadline = self._agents[1].call("tree"), time.monotonic() + seconds
        while (got := self._agents[0].call("tree")) != wanted:
            assert time.monotonic() < deadline, f"{got} instead of {wanted}"
            time.sleep(0.05)

    def pause(self) -> None:
        """Let go of both directories."""
        for one in self._agents:
            one.end()

    def resume(self) -> None:
        self._agents = [Agent(root) for root in self._roots]

"""The mount that is compared with a local directory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.mount.place import Place, a_place


@pytest.fixture
def place() -> Iterator[Place]:
    with a_place(module="tests.support.crashing") as found:  # its keeper replaces a worker as often as it dies
        yield found

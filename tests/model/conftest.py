"""The mount that is compared with a local directory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.mount.place import Place, a_place


@pytest.fixture
def place() -> Iterator[Place]:
    with a_place() as found:
        yield found

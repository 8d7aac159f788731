"""One mount a module, one folder of it a test."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.place import Place, a_place

NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    with a_place() as found:
        yield found


@pytest.fixture
def mnt(place: Place, request: pytest.FixtureRequest) -> Path:
    """An empty folder of its own in the mount."""
    folder = place.path / f"{request.node.originalname[:40]}-{next(NUMBERS)}"
    folder.mkdir()
    return folder

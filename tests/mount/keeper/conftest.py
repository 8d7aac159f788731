from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.keeper.place import Place


@pytest.fixture
def place() -> Iterator[Place]:
    place = Place(Path(tempfile.mkdtemp(prefix="phfs-keeper-")))
    try:
        yield place
    finally:
        place.remove()

"""A world over a store without faults."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.fake_store import FakeStore
from tests.support.world import World, made, running


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with running(made(FakeStore(), tmp_path)) as world:
        yield world

from __future__ import annotations

import pytest

from tests.component.cache.samples import DATA
from tests.support.caches import KEY, RangeStore


@pytest.fixture
def store() -> RangeStore:
    """With one object, KEY."""
    store = RangeStore()
    store.seed(KEY, DATA)
    return store

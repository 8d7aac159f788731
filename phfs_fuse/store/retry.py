"""How often and how late a failed request is sent again. Owns no state."""

from __future__ import annotations

import logging
import random
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

import trio

from phfs_fuse.errors import StoreUnavailable
from phfs_fuse.store.error_codes import OutOfRange

log = logging.getLogger(__name__)

T = TypeVar("T")

BACKOFF_SECONDS: Final = 0.1
BACKOFF_SECONDS_MAX: Final = 5.0


def backoff_seconds(attempt_no: int) -> float:
    """Wait before the try after `attempt_no` (from 0): exponential with full jitter."""
    doublings = min(attempt_no + 1, 10)  # more would overflow in the end, and the limit is reached before
    return random.uniform(0, min(BACKOFF_SECONDS_MAX, BACKOFF_SECONDS * 2**doublings))


async def retrying(attempts_max: int, attempt: Callable[[int], Awaitable[T]]) -> T:
    """What `attempt(attempt_no)` returns at the first try that does not fail for a passing reason.

    Raises: what the last try raised, or at once what no second try can change.
    """
    for attempt_no in range(attempts_max - 1):
        try:
            return await attempt(attempt_no)
        except OutOfRange:
            raise
        except StoreUnavailable as exc:
            log.debug("attempt %d of %d failed: %s", attempt_no + 1, attempts_max, exc)
        await trio.sleep(backoff_seconds(attempt_no))
    return await attempt(attempts_max - 1)

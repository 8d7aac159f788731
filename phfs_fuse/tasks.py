"""Running several awaitable calls at once, and tasks that an unforeseen exception does not end. Owns no state.

A task that a worker keeps is started by `survived` or `lasting`: an exception that its code should have answered, and
did not, is logged with its traceback, counted, and ends no nursery. What cannot go on without ends the worker on
purpose and by name, as a `StartupError`: the connection of the kernel, the journal.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, TypeVar

import trio

from phfs_fuse import metrics
from phfs_fuse.errors import PhfsError, StartupError

log = logging.getLogger(__name__)

T = TypeVar("T")

PAUSE_SECONDS: Final = 1.0  # before a service that has failed is begun again; doubled with each failure in a row
PAUSE_SECONDS_MAX: Final = 60.0


async def gather(calls: Sequence[Callable[[], Awaitable[T]]]) -> list[T]:
    """The results of `calls`, in their order. The first PhfsError or OSError cancels the others and is raised as
    itself, not in a group."""
    results: dict[int, T] = {}

    async def one(index: int, call: Callable[[], Awaitable[T]]) -> None:
        results[index] = await call()

    try:
        async with trio.open_nursery() as nursery:
            for index, call in enumerate(calls):
                nursery.start_soon(one, index, call)
    except BaseExceptionGroup as group:
        answers, rest = group.split((PhfsError, OSError))
        if rest is not None:  # cancelled meanwhile, or a bug: what the calls answered counts no more
            raise rest from None
        assert answers is not None
        first: BaseException = answers
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise first from None
    return [results[index] for index in range(len(calls))]


@dataclass(slots=True)
class Outcome:
    """The end of a piece of work; `failure` None: as it should."""

    failure: BaseException | None = None


def unforeseen(work: str, exc: BaseException) -> None:
    """Report an exception that the code of `work` should have answered: with its traceback, and as a count."""
    log.error("%s failed for a reason that nobody foresaw; it is tried again later", work, exc_info=exc)
    metrics.UNFORESEEN.add(1, work)


@contextmanager
def surviving(work: str) -> Iterator[Outcome]:
    """Let no exception leave the block but those that end a task on purpose: cancellation and `StartupError`."""
    outcome = Outcome()
    try:
        yield outcome
    except BaseException as exc:
        found, rest = exc.split(_is_bug) if isinstance(exc, BaseExceptionGroup) else _sorted(exc)
        if found is not None:
            outcome.failure = found
            unforeseen(work, found)
        if rest is exc:
            raise
        if rest is not None:
            raise rest from None


def _is_bug(exc: BaseException) -> bool:
    return isinstance(exc, Exception) and not isinstance(exc, (StartupError, BaseExceptionGroup))


def _sorted(exc: BaseException) -> tuple[BaseException | None, BaseException | None]:
    return (exc, None) if _is_bug(exc) else (None, exc)


async def survived(work: str, call: Callable[..., Awaitable[object]], *args: object) -> None:
    """One task, once: whatever else there is to do about its failure is done by `call` itself."""
    with surviving(work):
        await call(*args)


async def lasting(
    work: str,
    service: Callable[..., Awaitable[object]],
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Run `service`, and again after a pause whenever it fails, until it returns. What fails before the service has
    said that it is started is the caller's."""
    start = _Start(task_status)
    is_awaited = task_status is not trio.TASK_STATUS_IGNORED
    pause = PAUSE_SECONDS
    while True:
        began_at = trio.current_time()
        with surviving(work) as outcome:
            await (service(task_status=start) if is_awaited else service())
        if outcome.failure is None:
            return
        if is_awaited and not start.is_over:
            raise outcome.failure
        if trio.current_time() - began_at > PAUSE_SECONDS_MAX:
            pause = PAUSE_SECONDS
        await trio.sleep(pause)
        pause = min(2 * pause, PAUSE_SECONDS_MAX)


class _Start:
    """The start of a service, which is told to its nursery once."""

    def __init__(self, task_status: trio.TaskStatus[None]) -> None:
        self._task_status = task_status
        self.is_over = False

    def started(self, value: None = None) -> None:
        if not self.is_over:
            self.is_over = True
            self._task_status.started(value)

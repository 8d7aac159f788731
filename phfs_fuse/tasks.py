"""Running several awaitable calls at once. Owns no state."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import trio

from phfs_fuse.errors import PhfsError

T = TypeVar("T")


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
        if rest is not None or answers is None:
            raise
        first: BaseException = answers
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise first from None
    return [results[index] for index in range(len(calls))]

"""The disk of the local state has no byte left when the journal commits: what is refused has no effect."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path

import pytest
from trio.testing import MockClock

from tests.support.fake_store import FakeStore
from tests.support.world import PREFIX, World, keys, made, running


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with running(made(FakeStore(), tmp_path)) as world:
        yield world


def fail_next_commit(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    execute = world.journal._execute

    def failing(sql: str, values: Sequence[object]) -> object:
        if sql == "COMMIT":
            monkeypatch.undo()
            raise OSError(errno.ENOSPC, "full")
        return execute(sql, values)

    monkeypatch.setattr(world.journal, "_execute", failing)


MAKE: dict[str, Callable[[World], Awaitable[object]]] = {
    "file": lambda world: world.vfs.create(1, b"new", 0o644, os.O_RDWR | os.O_EXCL, 0, 0),
    "folder": lambda world: world.vfs.mkdir(1, b"new", 0o755, 0, 0),
    "link": lambda world: world.vfs.symlink(1, b"new", b"target", 0, 0),
}


@pytest.mark.parametrize("kind", MAKE)
async def test_what_could_not_be_made_is_not_there(
    world: World, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock, kind: str
) -> None:
    fail_next_commit(world, monkeypatch)
    with pytest.raises(OSError, match="full") as refused:
        await MAKE[kind](world)
    assert refused.value.errno == errno.ENOSPC
    assert await world.names() == []
    assert world.area.held_bytes == 0
    await world.settle()
    assert [key for key in keys(world) if key] == []
    await MAKE[kind](world)
    await world.settle()
    assert await world.names() == ["new"]
    assert len([key for key in keys(world) if key]) == 1


async def test_what_had_that_name_before_is_still_deleted(
    world: World, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    world.store.seed(PREFIX + "new", b"old")
    await world.vfs.unlink(1, b"new")
    fail_next_commit(world, monkeypatch)
    with pytest.raises(OSError, match="full"):
        await MAKE["file"](world)
    await world.settle()
    assert [key for key in keys(world) if key] == []

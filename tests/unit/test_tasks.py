"""Tasks that survive what nobody foresaw, and the tasks of the worker, each of which is to be one of them."""

from __future__ import annotations

import ast
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

import phfs_fuse
from phfs_fuse import metrics
from phfs_fuse.errors import NotDrained, NotFound
from phfs_fuse.tasks import gather, lasting, survived, surviving

SOURCES = Path(phfs_fuse.__file__).parent
# Tasks that end with the block that starts them: their failure is that of whoever waits for the block.
PARTS_OF_A_CALL = {
    ("tasks", "one"),
    ("worker.control_socket", "report"),
    ("worker.serving", "stop"),
    ("worker.serving", "self._end_damaged"),  # ends the worker on purpose
    ("worker.serving", "self._announce"),  # survives in itself: without READY the keeper waits in vain
    ("store.notifications", "read"),
}


def starts() -> Iterator[tuple[str, str]]:
    """(module, what is started) of each task of a nursery."""
    for path in sorted(SOURCES.rglob("*.py")):
        module = ".".join(path.relative_to(SOURCES).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args):
                continue
            is_start = node.func.attr == "start" and "services" in ast.unparse(node.func.value)
            if node.func.attr == "start_soon" or is_start:
                yield module, ast.unparse(node.args[0])


def test_each_task_of_the_worker_survives() -> None:
    found = set(starts())
    assert len(found) > 10
    assert {(module, what) for module, what in found if what not in ("survived", "lasting")} == PARTS_OF_A_CALL


@pytest.fixture(autouse=True)
def counted() -> Iterator[None]:
    metrics.UNFORESEEN.values.clear()
    yield
    metrics.UNFORESEEN.values.clear()


async def fail() -> None:
    raise LookupError("unknown encoding")


async def fail_in_a_nursery() -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(fail)
        await trio.sleep_forever()


async def test_what_nobody_foresaw_is_told_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(survived, "upload", fail)
        nursery.start_soon(survived, "upload", fail_in_a_nursery)
    assert metrics.UNFORESEEN.values == {"upload": 2}
    assert [record.levelno for record in caplog.records] == [logging.ERROR] * 2
    assert all(record.exc_info for record in caplog.records)
    assert "unknown encoding" in caplog.text


async def test_what_ends_a_worker_on_purpose_passes() -> None:
    with pytest.raises(NotDrained), surviving("mount"):
        raise NotDrained("left")
    with trio.CancelScope() as scope:
        scope.cancel()
        with surviving("mount"):
            await trio.sleep_forever()
    assert scope.cancelled_caught
    assert not metrics.UNFORESEEN.values


async def test_a_failure_while_a_task_is_cancelled_is_no_reason_to_go_on() -> None:
    async def fail_at_the_end() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise LookupError

    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(survived, "upload", fail_at_the_end)
            nursery.start_soon(trio.sleep_forever)
            scope.cancel()
    assert scope.cancelled_caught
    assert metrics.UNFORESEEN.values == {"upload": 1}


async def test_calls_that_fail_while_they_are_cancelled_end_as_cancelled() -> None:
    async def fail_at_the_end() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise NotFound("head", "x")

    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(gather, [fail_at_the_end, trio.sleep_forever])
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
    assert scope.cancelled_caught


class Failing:
    """A service that fails some times, and then goes on."""

    def __init__(self, failures: int, *, before_start: bool = False) -> None:
        self.starts: list[float] = []
        self._failures, self._before_start = failures, before_start

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        self.starts.append(trio.current_time())
        if self._before_start:
            raise LookupError("no socket")
        task_status.started()
        if len(self.starts) <= self._failures:
            raise RecursionError
        await trio.sleep_forever()


@pytest.mark.parametrize("is_awaited", [True, False])
async def test_a_service_is_begun_again_later_and_later(autojump_clock: MockClock, is_awaited: bool) -> None:
    service = Failing(8)
    async with trio.open_nursery() as nursery:
        if is_awaited:
            await nursery.start(lasting, "service", service.run)
        else:
            nursery.start_soon(lasting, "service", service.run)
        await trio.sleep(1000)
        nursery.cancel_scope.cancel()
    assert len(service.starts) == 9
    pauses = [after - before for before, after in zip(service.starts, service.starts[1:], strict=False)]
    assert pauses == sorted(pauses)
    assert pauses[0] < pauses[-1] == 60
    assert metrics.UNFORESEEN.values == {"service": 8}


async def test_a_service_that_cannot_start_says_so() -> None:
    with pytest.raises(ExceptionGroup) as caught:
        async with trio.open_nursery() as nursery:
            await nursery.start(lasting, "service", Failing(0, before_start=True).run)
    assert caught.value.subgroup(LookupError) is not None

"""A worker of what is installed now, which is to take over from the one that serves. Standard library only.

State: that worker, from its start until it takes over or is no more; what it says against that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from phfs_fuse.keeper.event_loop import EventLoop
from phfs_fuse.keeper.messages import Kind, Message
from phfs_fuse.keeper.worker_process import Worker, ending

STANDBY_SECONDS: Final = 60.0  # for a worker to load and look at the state, before it may take over


def refusal(reason: str, exit_code: int = 1) -> Message:
    return Message(kind=Kind.REFUSED, reason=reason, exit_code=exit_code)


class Successor:
    """`on_ready`: it has seen that it can take over. `on_refused`: it cannot, and nothing has changed."""

    def __init__(
        self,
        loop: EventLoop,
        start: Callable[[], Worker],
        on_ready: Callable[[], None],
        on_refused: Callable[[Message], None],
    ) -> None:
        self._loop = loop
        self._start = start
        self._on_ready = on_ready
        self._on_refused = on_refused
        self._worker: Worker | None = None
        self._refusal = Message(kind=Kind.REFUSED)  # what it says last

    @property
    def is_there(self) -> bool:
        return self._worker is not None

    def start(self) -> None:
        """Where none is there."""
        self._refusal = Message(kind=Kind.REFUSED)
        try:
            self._worker = self._start()
        except OSError as exc:
            self._on_refused(refusal(f"no worker: {exc}"))
            return
        self._worker.hear({Kind.STANDBY: self._on_standby, Kind.FAILED: self._on_failed}, self._on_end)
        self._loop.call_later(STANDBY_SECONDS, self._end_slow)

    def take(self) -> Worker:
        """It goes on in the place of the other one, and is the caller's."""
        assert self._worker is not None
        self._loop.cancel(self._end_slow)
        worker, self._worker = self._worker, None
        return worker

    def end(self) -> None:
        if self._worker is not None:
            self._worker.kill()
            self._worker.reap()

    def _on_standby(self, _message: Message) -> None:
        self._loop.cancel(self._end_slow)
        self._on_ready()

    def _on_failed(self, message: Message) -> None:
        self._refusal = refusal(message.reason, message.exit_code)

    def _on_end(self, code: int) -> None:
        self._loop.cancel(self._end_slow)
        self._worker = None
        reason = self._refusal.reason or f"the new worker ended with {ending(code)}"
        self._on_refused(refusal(reason, self._refusal.exit_code or 1))

    def _end_slow(self) -> None:
        if self._worker is not None:
            self._refusal = refusal("the new worker does not get ready")
            self._worker.kill()

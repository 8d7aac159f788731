"""What the keeper waits for: files that can be read, calls that are due, signals. Standard library only.

State: who hears which file, and which call is due when.

A call that fails for a reason that nobody foresaw does not end the loop, and with it the mount: it is logged, and
what was due is tried again later.
"""

from __future__ import annotations

import contextlib
import logging
import selectors
import signal
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Final, Protocol

log = logging.getLogger(__name__)

PAUSE_SECONDS: Final = 0.1  # after a failure; doubled with each in a row
PAUSE_SECONDS_MAX: Final = 5.0


class HasFileno(Protocol):
    def fileno(self) -> int: ...


Source = int | HasFileno


class EventLoop:
    """One thread; whoever is called may watch, forget and cancel what it likes."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._due: dict[Callable[[], object], float] = {}
        self._pause = PAUSE_SECONDS

    def watch(self, source: Source, call: Callable[[], object]) -> None:
        """Call it whenever `source` can be read, in place of what was called for it so far."""
        self.forget(source)
        self._selector.register(source, selectors.EVENT_READ, call)

    def forget(self, source: Source) -> None:
        """Before it is closed. Also of one that is not watched."""
        if self.watches(source):
            self._selector.unregister(source)

    def watches(self, source: Source) -> bool:
        return source in self._selector.get_map()

    def call_later(self, seconds: float, call: Callable[[], object]) -> None:
        """Once; the same call again is put off."""
        self._due[call] = time.monotonic() + seconds

    def cancel(self, call: Callable[[], object]) -> None:
        self._due.pop(call, None)

    def step(self) -> None:
        """Wait for one thing, and call whom it concerns. Just one: that may change everything for the next."""
        first = min(self._due, key=self._due.__getitem__, default=None)
        wait = None if first is None else max(0.0, self._due[first] - time.monotonic())
        if first is not None and not wait:
            del self._due[first]
            if not self._survived(first):
                self._due.setdefault(first, time.monotonic() + self._pause)
            return
        for key, _events in self._selector.select(wait)[:1]:
            if not self._survived(key.data):
                time.sleep(self._pause)  # what it should have read may be there still

    def _survived(self, call: Callable[[], object]) -> bool:
        """Whether `call` has ended as it should."""
        try:
            call()
        except Exception:
            log.exception("%r failed for a reason that nobody foresaw; it is tried again", call)
            self._pause = min(2 * self._pause, PAUSE_SECONDS_MAX)
            return False
        self._pause = PAUSE_SECONDS
        return True

    @contextlib.contextmanager
    def hearing(self, numbers: Iterable[int], call: Callable[[int], None]) -> Iterator[None]:
        """Hear of these signals, but for those that are to be ignored, as nohup wants it."""
        heard, wakeup = socket.socketpair()
        with heard, wakeup:
            wakeup.setblocking(False)
            signal.set_wakeup_fd(wakeup.fileno())
            for number in numbers:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    signal.signal(number, lambda _number, _frame: None)
            self.watch(heard, lambda: call(heard.recv(1)[0]))
            yield
            self.forget(heard)
            signal.set_wakeup_fd(-1)

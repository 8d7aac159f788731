"""What the keeper waits for: files that can be read, calls that are due, signals. Standard library only.

State: who hears which file, and which call is due when.
"""

from __future__ import annotations

import contextlib
import selectors
import signal
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol


class HasFileno(Protocol):
    def fileno(self) -> int: ...


Source = int | HasFileno


class Loop:
    """One thread; whoever is called may watch, forget and cancel what it likes."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._due: dict[Callable[[], object], float] = {}

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
            first()
            return
        for key, _events in self._selector.select(wait)[:1]:
            key.data()

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

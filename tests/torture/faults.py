"""What the store of one mount does to its requests. Owns the chance of each."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.support.proxy import Answer, Forward, Request


@dataclass
class Faults:
    """`chance`: of a fault at each request; `away`: all are refused; `seen` is told of each."""

    random: random.Random
    seen: Callable[[Request], None] = lambda _: None
    chance: float = 0.0
    away: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def script(self, request: Request) -> Answer | Forward:
        with self._lock:
            self.seen(request)
            return self._fault(request)

    def _fault(self, request: Request) -> Answer | Forward:
        if self.away:
            return Answer(503)
        fault = self.random.random() / self.chance if self.chance else 1.0
        if fault >= 1.0:
            return Forward()
        if fault < 0.5:
            return Answer(503 if fault < 0.3 else 500)
        if fault < 0.8 and request.method != "GET":
            return Forward(lost=True)
        return Forward(cut=self.random.randrange(2000))

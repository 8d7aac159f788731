"""Admission of calls to the threads of the server: each kind, each volume, and all inline volumes together have a
bounded share of them. A call that finds its share used up is refused at once, and waits on no thread.

State: how many calls of each share are at work.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any, Final

from phfs_csi.errors import Aborted, CsiError, ResourceExhausted
from phfs_csi.request.node_requests import is_inline

INLINE_MAX: Final = 8  # anybody who may start a pod names their stores
OF_ONE_VOLUME_MAX: Final = 8  # of each kind


class Kind(Enum):
    """Calls that wait for the same thing. Calls of no kind wait for nothing."""

    BEGIN = "begin"  # waits for a store
    END = "end"  # waits for uploads
    LOOK = "look"  # waits for a mount


MAX: Final = {Kind.BEGIN: 64, Kind.END: 96, Kind.LOOK: 32}
THREADS: Final = sum(MAX.values()) + 64  # the rest is for what waits for nothing, refusals among it
_KINDS: Final = {
    **dict.fromkeys(("NodeStageVolume", "NodePublishVolume", "NodeExpandVolume"), Kind.BEGIN),
    **dict.fromkeys(("CreateVolume", "DeleteVolume", "ControllerExpandVolume"), Kind.BEGIN),
    "ValidateVolumeCapabilities": Kind.BEGIN,
    **dict.fromkeys(("NodeUnstageVolume", "NodeUnpublishVolume"), Kind.END),
    "NodeGetVolumeStats": Kind.LOOK,
}


class Admission:
    """All methods may be called by any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._at_work: Counter[Hashable] = Counter()

    @contextmanager
    def hold(self, method: str, request: Any) -> Iterator[None]:
        """One call at work. Raises: Aborted, ResourceExhausted; the same call may be made again."""
        if (kind := _KINDS.get(method)) is None:
            yield
            return
        shares = _shares(kind, method, request)
        with self._lock:
            for share, (limit, refusal) in shares.items():
                if self._at_work[share] >= limit:
                    raise refusal
            self._at_work.update(shares.keys())
        try:
            yield
        finally:
            with self._lock:
                self._at_work.subtract(shares.keys())
                self._at_work += Counter()  # forgets those at 0


def _shares(kind: Kind, method: str, request: Any) -> dict[Hashable, tuple[int, CsiError]]:
    """Each share that the call takes a part of, with its limit and the refusal of a call over that."""
    volume = getattr(request, "volume_id", "") or getattr(request, "name", "")
    crowded = ResourceExhausted(f"{method}: too many calls wait already; try again")
    shares: dict[Hashable, tuple[int, CsiError]] = {
        kind: (MAX[kind], crowded),
        (kind, volume): (OF_ONE_VOLUME_MAX, Aborted(f"{volume}: too many calls for this volume are at work")),
    }
    if method == "NodePublishVolume" and is_inline(request):
        reason = "too many inline volumes are being mounted on this node; try again"
        shares["inline"] = (INLINE_MAX, ResourceExhausted(f"{volume}: {reason}"))
    return shares

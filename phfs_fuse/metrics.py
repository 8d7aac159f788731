"""Every metric of a worker: its name, its unit, what its label tells apart, and whether the name will stay.

Owns the counters of the process. They are counted where things happen, by whoever does them, which is why they are
the one thing that no object is handed: a worker is one mount. To count costs one addition in a dict.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Final


class Metric:
    """A counter that only grows. `label` is what the values are told apart by; "" if there is but one.

    `is_stable`: a later version keeps name, unit and label. The others show how this version works.
    """

    def __init__(self, name: str, unit: str, label: str, help_text: str, *, is_stable: bool = True) -> None:
        self.name, self.unit, self.label, self.help_text = name, unit, label, help_text
        self.is_stable = is_stable
        self.values: Counter[str] = Counter()
        METRICS.append(self)

    def add(self, amount: int = 1, label: str = "") -> None:
        """Atomic on one thread; counts of other threads may be lost: only the trio thread counts."""
        self.values[label] += amount


METRICS: Final[list[Metric]] = []

FUSE_REQUESTS: Final = Metric("fuse_requests", "requests", "op", "Requests of the kernel.")
FUSE_WAITS: Final = Metric("fuse_waits", "waits", "", "Waits for a request of the kernel.", is_stable=False)
STORE_REQUESTS: Final = Metric("store_requests", "requests", "op", "Requests to the store, repetitions included.")
STORE_SENT: Final = Metric("store_sent_bytes", "bytes", "op", "Bodies of requests to the store.")
STORE_RECEIVED: Final = Metric("store_received_bytes", "bytes", "op", "Bytes of objects that were asked for.")
UPLOADED_FILES: Final = Metric("uploaded_files", "files", "", "Versions of files that the store took.")
UPLOADED_BYTES: Final = Metric("uploaded_bytes", "bytes", "", "Changed bytes of these.")
UPLOAD_FAILURES: Final = Metric("upload_failures", "tries", "", "Uploads and deletions that will be tried again.")
UNFORESEEN: Final = Metric("unforeseen_failures", "failures", "work", "Exceptions that nobody foresaw, and survived.")
LEFT_UPLOADS: Final = Metric(
    "left_uploads",
    "uploads",
    "outcome",
    "Multipart uploads left behind: aborted, or kept as perhaps another client's.",
)
CONFLICTS: Final = Metric("conflicts", "files", "", "Changes that lost against those of somebody else and were kept.")
REFUSED: Final = Metric("refused", "changes", "operation", "Changes that the store refused for good.")
JOURNAL: Final = Metric("journal_transactions", "transactions", "", "Commits of the journal.", is_stable=False)
HOPS: Final = Metric("thread_hops", "calls", "pool", "Calls that the event loop gave to a thread.", is_stable=False)
COPIED: Final = Metric("copied_bytes", "bytes", "", "Bytes copied from one local file to another.", is_stable=False)


def snapshot() -> Mapping[str, int | Mapping[str, int]]:
    """Name to value, or to label value to value."""
    return {m.name: dict(m.values) if m.label else m.values[""] for m in METRICS}

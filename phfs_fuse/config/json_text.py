"""JSON from other processes, files and the cluster -> plain values. Owns no state. Standard library only: the keeper
imports this.

Apart from `json`, whose parser raises RecursionError for a deep nest: an exception that none of those who read a
packet expect.
"""

from __future__ import annotations

import json
from typing import Any


def parse(text: str | bytes) -> Any:
    """The value that `text` writes. Raises: ValueError."""
    try:
        return json.loads(text)
    except RecursionError as exc:
        raise ValueError("nested too deeply") from exc

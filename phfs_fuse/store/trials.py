"""Objects on which a mount tries out its store. Each is noted in a file before it is stored, and until it is removed
again: what a death leaves of them is removed by the next process. Owns that file.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Final

import trio

from phfs_fuse.config.model import StoreConfig
from phfs_fuse.errors import PhfsError
from phfs_fuse.keys import TRIAL
from phfs_fuse.store.base import NOT_THERE
from phfs_fuse.store.boto import BotoTransport
from phfs_fuse.store.retry import retrying
from phfs_fuse.types import ObjectKey

log = logging.getLogger(__name__)

CLEANUP_SECONDS: Final = 30.0


class TrialObjects:
    """Of one store. Their names are never shown, and no file can have one."""

    def __init__(self, config: StoreConfig, calls: BotoTransport, owner: str, notes: Path | None) -> None:
        """`notes`: the file; None: nothing is noted."""
        self._config, self._calls, self._notes = config, calls, notes
        self._start = config.prefix + TRIAL
        self._is_same = bool(owner)
        self.name = TRIAL + (owner or secrets.token_hex(8))
        self._read: set[ObjectKey] | None = None  # when first used: an earlier process may be at its end until then
        self._under_way: set[ObjectKey] = set()

    @property
    def _left(self) -> set[ObjectKey]:
        if self._read is None:
            self._read = self._noted()
        return self._read

    @asynccontextmanager
    async def trying(self, key: ObjectKey) -> AsyncIterator[None]:
        """Within the block, which may store `key`, it is noted; then it is removed. What cannot be removed now is
        `tidy`'s. Raises: OSError of the file."""
        self._note(self._left | {key})
        self._under_way.add(key)
        try:
            yield
        finally:
            with trio.move_on_after(CLEANUP_SECONDS, shield=True), suppress(PhfsError):
                await self._remove(key)
            self._under_way.discard(key)

    async def tidy(self) -> None:
        """Remove what is left. Costs nothing if nothing is. Raises: PhfsError."""
        for key in self._left - self._under_way:
            await self._remove(key)

    async def clear(self, key: ObjectKey) -> None:
        """Remove what an earlier process may have left under a name that is the same for each."""
        if self._is_same:
            with suppress(PhfsError):
                await self._delete(key)

    async def _delete(self, key: ObjectKey) -> None:
        with suppress(*NOT_THERE):
            await self._calls.access.renewing(
                lambda: retrying(self._config.attempts_max, lambda _: self._calls.delete(key, None))
            )

    async def _remove(self, key: ObjectKey) -> None:
        await self._delete(key)
        with suppress(OSError):  # once more, then
            self._note(self._left - {key})

    def _noted(self) -> set[ObjectKey]:
        """What an earlier process has noted; no key that is not of a trial."""
        try:
            keys = json.loads(self._notes.read_text()) if self._notes is not None else []
            return {ObjectKey(key) for key in keys if key.startswith(self._start)}
        except FileNotFoundError:
            return set()
        except (OSError, ValueError, TypeError, AttributeError) as exc:
            log.warning("%s cannot be read, objects of a trial may be left in the store: %s", self._notes, exc)
            return set()

    def _note(self, keys: set[ObjectKey]) -> None:
        if self._notes is not None and keys:
            fresh = self._notes.with_suffix(".new")
            fresh.write_text(json.dumps(sorted(keys)))
            fresh.replace(self._notes)
        elif self._notes is not None:
            self._notes.unlink(missing_ok=True)
        self._read = keys

"""Keeps quotas true: their limits by flag, file and command, their use by counting the store now and then.

Owns the limits by where they come from. Use and commands are remembered in the journal, so that a worker that goes on
has them at once; a new mount starts from the use that the one before knew, and its own limits.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

import trio

from phfs_fuse.config import json_text, values
from phfs_fuse.config.model import QuotaConfig
from phfs_fuse.errors import ConfigError, LocalStateError, PhfsError
from phfs_fuse.keys import segment_of
from phfs_fuse.quota.limits import Quotas
from phfs_fuse.state.journal import Journal
from phfs_fuse.store.base import ObjectStore
from phfs_fuse.tasks import lasting, surviving

log = logging.getLogger(__name__)

LOOK_SECONDS: Final = 1.0  # between two looks at the file, and two notes of the use
PAUSE_SECONDS: Final = 5.0  # at least, between two counts
PAUSE_FACTOR: Final = 20  # and this many times as long as the last one took
RETRY_SECONDS: Final = 10.0
USED: Final = "quota-used"  # by prefix
SET: Final = "quota-set"  # by path; null: taken away


class QuotaCounter:
    def __init__(
        self,
        *,
        quotas: Quotas,
        store: ObjectStore,
        known_sizes: Callable[[], dict[str, int]],
        journal: Journal,
        config: QuotaConfig,
        prefix: str,
    ) -> None:
        self._quotas = quotas
        self._store = store
        self._known_sizes = known_sizes
        self._journal = journal
        self._config = config
        self._prefix = prefix
        self._from_file: Mapping[str, int] = {}
        self._seen: object = None  # what tells one content of the file from another
        self._set: dict[str, int | None] = {}  # by command
        self._noted: Mapping[str, int] = {}
        self._paths: dict[str, str] = {}
        self._some = trio.Event()  # there is a quota, or may be: until then nothing is looked at
        self._next = math.inf
        self._earliest = -math.inf
        self._failed = False

    def begin(self, *, resumed: bool) -> None:
        """Raises: ConfigError, the file of quotas cannot be read; not when `resumed`, the mount is there already."""
        self._seen = _version(self._config.file)
        try:
            self._from_file = _read(self._config.file)
        except ConfigError as exc:
            if not resumed:
                raise
            log.error("%s", exc)
        if resumed:
            self._set = _mapping(self._journal.note(SET))
        else:
            self._journal.set_note(SET, None)
        self._noted = {name: size for name, size in _mapping(self._journal.note(USED)).items() if size is not None}
        self._apply()

    def _apply(self) -> None:
        wanted = {**self._config.limits, **self._from_file, **self._set}
        self._paths = {self._prefix_of(path): path for path, size in wanted.items() if size is not None}
        self._quotas.limit({self._prefix_of(path): size for path, size in wanted.items() if size}, self._noted)
        if self._quotas or self._config.file is not None:
            self._some.set()

    def _prefix_of(self, path: str) -> str:
        return self._prefix + "".join(segment_of(os.fsencode(part)) + "/" for part in path.split("/") if part)

    def set(self, path: str, size: int | None) -> None:
        """From now on, until the mount ends, `path` may hold `size` bytes (None: has no quota of its own), whatever
        flags and file say. Raises: LocalStateError, it is so but will not be after a restart of the worker."""
        self._set[path] = size
        self._apply()
        log.info("quota of /%s is %s now", path, "no more" if size is None else f"{size} bytes")
        try:
            self._journal.set_note(SET, json.dumps(self._set))
        except OSError as exc:
            raise LocalStateError(f"the quota is set but cannot be remembered: {exc}") from exc

    def shown(self) -> Sequence[Mapping[str, object]]:
        """For status."""
        return [
            {
                "path": self._paths[quota.prefix],
                "limit": quota.limit,
                "used": quota.used,
                "free": quota.free,
                "counted": quota.counted,
                "refused": quota.refused,
            }
            for quota in self._quotas
        ]

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Service."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(lasting, "quota file", self._look)
                nursery.start_soon(lasting, "quota count", self._count_now_and_then)
                task_status.started()
        finally:
            self._note()

    async def _look(self) -> None:
        await self._some.wait()
        while True:
            await trio.sleep(LOOK_SECONDS)
            if (version := _version(self._config.file)) != self._seen:
                self._seen = version
                self._read_again()
            self._note()

    def _read_again(self) -> None:
        try:
            self._from_file = _read(self._config.file)
        except ConfigError as exc:
            log.error("the quotas stay as they are: %s", exc)
            return
        self._apply()
        log.info("read file=%s quotas=%d", self._config.file, len(self._from_file))

    def _note(self) -> None:
        if (used := self._quotas.used()) != self._noted:
            with suppress(OSError):  # the disk is full; the next count tells
                self._journal.set_note(USED, json.dumps(used))
                self._noted = used

    # ---- counting ----

    async def _count_now_and_then(self) -> None:
        await self._some.wait()
        while True:
            now = trio.current_time()
            if self._quotas and (now >= self._next or (self._quotas.outdated and now >= self._earliest)):
                with surviving("quota count") as outcome:
                    await self._count()
                if outcome.failure is not None:
                    self._put_off()
            await trio.sleep(LOOK_SECONDS)

    async def _count(self) -> None:
        started = trio.current_time()
        self._quotas.outdated = False
        try:
            for root in self._quotas.roots():
                await self._count_below(root)
        except PhfsError as exc:
            self._put_off()
            log.log(logging.DEBUG if self._failed else logging.WARNING, "quotas cannot be counted now: %s", exc)
            self._failed = True
            return
        self._failed = False
        now = trio.current_time()
        self._earliest = now + max(PAUSE_SECONDS, PAUSE_FACTOR * (now - started))
        self._next = max(self._earliest, now + self._config.recount_seconds)
        log.debug("counted quotas=%d seconds=%.1f", len(self._paths), now - started)

    def _put_off(self) -> None:
        """What could not be counted is counted a little later."""
        self._quotas.outdated = True
        self._earliest = trio.current_time() + RETRY_SECONDS

    async def _count_below(self, root: str) -> None:
        count = self._quotas.begin(root, self._known_sizes())
        try:
            token: str | None = None
            while True:
                page = await self._store.list(root, delimiter=False, token=token)
                count.listed((str(found.key), found.size) for found in page.objects)
                if (token := page.next_token) is None:
                    break
        except BaseException:
            self._quotas.give_up()
            raise
        self._quotas.end(count)


def _read(file: Path | None) -> Mapping[str, int]:
    """Raises: ConfigError, naming the file and the line."""
    if file is None:
        return {}
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as exc:
        raise ConfigError("--quota-file", str(file), f"a file that can be read ({exc})") from exc
    found: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        try:
            found |= values.quotas(line)
        except ValueError as exc:
            raise ConfigError(f"{file}:{number}", line, str(exc)) from exc
    return found


def _version(file: Path | None) -> object:
    if file is None:
        return None
    try:
        found = file.stat()
    except OSError as exc:
        return exc.errno
    return found.st_mtime_ns, found.st_size, found.st_ino, found.st_dev


def _mapping(text: str | None) -> dict[str, int | None]:
    """What was noted in the journal."""
    with suppress(ValueError, TypeError):
        found = json_text.parse(text or "{}")
        return {str(name): None if size is None else int(size) for name, size in found.items()}
    return {}

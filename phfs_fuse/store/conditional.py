"""What a write to the store rests on: versions that were looked at, conditions that the store keeps, and tries that
meet themselves. Owns what was learned of the conditions.

A lost answer is made good: a conditional write whose first try reached the store meets itself at the second.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Final, TypeVar

import trio

from phfs_fuse.config.model import StoreConfig
from phfs_fuse.errors import (
    AccessDenied,
    BadAnswer,
    CredentialsRefused,
    IllegalName,
    InvalidArgument,
    NotADirectory,
    NotFound,
    PhfsError,
    VersionChanged,
)
from phfs_fuse.store.base import NOT_THERE, Expect, Listing, ObjectInfo
from phfs_fuse.store.bodies import Receiver
from phfs_fuse.store.boto import BotoTransport
from phfs_fuse.store.conditions import ALL_KEPT, NONE_KEPT, Conditions, probe_conditions
from phfs_fuse.store.error_codes import NO_SUCH_KEY, OutOfRange, check_key
from phfs_fuse.store.limits import Segment
from phfs_fuse.store.paging import next_page, place_in_walk
from phfs_fuse.store.retry import retrying
from phfs_fuse.store.trials import TrialObjects
from phfs_fuse.tasks import gather
from phfs_fuse.types import ETag, ObjectKey

log = logging.getLogger(__name__)

T = TypeVar("T")

LISTED_MIN: Final = 8  # versions learned by a page of a listing, which else costs more than it saves


class ConditionalWrites:
    """For the writes of one store."""

    def __init__(self, config: StoreConfig, calls: BotoTransport, trials: TrialObjects) -> None:
        self._config, self._calls, self._trials = config, calls, trials
        self._conditions: Conditions | None = None
        self._probe_lock = trio.Lock()

    async def retrying(self, attempt: Callable[[int], Awaitable[T]], *, attempts_max: int | None = None) -> T:
        tries = attempts_max or self._config.attempts_max
        return await self._calls.access.renewing(lambda: retrying(tries, attempt))

    async def conditional(
        self,
        op: str,
        key: ObjectKey,
        write: Callable[[], Awaitable[ObjectInfo]],
        is_ours: Callable[[ObjectInfo], Awaitable[bool]],
        *,
        at_once: bool = False,
    ) -> ObjectInfo:
        """`write`, repeated; when a repetition loses, look whether it lost against its own first try.

        `at_once`: look at the first try already, which may follow a try of a process that died.
        """

        async def attempt(attempt_no: int) -> ObjectInfo:
            try:
                return await write()
            except (VersionChanged, NotFound) as exc:
                if at_once or attempt_no:
                    found = await self._found(key)
                    if found and await is_ours(found):
                        return found
                if isinstance(exc, VersionChanged) or exc.reason != NO_SUCH_KEY:
                    raise
                raise VersionChanged(op, key, "the object is gone") from exc

        return await self.retrying(attempt)

    async def head(self, key: ObjectKey) -> ObjectInfo:
        """One try of a HEAD. Where it is refused, its answer has no body that says why (rights, credentials, a clock,
        a name that the store does not take): a GET of the first byte, which needs the same right, does. Where that is
        answered, the reason may have passed."""
        try:
            return await self._calls.head(key)
        except (CredentialsRefused, InvalidArgument):
            with suppress(BadAnswer, OutOfRange):
                await self._calls.get(Receiver(key, 0, 1, None, lambda _offset, _data: None))
        return await self._calls.head(key)

    async def _found(self, key: ObjectKey) -> ObjectInfo | None:
        try:
            return await self.head(key)
        except NOT_THERE:
            return None

    async def etag_now(self, key: ObjectKey) -> ETag | None:
        try:
            found = await self._found(key)
        except InvalidArgument:  # about an object that needs a key of its owner (SSE-C): a listing tells its version
            page, _ = await self._calls.list_page(key, 1, {}, metadata=False)
            found = next((info for info in page.objects if info.key == key), None)
            if found is None:
                raise
        return found.etag if found else None

    async def confirm(self, op: str, key: ObjectKey, expect: Expect | None) -> None:
        """Raises: VersionChanged if `expect` does not hold now."""
        if expect is not None and (found := await self.etag_now(key)) != expect.etag:
            if found is None:
                await self.require_bucket(key)
            raise VersionChanged(op, key, f"the store has version {found}, not {expect.etag}")

    async def require_bucket(self, key: ObjectKey) -> None:
        """Raises: BucketNotFound. A HEAD has no body to say which of the two is missing."""
        with suppress(AccessDenied):
            await self._calls.list_page(key, 1, {}, metadata=False)

    async def kept(self) -> Conditions:
        """Which conditions the store keeps; tried out before the first write that has one."""
        if self._conditions is None:
            async with self._probe_lock:
                if self._conditions is None:
                    self._conditions = await self._probe_conditions()
                    log.info("the store keeps conditional writes: %s", self._conditions)
        return self._conditions

    async def _probe_conditions(self) -> Conditions:
        if (await self._calls.clients()).is_aws:
            return ALL_KEPT
        try:
            return await self.retrying(lambda _: self._probe_once())
        except AccessDenied as exc:  # the policy may allow some keys only
            log.info("conditions are kept by HEAD: %s", exc)
            return NONE_KEPT

    async def _probe_once(self) -> Conditions:
        key = ObjectKey(self._config.prefix + self._trials.name)
        await self._trials.clear(key)
        async with self._trials.trying(key):
            return await probe_conditions(_ProbeObject(self._calls, key))

    async def require_listed(self) -> None:
        """Raises: NotADirectory if the prefix lies below an object, and the store lists nothing there."""
        names = self._config.prefix.split("/")[:-1]
        above = [ObjectKey("/".join(names[:count])) for count in range(1, len(names) + 1)]
        found = await gather([partial(self._may_be_there, key) for key in above])
        if any(found) and not await self._lists_below():
            key = max((key for key, is_there in zip(above, found, strict=True) if is_there), key=len)
            reason = f"this store lists nothing below the object {key}: remove it, or give it another key"
            raise NotADirectory("mount", self._config.url, reason)

    async def _may_be_there(self, key: ObjectKey) -> bool:
        """Whether there is an object, or nobody may ask for it."""
        try:
            return await self._found(key) is not None
        except PhfsError as exc:
            log.info("what is at %s is not known: %s", key, exc)
            return True

    async def _lists_below(self) -> bool:
        """Tried out; who may store nothing there cannot be misled."""
        key = ObjectKey(self._config.prefix + self._trials.name)
        try:
            async with self._trials.trying(key):
                await self.retrying(lambda _: self._calls.put(key, b"", {}, None))
                page = await self._versions_behind(key[:-1], self._config.prefix, 1)
                return any(info.key == key for info in page.objects)
        except AccessDenied:
            return True
        except (NotADirectory, IllegalName):  # which some say at once
            return False

    async def look(self, keys: Sequence[ObjectKey]) -> Mapping[ObjectKey, ETag]:
        """By listing from the first to the last, as long as that finds enough of them, the rest one by one."""
        for key in keys:
            check_key("look", key)
        rest = sorted(keys, key=str.encode)
        found: dict[ObjectKey, ETag] = {}
        after = rest[0][:-1] if rest else ""
        while len(rest) > LISTED_MIN:
            page = await self._versions_behind(after, _common(rest[0], rest[-1]), len(rest) + LISTED_MIN)
            here = {info.key: info.etag for info in page.objects}
            seen = len(rest)
            if page.next_token is not None and not page.objects:  # all of it unreadable
                break
            if page.next_token is not None:
                after = page.objects[-1].key
                seen = sum(key.encode() <= after.encode() for key in rest)
            found |= {key: here[key] for key in rest[:seen] if key in here}
            rest = rest[seen:]
            if seen < LISTED_MIN:
                break
        single = await gather([partial(self._etag_surely, key) for key in rest])
        return found | {key: etag for key, etag in zip(rest, single, strict=True) if etag is not None}

    async def _etag_surely(self, key: ObjectKey) -> ETag | None:
        """With retries: of many questions one fails soon."""
        return await self.retrying(lambda _: self.etag_now(key))

    async def _versions_behind(self, after: str, prefix: str, count: int) -> Listing:
        async def ask(token: str | None) -> Listing:
            options = place_in_walk(token, after)
            page, _ = await self.retrying(
                lambda _: self._calls.list_page(prefix, min(count, 1000), options, metadata=False)
            )
            return page

        return await next_page(prefix, None, ask)


def _common(one: str, other: str) -> str:
    """What both begin with."""
    length = next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(one))
    return one[:length]


class ProbeName:
    """Names that nobody uses; see `NameTrial`. AWS takes each that is short enough for a key."""

    def __init__(
        self, guard: ConditionalWrites, config: StoreConfig, calls: BotoTransport, trials: TrialObjects
    ) -> None:
        self._guard, self._calls, self._trials, self._folder = guard, calls, trials, config.prefix

    def key(self, segment: Segment) -> ObjectKey:
        return ObjectKey(self._folder + self._trials.name.ljust(segment.length, "-") + "/" * segment.is_marker)

    async def look(self, key: ObjectKey) -> object:
        return None if (await self._calls.clients()).is_aws else await self._guard.head(key)

    async def store(self, key: ObjectKey) -> None:
        if not (await self._calls.clients()).is_aws:
            async with self._trials.trying(key):
                await self._calls.put(key, b"", {}, None)


class _ProbeObject:
    def __init__(self, calls: BotoTransport, key: ObjectKey) -> None:
        self._calls, self._key = calls, key

    async def put(self, expect: Expect | None) -> object:
        return await self._calls.put(self._key, b"", {}, expect)

    async def copy(self, source_etag: ETag) -> object:
        return await self._calls.copy(self._key, source_etag, self._key, 0, {})

    async def delete(self, etag: ETag) -> None:
        await self._calls.delete(self._key, Expect(etag))

    async def delete_many(self, etag: ETag) -> None:
        failed = await self._calls.delete_many({self._key: etag})
        for exc in failed.values():
            raise exc

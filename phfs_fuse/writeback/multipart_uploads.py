"""The multipart uploads of a mount: each is noted before it begins, and ends completed or aborted.

Owns what is known of them. An *intent* is a request to begin one that has no answer: the store may have an upload
whose id nobody knows. It is looked for among the uploads of its key, to which other clients upload too. Taken for
ours, and aborted, is what the same identity began within the intent's time and nobody has added a part to for an
hour. What else is there is kept and shown. All of it is in the journal: an abort that fails is tried again, also by
the next process.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Final

import trio
from cachetools import LRUCache

from phfs_fuse import metrics
from phfs_fuse.errors import NotFound, PhfsError, StoreUnavailable
from phfs_fuse.state.journal import Journal
from phfs_fuse.state.schema import Intent
from phfs_fuse.store.base import ObjectStore, Properties, Upload
from phfs_fuse.store.retry import retrying
from phfs_fuse.tasks import gather
from phfs_fuse.types import ObjectKey

log = logging.getLogger(__name__)

SECOND_NS: Final = 1_000_000_000
BEGIN_TRIES: Final = 3
BEGIN_NS: Final = 300 * SECOND_NS  # after an intent, until when the store may begin its upload
CLOCK_NS: Final = 15 * SECOND_NS  # by which the store's clock may be off: its servers differ, and we hear it late
IDLE_NS: Final = 3600 * SECOND_NS  # without a new part: nobody goes on with it
ABORT_SECONDS: Final = 10.0  # for a first try, which holds up the upload, and for the last ones of a mount
INTENTS_MAX: Final = 100  # of one key
SHOWN_MAX: Final = 100
OURS_MAX: Final = 1000  # ids that are remembered when they are done: a listing that was asked for before shows them
REFUSED_SECONDS: Final = 300.0  # until the try after one that the store has refused


@dataclass(slots=True)
class _Task:
    """An abort, or a search of a key."""

    key: ObjectKey
    due: float = -math.inf
    tries: int = 0
    is_refused: bool = False  # the store answered the last try: another one hardly helps


@dataclass(frozen=True, slots=True)
class Left:
    """What is not ended: uploads to abort, intents without an answer, and uploads that may belong to one."""

    aborts: int
    intents: int
    kept: Sequence[Upload]


class MultipartUploads:
    def __init__(self, store: ObjectStore, journal: Journal, backoff: Callable[[int], float]) -> None:
        """`backoff`: seconds until the try after so many failed ones."""
        self._store = store
        self._journal = journal
        self._backoff = backoff
        self._under_way: dict[str, ObjectKey] = {}
        self._aborts = {upload_id: _Task(key) for upload_id, key in journal.uploads()}  # of the process before
        self._intents = {intent.id: intent for intent in journal.intents()}
        self._searches = {intent.key: _Task(intent.key) for intent in self._intents.values()}
        self._ours: LRUCache[str, None] = LRUCache(OURS_MAX)
        self._kept: dict[ObjectKey, Sequence[Upload]] = {}
        self._wake = trio.Event()

    def left(self) -> Left:
        kept = [upload for uploads in self._kept.values() for upload in uploads]
        return Left(len(self._aborts), len(self._intents), kept[:SHOWN_MAX])

    @asynccontextmanager
    async def begun(
        self, key: ObjectKey, metadata: Mapping[str, str], properties: Properties | None = None
    ) -> AsyncIterator[str]:
        """The id of a new upload, which the block completes; it is aborted if the block fails.
        Raises: PhfsError, OSError of the journal."""
        if key in self._searches:  # a store that is away is found out without one more intent
            try:
                await self._look(key)
            except StoreUnavailable:
                raise
            except PhfsError as exc:
                log.info("multipart uploads of key=%s cannot be looked for: %s", key, exc)
        upload_id = await retrying(BEGIN_TRIES, lambda _: self._begin(key, metadata, properties))
        try:
            yield upload_id
        except BaseException:
            await self._end(upload_id)
            raise
        self._forget(upload_id)

    async def _begin(self, key: ObjectKey, metadata: Mapping[str, str], properties: Properties | None = None) -> str:
        at_ns = await self._store.time_ns()
        intent = Intent(self._journal.put_intent(key, at_ns), key, at_ns)
        try:
            upload_id = await self._store.create_multipart(key, metadata, properties)
        except BaseException as exc:
            if isinstance(exc, PhfsError) and not isinstance(exc, StoreUnavailable):  # it was refused
                self._answered(intent)
            else:
                self._unanswered(intent)
            raise
        self._under_way[upload_id] = key
        self._ours[upload_id] = None
        try:
            with self._journal.batch():
                self._journal.put_upload(upload_id, key)
                self._journal.drop_intent(intent.id)
        except OSError:  # the next mount finds the intent
            await self._end(upload_id)
            raise
        return upload_id

    async def _end(self, upload_id: str) -> None:
        """The upload is of no use any more."""
        self._aborts[upload_id] = _Task(self._under_way.pop(upload_id))
        with trio.CancelScope(shield=True), trio.move_on_after(ABORT_SECONDS):
            await self._abort(upload_id)
        self._wake.set()

    def _forget(self, upload_id: str) -> None:
        """The store has no such upload any more. A row that stays (the disk is full) ends with the next mount."""
        self._under_way.pop(upload_id, None)
        with suppress(OSError):
            self._journal.drop_upload(upload_id)

    def _answered(self, intent: Intent) -> None:
        self._intents.pop(intent.id, None)
        with suppress(OSError):
            self._journal.drop_intent(intent.id)

    def _unanswered(self, intent: Intent) -> None:
        known = self._of(intent.key)
        if len(known) >= INTENTS_MAX:  # the store does not let us look: they would be more at each try
            self._answered(known[0])
        self._intents[intent.id] = intent
        self._searches.setdefault(intent.key, _Task(intent.key, trio.current_time() + self._backoff(1)))
        self._wake.set()

    async def run(self) -> None:
        """Abort what is left, forever."""
        while True:
            self._wake = trio.Event()
            now = trio.current_time()
            await gather([partial(self._abort, one) for one, task in [*self._aborts.items()] if task.due <= now])
            await gather(
                [partial(self._search_again, task) for task in [*self._searches.values()] if task.due <= now]
            )
            tasks = [*self._aborts.values(), *self._searches.values()]
            with trio.move_on_at(min((task.due for task in tasks), default=math.inf)):
                await self._wake.wait()

    async def finish(self) -> bool:
        """Try each abort once more; what fails is left for the next mount. Returns whether none is left that the
        store would take later."""
        with trio.move_on_after(ABORT_SECONDS):
            await gather([partial(self._abort, upload_id) for upload_id in [*self._aborts]])
        if self._aborts or self._intents:
            log.warning(
                "multipart uploads are left for the next mount of this state: %d to abort, %d to look for",
                len(self._aborts),
                len(self._intents),
            )
        return all(task.is_refused for task in self._aborts.values())

    # -- aborting

    async def _abort(self, upload_id: str) -> None:
        if (task := self._aborts.get(upload_id)) is None:
            return
        task.due, task.is_refused = math.inf, False  # one try at a time
        try:
            await self._store.abort_multipart(task.key, upload_id)
            is_gone = await self._is_gone(task.key, upload_id)
        except PhfsError as exc:
            log.warning("multipart upload of key=%s is not aborted, will be tried again: %s", task.key, exc)
            is_gone, task.is_refused = False, not isinstance(exc, StoreUnavailable)
        finally:
            task.tries += 1
            task.due = trio.current_time() + self._pause(task)
        if is_gone and self._aborts.pop(upload_id, None) is not None:
            self._ours[upload_id] = None
            metrics.LEFT_UPLOADS.add(1, "aborted")
            self._forget(upload_id)

    async def _is_gone(self, key: ObjectKey, upload_id: str) -> bool:
        """A part that was under way may be stored after the abort; it needs another one. Source: S3 API reference,
        AbortMultipartUpload."""
        try:
            await self._store.last_part_ns(key, upload_id)
        except NotFound:
            return True
        except StoreUnavailable:
            raise
        except PhfsError:  # who may not look takes the abort for done
            return True
        return False

    # -- looking for uploads without an id

    async def _search_again(self, task: _Task) -> None:
        task.due, task.is_refused = math.inf, False
        wait = 0.0
        try:
            if self._of(task.key):
                wait = await self._look(task.key)
        except PhfsError as exc:
            log.warning("multipart uploads of key=%s cannot be looked for, will be tried again: %s", task.key, exc)
            task.is_refused = not isinstance(exc, StoreUnavailable)
            wait = self._pause(task)
        except OSError as exc:
            log.error("journal cannot be written, check the disk of the state directory: %s", exc)
            wait = self._pause(task)
        task.tries += 1
        task.due = trio.current_time() + wait
        if self._searches.get(task.key) is task and not self._of(task.key):
            del self._searches[task.key]

    def _pause(self, task: _Task) -> float:
        return REFUSED_SECONDS if task.is_refused else self._backoff(task.tries)

    def _of(self, key: ObjectKey) -> list[Intent]:
        return [intent for intent in self._intents.values() if intent.key == key]

    async def _look(self, key: ObjectKey) -> float:
        """Have what is provably ours aborted, and end the intents that have nothing left. Returns the seconds until
        it is worth to look again. Raises: PhfsError, OSError of the journal."""
        asked = self._of(key)
        listed = await self._store.uploads_of(key)
        now_ns = await self._store.time_ns()
        found = [one for one in self._unknown(listed) if any(_covers(intent, one) for intent in asked)]
        touched = await gather([partial(self._touched_ns, one) for one in found])
        idle_ns = {one: at_ns + IDLE_NS for one, at_ns in zip(found, touched, strict=True)}
        idle = [one for one in found if idle_ns[one] <= now_ns]
        is_ours = await self._is_ours(key, idle)
        asked = self._of(key)  # another look may have ended some
        ours = _matched(self._unknown(idle), asked) if is_ours else {}
        for upload, intent in ours.items():
            self._take(upload, intent)
        kept = [one for one in self._unknown(found) if one not in ours]
        self._keep(key, kept)
        for intent in self._of(key):
            if now_ns > _end_ns(intent) and not any(_covers(intent, one) for one in kept):
                self._answered(intent)
        next_ns = [idle_ns[one] for one in kept] or [_end_ns(intent) for intent in self._of(key)]
        wait_ns = min((at_ns - now_ns for at_ns in next_ns if at_ns > now_ns), default=IDLE_NS)
        return wait_ns / SECOND_NS + 1

    def _unknown(self, uploads: Sequence[Upload]) -> list[Upload]:
        """Those whose id nobody here has ever had."""
        ours = (self._ours, self._under_way, self._aborts)
        return [one for one in uploads if not any(one.upload_id in ids for ids in ours)]

    async def _touched_ns(self, upload: Upload) -> int:
        """When somebody was last seen at it. One that is gone meanwhile is found gone by the next look."""
        try:
            return max(upload.started_ns, await self._store.last_part_ns(upload.key, upload.upload_id) or 0)
        except NotFound:
            return upload.started_ns

    async def _is_ours(self, key: ObjectKey, uploads: Sequence[Upload]) -> bool:
        """Whether the identity that began them is ours; learned from an upload of our own. A store that names none
        has its clock to go by alone."""
        if not any(upload.initiator for upload in uploads):
            return bool(uploads)
        upload_id = await self._begin(key, {})
        try:
            listed = await self._store.uploads_of(key)
        finally:
            await self._end(upload_id)
        ours = {upload.initiator for upload in listed if upload.upload_id == upload_id}
        return {upload.initiator for upload in uploads} == ours

    def _take(self, upload: Upload, intent: Intent) -> None:
        """`upload` is what `intent` has begun."""
        log.info("multipart upload of key=%s was begun by a request of ours that got no answer", upload.key)
        with self._journal.batch():
            self._journal.put_upload(upload.upload_id, upload.key)
            self._journal.drop_intent(intent.id)
        del self._intents[intent.id]
        self._aborts[upload.upload_id] = _Task(upload.key)
        self._ours[upload.upload_id] = None
        self._wake.set()

    def _keep(self, key: ObjectKey, uploads: Sequence[Upload]) -> None:
        known = {upload.upload_id for upload in self._kept.pop(key, ())}
        if uploads:
            self._kept[key] = uploads
        for upload in uploads:
            if upload.upload_id not in known:
                metrics.LEFT_UPLOADS.add(1, "kept")
                log.warning(
                    "multipart upload of key=%s begun at %s is ours or another client's and is kept; it is aborted "
                    "once it must be ours, an hour after its last part at the soonest",
                    key,
                    time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(upload.started_ns // SECOND_NS)),
                )


def _end_ns(intent: Intent) -> int:
    """From then on, by the store's clock, its upload has begun or never does."""
    return intent.at_ns + BEGIN_NS + CLOCK_NS


def _covers(intent: Intent, upload: Upload) -> bool:
    """Whether `upload` may be what `intent` asked for, by its time."""
    return intent.at_ns - CLOCK_NS <= upload.started_ns <= _end_ns(intent)


def _matched(uploads: Sequence[Upload], intents: Sequence[Intent]) -> dict[Upload, Intent]:
    """An intent for each upload; none at all if there are not enough: then one is another client's, and nobody knows
    which."""
    free = sorted(intents, key=lambda intent: intent.at_ns)
    found: dict[Upload, Intent] = {}
    for upload in sorted(uploads, key=lambda upload: upload.started_ns):
        if (intent := next((one for one in free if _covers(one, upload)), None)) is None:
            return {}
        free.remove(intent)
        found[upload] = intent
    return found

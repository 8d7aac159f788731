"""The object store over S3: checks, retries, conditions. Owns whether the store lists metadata; the single tries are
those of `store.boto`, what a write rests on is `store.conditional`'s.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from math import inf
from pathlib import Path
from typing import Any, Final, TypeVar

import trio

from phfs_fuse import metrics
from phfs_fuse.config.model import StoreConfig
from phfs_fuse.errors import (
    AccessDenied,
    BadAnswer,
    BucketNotFound,
    NotFound,
    NotSupported,
    PhfsError,
    StoreUnavailable,
    VersionChanged,
)
from phfs_fuse.store.base import (
    LOOK_SECONDS,
    NAME_REFUSED,
    NOT_THERE,
    Body,
    Expect,
    Limits,
    Listener,
    Listing,
    ObjectInfo,
    Part,
    Properties,
    Sink,
    Upload,
)
from phfs_fuse.store.bodies import Receiver, body_length, holds, multipart_etag
from phfs_fuse.store.boto import XML_ILLEGAL, BotoTransport
from phfs_fuse.store.conditional import ConditionalWrites, ProbeName
from phfs_fuse.store.conditions import NONE_KEPT
from phfs_fuse.store.diagnosis import diagnose
from phfs_fuse.store.error_codes import NO_SUCH_UPLOAD, check_key, check_metadata, check_text
from phfs_fuse.store.headers import TAG_COUNT, placed
from phfs_fuse.store.limits import AWS, USUAL, NameLimits
from phfs_fuse.store.notifications import EventStream
from phfs_fuse.store.paging import next_page, place_in_walk
from phfs_fuse.store.trials import TrialObjects
from phfs_fuse.tasks import gather
from phfs_fuse.types import ETag, ObjectKey

log = logging.getLogger(__name__)

T = TypeVar("T")

DIAGNOSIS_AFTER_SECONDS: Final = 1.0
DIAGNOSIS_SECONDS: Final = 5.0
CHECK_ATTEMPTS: Final = 2  # a wrong endpoint must show soon


class S3Store:
    """See `ObjectStore`. Opened by the first call, which should be `check_bucket`."""

    def __init__(
        self, config: StoreConfig, calls: BotoTransport | None = None, owner: str = "", notes: Path | None = None
    ) -> None:
        self._config = config
        self._calls = calls or BotoTransport(config)
        self._trials = TrialObjects(config, self._calls, owner, notes)
        self._guard = ConditionalWrites(config, self._calls, self._trials)
        self._names = NameLimits(ProbeName(self._guard, config, self._calls, self._trials))
        self._lists_metadata: bool | None = False  # None: to be seen at the first page that has an object
        self._hides_below = self._lists_ghosts = False
        self._places = False  # some object here has a storage class or an encryption of its own

    @property
    def limits(self) -> Limits:
        return AWS if self._calls.access.is_aws else USUAL

    async def require_key(self, key: ObjectKey) -> None:
        check_key("name", key)
        await self._names.require(key)

    def tell_new_credentials(self, call: Callable[[], None]) -> None:
        self._calls.access.on_replaced = call

    @property
    def lists_metadata(self) -> bool:
        return bool(self._lists_metadata)

    @property
    def hides_below(self) -> bool:
        return self._hides_below

    @property
    def lists_ghosts(self) -> bool:
        return self._lists_ghosts

    async def aclose(self) -> None:
        await self._calls.aclose()

    # -- the bucket

    async def check_bucket(self, *, create: bool = False) -> None:
        try:
            await self._checked(self._probe_listing)
        except BucketNotFound:
            if not create:
                raise
            await self._calls.create_bucket()
            await self._probe_listing()
        if not (await self._calls.clients()).is_aws:
            await self._probe_versions()
            await self._guard.require_listed()

    async def _checked(self, call: Callable[[], Awaitable[None]]) -> None:
        """`call`, the first request, which ends as soon as it is known why there is no connection: a client may go on
        trying for long, as awscrt does with a certificate that it does not trust."""
        ended = trio.Event()

        async def watch() -> None:
            with trio.move_on_after(DIAGNOSIS_AFTER_SECONDS):
                await ended.wait()
            if not ended.is_set() and (reason := await self._diagnosis()):
                raise StoreUnavailable("connect", self._config.url, reason)

        async def run() -> None:
            try:
                await call()
            except StoreUnavailable as exc:
                if not (reason := await self._diagnosis()):
                    raise
                raise StoreUnavailable("connect", self._config.url, reason) from exc
            finally:
                ended.set()

        await gather([run, watch])

    async def _diagnosis(self) -> str:
        """The reason why there is no connection; "" if there is one, or if that cannot be told in time."""
        clients = await self._calls.clients()
        if clients.proxies:
            return ""
        with trio.move_on_after(DIAGNOSIS_SECONDS):
            return await trio.to_thread.run_sync(
                diagnose, clients.endpoint_url, clients.authorities, abandon_on_cancel=True
            )
        return ""

    async def _probe_listing(self) -> None:
        """List one key, which proves access; where the store is not AWS, once more with its metadata."""
        prefix = self._config.prefix
        await self._guard.retrying(
            lambda _: self._calls.list_page(prefix, 1, {}, metadata=False), attempts_max=CHECK_ATTEMPTS
        )
        if (await self._calls.clients()).is_aws:
            return
        try:
            page, server = await self._calls.list_page(prefix, 1, {}, metadata=True)
        except PhfsError as exc:
            log.info("listings come without metadata: %s", exc)
            return
        self._lists_metadata = _has_metadata(page)
        self._hides_below = server.startswith("MinIO")
        if self._hides_below and not page.objects:
            self._lists_metadata = True

    async def _probe_versions(self) -> None:
        try:
            self._lists_ghosts = await self._calls.keeps_versions()
        except AccessDenied:  # not known: it costs a listing a folder in place of a HEAD
            self._lists_ghosts = True
        except PhfsError as exc:
            log.info("the bucket keeps no versions: %s", exc)

    # -- reading

    async def prepare(self) -> None:
        await self._guard.kept()

    async def tidy(self) -> None:
        await self._trials.tidy()

    async def head(self, key: ObjectKey, *, surely: bool = False) -> ObjectInfo:
        check_key("head", key)
        try:
            found = await self._guard.retrying(lambda _: self._guard.head(key))
        except NAME_REFUSED as exc:
            raise NotFound("head", key, exc.reason) from exc
        except NotFound:
            if surely:
                await self._guard.retrying(lambda _: self._guard.require_bucket(key))
            raise
        self._places = self._places or bool(placed(found.headers))
        return found

    async def properties(self, key: ObjectKey, etag: ETag | None) -> Properties:
        try:
            found = await self.head(key, surely=True)
        except NotFound as exc:
            raise VersionChanged("head", key, "the object is gone") from exc
        if etag is not None and found.etag != etag:
            raise VersionChanged("head", key, f"the store has version {found.etag}")
        has_tags = found.headers.get(TAG_COUNT, "0") != "0"
        tags = await self._guard.retrying(lambda _: self._calls.tags(key)) if has_tags else ""
        return Properties(
            headers=found.headers, metadata=found.metadata or {}, tags=tags, etag=found.etag, size=found.size
        )

    async def get(self, key: ObjectKey, start: int, end: int, *, etag: ETag | None, sink: Sink) -> None:
        check_key("get", key)
        if start >= end:
            return
        metrics.STORE_RECEIVED.add(end - start, "get")
        receiver = Receiver(key, start, end, etag, sink)
        try:
            await self._guard.retrying(lambda _: self._calls.get(receiver))
        except NotFound as exc:
            if receiver.etag is None:
                raise
            raise VersionChanged("get", key, "the object is gone") from exc
        finally:
            receiver.close()

    async def list(
        self,
        prefix: str,
        *,
        delimiter: bool,
        token: str | None = None,
        start_after: str = "",
        count_max: int = 1000,
    ) -> Listing:
        check_text("list", prefix + start_after)
        rolled_up: dict[str, Any] = {"Delimiter": "/"} if delimiter else {}

        async def ask(token: str | None) -> Listing:
            options = rolled_up | place_in_walk(token, start_after)
            return await self._guard.retrying(lambda _: self._list_page(prefix, count_max, options))

        try:
            return await next_page(prefix, token, ask)
        except NAME_REFUSED:
            return Listing(objects=(), prefixes=(), next_token=None)

    async def _list_page(self, prefix: str, count_max: int, options: Mapping[str, Any]) -> Listing:
        page = await self._list_page_either_way(prefix, count_max, options)
        self._places = self._places or any(info.headers for info in page.objects)
        return page

    async def _list_page_either_way(self, prefix: str, count_max: int, options: Mapping[str, Any]) -> Listing:
        if self._lists_metadata is not False:
            try:
                page, _ = await self._calls.list_page(prefix, count_max, options, metadata=True)
                if self._lists_metadata is None:
                    self._lists_metadata = _has_metadata(page)
                return page
            except (AccessDenied, BadAnswer) as exc:  # bad: a name in the metadata that XML cannot carry
                log.info("listing again without metadata: %s", exc)
        return (await self._calls.list_page(prefix, count_max, options, metadata=False))[0]

    # -- whole objects

    async def put(
        self,
        key: ObjectKey,
        body: Body,
        metadata: Mapping[str, str],
        *,
        expect: Expect | None,
        properties: Properties | None = None,
    ) -> ObjectInfo:
        check_key("put", key)
        check_metadata("put", key, metadata, properties)
        conditions = await self._guard.kept() if expect else NONE_KEPT

        async def write() -> ObjectInfo:
            if conditions.needs_head(expect):
                await self._guard.confirm("put", key, expect)
            metrics.STORE_SENT.add(body_length(body), "put")
            return await self._calls.put(key, body, metadata, conditions.sends(expect), properties)

        async def is_ours(found: ObjectInfo) -> bool:
            return await trio.to_thread.run_sync(holds, found, body, metadata)

        return await self._guard.conditional("put", key, write, is_ours)

    async def copy(
        self,
        source: ObjectKey,
        source_etag: ETag,
        key: ObjectKey,
        size: int,
        metadata: Mapping[str, str] | None,
        *,
        expect: Expect | None,
        seen_at: float = -inf,
        properties: Properties | None = None,
    ) -> ObjectInfo:
        check_key("copy", source)
        check_key("copy", key)
        check_metadata("copy", key, metadata or {}, properties)
        conditions = await self._guard.kept()
        if metadata is None and self._places:
            properties = await self.properties(source, source_etag)

        async def write() -> ObjectInfo:
            nonlocal seen_at
            if trio.current_time() > seen_at + LOOK_SECONDS:
                await self._guard.confirm("copy", key, expect)
            seen_at = -inf  # a repetition looks again
            if not conditions.copy_source:
                await self._guard.confirm("copy", source, Expect(source_etag))
            condition = conditions.sends_source(source_etag)
            return await self._calls.copy(source, condition, key, size, metadata, properties)

        async def is_ours(found: ObjectInfo) -> bool:
            if metadata is None:
                return found.etag == source_etag
            return found.size == size and found.metadata == dict(metadata)

        return await self._guard.conditional("copy", key, write, is_ours)

    async def delete(self, key: ObjectKey, *, expect: Expect | None = None) -> None:
        check_key("delete", key)
        conditions = await self._guard.kept() if expect else NONE_KEPT

        async def attempt(_: int) -> None:
            if expect is not None and not conditions.delete:
                found = await self._guard.etag_now(key)
                if found is None:
                    return await self._guard.require_bucket(key)
                if found != expect.etag:
                    raise VersionChanged("delete", key, f"the store has version {found}")
            await self._calls.delete(key, expect if conditions.delete else None)

        with suppress(*NOT_THERE):
            await self._guard.retrying(attempt)

    async def delete_many(self, versions: Mapping[ObjectKey, ETag | None]) -> Mapping[ObjectKey, PhfsError]:
        for key in versions:
            check_key("delete", key)
        odd = [key for key in versions if XML_ILLEGAL.search(key)]  # the request is XML
        plain = {key: etag for key, etag in versions.items() if not XML_ILLEGAL.search(key)}
        failed = dict(await self._delete_plain(plain)) if plain else {}
        for key in odd:
            etag = versions[key]
            try:
                await self.delete(key, expect=None if etag is None else Expect(etag))
            except PhfsError as exc:
                failed[key] = exc
        return failed

    async def _delete_plain(self, versions: Mapping[ObjectKey, ETag | None]) -> Mapping[ObjectKey, PhfsError]:
        failed: dict[ObjectKey, PhfsError] = {}
        if any(versions.values()) and not (await self._guard.kept()).delete_many:
            found = await self._guard.look([key for key, etag in versions.items() if etag is not None])
            for key, etag in versions.items():
                if etag is not None and key in found and found[key] != etag:
                    failed[key] = VersionChanged("delete", key, f"the store has version {found[key]}")
            versions = {key: None for key in versions if key not in failed}
        if versions:
            answers = await self._guard.retrying(lambda _: self._calls.delete_many(versions))
            failed |= {key: exc for key, exc in answers.items() if not isinstance(exc, NOT_THERE)}
        return failed

    async def look(self, keys: Sequence[ObjectKey]) -> Mapping[ObjectKey, ETag]:
        return await self._guard.look(keys)

    # -- in parts

    async def create_multipart(
        self, key: ObjectKey, metadata: Mapping[str, str], properties: Properties | None = None
    ) -> str:
        check_key("create multipart", key)
        check_metadata("create multipart", key, metadata, properties)
        create = partial(self._calls.create_multipart, key, metadata, properties)
        return await self._calls.access.renewing(create)  # one try: one that was refused has left nothing

    async def upload_part(self, key: ObjectKey, upload_id: str, part_no: int, body: Body) -> Part:
        metrics.STORE_SENT.add(body_length(body), "upload part")
        return await self._guard.retrying(lambda _: self._calls.upload_part(key, upload_id, part_no, body))

    async def upload_part_copy(
        self,
        key: ObjectKey,
        upload_id: str,
        part_no: int,
        source: ObjectKey,
        source_etag: ETag,
        start: int,
        end: int,
    ) -> Part:
        check_key("copy part", source)
        conditions = await self._guard.kept()

        async def attempt(_: int) -> Part:
            if not conditions.copy_source:
                await self._guard.confirm("copy part", source, Expect(source_etag))
            return await self._calls.upload_part_copy(key, upload_id, part_no, source, source_etag, start, end)

        try:
            return await self._guard.retrying(attempt)
        except NotFound as exc:
            if exc.reason == NO_SUCH_UPLOAD:
                raise
            raise VersionChanged("copy part", source, "the source is gone") from exc

    async def complete_multipart(
        self, key: ObjectKey, upload_id: str, parts: Sequence[Part], *, expect: Expect | None
    ) -> ObjectInfo:
        conditions = await self._guard.kept() if expect else NONE_KEPT
        ordered = sorted(parts, key=lambda part: part.part_no)

        async def write() -> ObjectInfo:
            await self._guard.confirm("complete multipart", key, expect)  # also where put alone keeps conditions
            etag = await self._calls.complete_multipart(key, upload_id, ordered, conditions.sends(expect))
            return await self._completed(key, etag)

        async def is_ours(found: ObjectInfo) -> bool:
            return found.etag == multipart_etag(ordered)

        return await self._guard.conditional("complete multipart", key, write, is_ours, at_once=True)

    async def _completed(self, key: ObjectKey, etag: ETag) -> ObjectInfo:
        """The object just completed: its size and metadata are known to the store alone.

        Raises: VersionChanged if another write came in between, so that the caller keeps its bytes.
        """
        found = await self.head(key)
        if found.etag != etag:
            raise VersionChanged("complete multipart", key, f"replaced at once by version {found.etag}")
        return found

    async def abort_multipart(self, key: ObjectKey, upload_id: str) -> None:
        with suppress(NotFound):
            await self._guard.retrying(lambda _: self._calls.abort_multipart(key, upload_id))

    async def list_multipart(self, prefix: str) -> Sequence[Upload]:
        check_text("list multipart", prefix)
        return await self._guard.retrying(lambda _: self._calls.list_multipart(prefix))

    async def uploads_of(self, key: ObjectKey) -> Sequence[Upload]:
        check_key("list multipart", key)
        return await self._guard.retrying(lambda _: self._calls.list_multipart(key, whole=True))

    async def last_part_ns(self, key: ObjectKey, upload_id: str) -> int | None:
        check_key("list parts", key)
        return await self._guard.retrying(lambda _: self._calls.last_part_ns(key, upload_id))

    async def time_ns(self) -> int:
        if (now := self._calls.clock.now_ns()) is None:
            await self._guard.retrying(lambda _: self._calls.list_page(self._config.prefix, 1, {}, metadata=False))
            now = self._calls.clock.now_ns()
        return time.time_ns() if now is None else now  # a store that tells no time

    # -- changes

    async def listen(self, prefix: str, listener: Listener) -> None:
        if (await self._calls.clients()).is_aws:
            raise NotSupported("listen", prefix, "AWS has no stream of events")

        async def run() -> None:
            await EventStream(await self._calls.clients(), self._config, prefix, listener).run()

        await self._calls.access.renewing(run)


def _has_metadata(page: Listing) -> bool | None:
    """None if the page has no object that could tell."""
    return any(info.metadata is not None for info in page.objects) if page.objects else None

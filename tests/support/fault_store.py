"""An `ObjectStore` that passes calls on to another, and fails, loses, delays or cuts the ones a test names.

Owns the list of faults and the count of calls by method.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import TypeVar

import trio

from phfs_fuse.errors import PhfsError, StoreUnavailable
from phfs_fuse.store.base import (
    Body,
    Expect,
    Limits,
    Listener,
    Listing,
    ObjectInfo,
    ObjectStore,
    Part,
    Properties,
    Sink,
    Upload,
)
from phfs_fuse.types import ETag, ObjectKey

T = TypeVar("T")


@dataclass(slots=True)
class Gate:
    """Holds the calls that reach it until `open` is set; `entered` tells that one did."""

    entered: trio.Event = field(default_factory=trio.Event)
    open: trio.Event = field(default_factory=trio.Event)

    async def wait(self) -> None:
        self.entered.set()
        await self.open.wait()


@dataclass(slots=True)
class Fault:
    method: str
    skip: int  # calls of `method` on matching keys that pass first
    count: int  # calls that it then hits
    when: Callable[[str], bool]
    error: Exception | None = None
    after: bool = False  # the store has done the work, the answer is lost
    gate: Gate | None = None
    seconds: float = 0.0

    def hits(self, method: str, key: str) -> bool:
        if method != self.method or not self.when(key) or self.count <= 0:
            return False
        if self.skip > 0:
            self.skip -= 1
            return False
        self.count -= 1
        return True


def any_key(_: str) -> bool:
    return True


class FaultStore:
    """`calls` counts by method. Each fault counts the calls from the moment when it was ordered."""

    def __init__(self, inner: ObjectStore) -> None:
        self.inner = inner
        self.calls: Counter[str] = Counter()
        self.down = False  # True: every call fails as if the store were away
        self._faults: list[Fault] = []
        self._cuts: list[tuple[int, int]] = []  # (calls of get to skip, bytes to let through)

    def fail(
        self,
        method: str,
        error: Exception | None = None,
        *,
        nth: int = 1,
        count: int = 1,
        when: Callable[[str], bool] = any_key,
        after: bool = False,
    ) -> None:
        """Let the `nth` call of `method` for keys where `when` holds fail, and the `count - 1` that follow.

        With `after` the call has its effect first, as when only the answer is lost.
        """
        error = error or StoreUnavailable(method, "", "made to fail")
        self._faults.append(Fault(method, nth - 1, count, when, error=error, after=after))

    def hold(
        self,
        method: str,
        *,
        nth: int = 1,
        count: int = 1,
        when: Callable[[str], bool] = any_key,
        after: bool = False,
    ) -> Gate:
        """Let calls wait, before they have an effect, until the gate is opened; `after`: only their answers."""
        gate = Gate()
        self._faults.append(Fault(method, nth - 1, count, when, gate=gate, after=after))
        return gate

    def delay(
        self,
        method: str,
        seconds: float,
        *,
        nth: int = 1,
        count: int = 1,
        when: Callable[[str], bool] = any_key,
    ) -> None:
        """Let calls take `seconds` longer, by the clock of trio."""
        self._faults.append(Fault(method, nth - 1, count, when, seconds=seconds))

    def clear(self) -> None:
        """No more faults."""
        self._faults.clear()

    def cut(self, after_bytes: int, *, nth: int = 1) -> None:
        """Let the `nth` get fail once it has passed on `after_bytes`."""
        self._cuts.append((nth - 1, after_bytes))

    async def _through(self, method: str, key: str, call: Callable[[], Awaitable[T]]) -> T:
        self.calls[method] += 1
        if self.down:
            await trio.lowlevel.checkpoint()
            raise StoreUnavailable(method, key, "the store is away")
        hit = [fault for fault in self._faults if fault.hits(method, key)]
        for fault in hit:
            await self._before(fault)
        try:
            result = await call()
        finally:
            for fault in hit:
                if fault.gate and fault.after:
                    await fault.gate.wait()
        for fault in hit:
            if fault.error and fault.after:
                raise fault.error
        return result

    async def _before(self, fault: Fault) -> None:
        if fault.gate and not fault.after:
            await fault.gate.wait()
        if fault.seconds:
            await trio.sleep(fault.seconds)
        if fault.error and not fault.after:
            await trio.lowlevel.checkpoint()
            raise fault.error

    def _next_cut(self) -> int | None:
        hit = next((cut for cut in self._cuts if cut[0] == 0), None)
        self._cuts = [(skip - 1, length) for skip, length in self._cuts if skip > 0]
        return hit[1] if hit else None

    # -- the protocol

    def tell_new_credentials(self, call: Callable[[], None]) -> None:
        self.inner.tell_new_credentials(call)

    @property
    def lists_metadata(self) -> bool:
        return self.inner.lists_metadata

    @property
    def hides_below(self) -> bool:
        return self.inner.hides_below

    @property
    def lists_ghosts(self) -> bool:
        return self.inner.lists_ghosts

    async def check_bucket(self, *, create: bool = False) -> None:
        await self._through("check_bucket", "", lambda: self.inner.check_bucket(create=create))

    async def prepare(self) -> None:
        await self._through("prepare", "", self.inner.prepare)

    @property
    def limits(self) -> Limits:
        return self.inner.limits

    async def require_key(self, key: ObjectKey) -> None:
        await self._through("require_key", key, lambda: self.inner.require_key(key))

    async def tidy(self) -> None:
        await self.inner.tidy()

    async def head(self, key: ObjectKey, *, surely: bool = False) -> ObjectInfo:
        return await self._through("head", key, lambda: self.inner.head(key, surely=surely))

    async def properties(self, key: ObjectKey, etag: ETag | None) -> Properties:
        return await self._through("properties", key, lambda: self.inner.properties(key, etag))

    async def get(self, key: ObjectKey, start: int, end: int, *, etag: ETag | None, sink: Sink) -> None:
        length = self._next_cut()

        async def call() -> None:
            if length is None or start + length >= end:
                await self.inner.get(key, start, end, etag=etag, sink=sink)
                return
            if length:
                await self.inner.get(key, start, start + length, etag=etag, sink=sink)
            raise StoreUnavailable("get", key, f"cut after {length} bytes")

        await self._through("get", key, call)

    async def list(
        self,
        prefix: str,
        *,
        delimiter: bool,
        token: str | None = None,
        start_after: str = "",
        count_max: int = 1000,
    ) -> Listing:
        return await self._through(
            "list",
            prefix,
            lambda: self.inner.list(
                prefix, delimiter=delimiter, token=token, start_after=start_after, count_max=count_max
            ),
        )

    async def put(
        self,
        key: ObjectKey,
        body: Body,
        metadata: Mapping[str, str],
        *,
        expect: Expect | None,
        properties: Properties | None = None,
    ) -> ObjectInfo:
        return await self._through(
            "put", key, lambda: self.inner.put(key, body, metadata, expect=expect, properties=properties)
        )

    async def look(self, keys: Sequence[ObjectKey]) -> Mapping[ObjectKey, ETag]:
        return await self._through("look", keys[0], lambda: self.inner.look(keys))

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
        return await self._through(
            "copy",
            key,
            lambda: self.inner.copy(
                source, source_etag, key, size, metadata, expect=expect, seen_at=seen_at, properties=properties
            ),
        )

    async def delete(self, key: ObjectKey, *, expect: Expect | None = None) -> None:
        await self._through("delete", key, lambda: self.inner.delete(key, expect=expect))

    async def delete_many(self, versions: Mapping[ObjectKey, ETag | None]) -> Mapping[ObjectKey, PhfsError]:
        first = next(iter(versions), "")
        return await self._through("delete_many", first, lambda: self.inner.delete_many(versions))

    async def create_multipart(
        self, key: ObjectKey, metadata: Mapping[str, str], properties: Properties | None = None
    ) -> str:
        return await self._through(
            "create_multipart", key, lambda: self.inner.create_multipart(key, metadata, properties)
        )

    async def upload_part(self, key: ObjectKey, upload_id: str, part_no: int, body: Body) -> Part:
        return await self._through("upload_part", key, lambda: self.inner.upload_part(key, upload_id, part_no, body))

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
        return await self._through(
            "upload_part_copy",
            key,
            lambda: self.inner.upload_part_copy(key, upload_id, part_no, source, source_etag, start, end),
        )

    async def complete_multipart(
        self, key: ObjectKey, upload_id: str, parts: Sequence[Part], *, expect: Expect | None
    ) -> ObjectInfo:
        return await self._through(
            "complete_multipart",
            key,
            lambda: self.inner.complete_multipart(key, upload_id, parts, expect=expect),
        )

    async def abort_multipart(self, key: ObjectKey, upload_id: str) -> None:
        await self._through("abort_multipart", key, lambda: self.inner.abort_multipart(key, upload_id))

    async def list_multipart(self, prefix: str) -> Sequence[Upload]:
        return await self._through("list_multipart", prefix, lambda: self.inner.list_multipart(prefix))

    async def uploads_of(self, key: ObjectKey) -> Sequence[Upload]:
        return await self._through("uploads_of", key, lambda: self.inner.uploads_of(key))

    async def last_part_ns(self, key: ObjectKey, upload_id: str) -> int | None:
        return await self._through("last_part_ns", key, lambda: self.inner.last_part_ns(key, upload_id))

    async def time_ns(self) -> int:
        return await self.inner.time_ns()

    async def listen(self, prefix: str, listener: Listener) -> None:
        await self._through("listen", prefix, lambda: self.inner.listen(prefix, listener))

    async def aclose(self) -> None:
        await self.inner.aclose()

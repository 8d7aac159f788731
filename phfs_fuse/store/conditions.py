"""Which conditions of writes a store really keeps, learned by trying. Owns no state.

Stores differ: AWS keeps If-Match and If-None-Match on PutObject and CompleteMultipartUpload; older ones
ignore them in silence or answer 501; MinIO RELEASE.2025-04-08 to 2025-07-23 keeps If-Match but on an object
that is not there. AWS and Ceph keep conditions of deletions (If-Match, and an ETag per key of DeleteObjects), MinIO
ignores them. What a store does not keep is done by a HEAD just before the write, or a listing before many deletions,
which leaves a gap of one request; that is the best that such a store allows.
"""

from __future__ import annotations

from collections.abc import Awaitable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Protocol

from phfs_fuse.errors import AccessDenied, InvalidArgument, NotFound, NotSupported, VersionChanged
from phfs_fuse.store.base import Expect
from phfs_fuse.types import ETag

NO_SUCH_ETAG: Final = ETag("00000000000000000000000000000000")


class Probe(Protocol):
    """Calls on an object that belongs to nobody; conditions are sent as headers and nothing else is done."""

    async def put(self, expect: Expect | None) -> object: ...

    async def copy(self, source_etag: ETag) -> object:
        """Copy the object onto itself."""

    async def delete(self, etag: ETag) -> None: ...

    async def delete_many(self, etag: ETag) -> None:
        """By the call that takes many keys. Raises also what fails for the object alone."""


@dataclass(frozen=True, slots=True)
class Conditions:
    absent: bool  # If-None-Match: *
    match: bool  # If-Match
    match_absent: bool  # If-Match fails when no object is there
    copy_source: bool  # x-amz-copy-source-if-match
    delete: bool = False  # If-Match of DeleteObject
    delete_many: bool = False  # ETag of a key in DeleteObjects

    def sends(self, expect: Expect | None) -> Expect | None:
        """The part of `expect` that goes as a header."""
        if expect is None:
            return None
        return expect if (self.absent if expect.etag is None else self.match) else None

    def sends_source(self, etag: ETag) -> ETag | None:
        """The version of a copy's source, if it goes as a header."""
        return etag if self.copy_source else None

    def needs_head(self, expect: Expect | None) -> bool:
        """Whether the header alone does not keep `expect`."""
        if expect is None:
            return False
        return not (self.absent if expect.etag is None else self.match and self.match_absent)


ALL_KEPT: Final = Conditions(
    absent=True, match=True, match_absent=True, copy_source=True, delete=True, delete_many=True
)
NONE_KEPT: Final = Conditions(absent=False, match=False, match_absent=False, copy_source=False)


async def probe_conditions(probe: Probe) -> Conditions:
    """Try each condition on a probe object that is not there at first and that the caller removes later."""
    match_absent = await _is_refused(probe.put(Expect(NO_SUCH_ETAG)))
    await probe.put(None)
    absent = await _is_refused(probe.put(Expect(None)))
    match = await _is_refused(probe.put(Expect(NO_SUCH_ETAG)))
    copy_source = await _is_refused(probe.copy(NO_SUCH_ETAG))
    delete = delete_many = False
    with suppress(AccessDenied):  # who may not delete needs no condition for it
        delete = await _is_refused(probe.delete(NO_SUCH_ETAG))
        if not delete:
            await probe.put(None)
        delete_many = await _is_refused(probe.delete_many(NO_SUCH_ETAG))
    return Conditions(absent, match, match_absent, copy_source, delete, delete_many)


async def _is_refused(call: Awaitable[object]) -> bool:
    """Whether the store refuses a condition that does not hold, and for that reason."""
    try:
        await call
    except (VersionChanged, NotFound):
        return True
    except (NotSupported, InvalidArgument):  # the store does not know the header, and says so
        return False
    return False

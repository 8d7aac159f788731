"""Which conditional writes a store really keeps, learned by trying. Owns no state.

Stores differ: AWS keeps If-Match and If-None-Match on PutObject and CompleteMultipartUpload; older ones
ignore them in silence or answer 501; MinIO RELEASE.2025-04-08 to 2025-07-23 keeps If-Match but on an object
that is not there. What a store does not keep is done by a HEAD just before the write, which leaves a gap of
one request; that is the best that such a store allows.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from phfs_fuse.errors import InvalidArgument, NotFound, NotSupported, VersionChanged
from phfs_fuse.store.base import Expect
from phfs_fuse.types import ETag

NO_SUCH_ETAG: Final = ETag("00000000000000000000000000000000")

ConditionalPut = Callable[[Expect | None], Awaitable[object]]
"""Puts the probe object under a condition that is sent as headers."""


@dataclass(frozen=True, slots=True)
class Conditions:
    absent: bool  # If-None-Match: *
    match: bool  # If-Match
    match_absent: bool  # If-Match fails when no object is there

    def sends(self, expect: Expect | None) -> Expect | None:
        """The part of `expect` that goes as a header."""
        if expect is None:
            return None
        return expect if (self.absent if expect.etag is None else self.match) else None

    def needs_head(self, expect: Expect | None) -> bool:
        """Whether the header alone does not keep `expect`."""
        if expect is None:
            return False
        return not (self.absent if expect.etag is None else self.match and self.match_absent)


ALL_KEPT: Final = Conditions(absent=True, match=True, match_absent=True)
NONE_KEPT: Final = Conditions(absent=False, match=False, match_absent=False)


async def probe_conditions(put: ConditionalPut) -> Conditions:
    """Try each condition on a probe object that is not there at first and that the caller removes later."""
    match_absent = await _is_refused(put, Expect(NO_SUCH_ETAG))
    await put(None)
    absent = await _is_refused(put, Expect(None))
    match = await _is_refused(put, Expect(NO_SUCH_ETAG))
    return Conditions(absent=absent, match=match, match_absent=match_absent)


async def _is_refused(put: ConditionalPut, expect: Expect) -> bool:
    """Whether the store refuses `expect`, which does not hold, for the right reason."""
    try:
        await put(expect)
    except (VersionChanged, NotFound):
        return True
    except (NotSupported, InvalidArgument):  # the store does not know the header, and says so
        return False
    return False

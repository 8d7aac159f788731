"""Which bytes to ask for beyond what was read: the sequential streams of one version. Pure; no I/O, no await.

Owns the positions of up to four streams. Whoever reads says so with `note` and gets the requests to make.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from phfs_fuse.extents import Extent
from phfs_fuse.types import MIB

STREAMS_MAX: Final = 4
REQUEST_BYTES_MIN: Final = 4 * MIB  # of a window that is big enough for several requests
REQUEST_BYTES_MAX: Final = 32 * MIB  # each costs boto3 and MinIO some ms: measured, 30 % of the CPU with 8 MiB
WHOLE_BLOCKS: Final = 4  # a file of up to so many blocks is asked for at once when its start is read
REORDER: Final = 4  # requests of one stream may come so many lengths too early or too late


@dataclass(slots=True)
class _Stream:
    next: int  # one past the furthest byte that was read
    ahead: int  # one past the furthest byte that was asked for
    window: int = 0  # bytes to be asked for beyond `next`
    grow_at: int = 0  # the window doubles when `next` gets here


class ReadAhead:
    """The streams of one version of `size` bytes. All answers are whole blocks, clipped to the size."""

    __slots__ = ("_block_bytes", "_request_bytes", "_size", "_streams", "_window_max")

    def __init__(self, size: int, block_bytes: int, window_max: int, requests_max: int) -> None:
        self._size, self._block_bytes = size, block_bytes
        request_bytes = min(max(window_max // requests_max, REQUEST_BYTES_MIN), REQUEST_BYTES_MAX)
        self._request_bytes = max(request_bytes, block_bytes)
        self._window_max = min(window_max, self._request_bytes * requests_max)
        self._streams: list[_Stream] = []  # last used first

    @property
    def windows(self) -> list[Extent]:
        """What the streams are about to read, or have just read and may ask for again."""
        return [(max(0, stream.next - REQUEST_BYTES_MIN), max(stream.ahead, stream.next)) for stream in self._streams]

    def note(self, start: int, end: int) -> list[Extent]:
        """Take note that [start, end) is read; the ranges that should be in the cache or on their way.

        The first one begins with the blocks that were read. Each is meant as one request.
        """
        first, last = self._down(start), self._up(end)
        stream = self._stream_at(start, end - start)
        if stream is None:
            if start == 0 and self._size <= WHOLE_BLOCKS * self._block_bytes:
                last = self._size
            self._streams.insert(0, _Stream(next=end, ahead=last))
            del self._streams[STREAMS_MAX:]
            return [(first, last)]
        if end <= stream.next:  # late, or read again
            return [(first, last)]
        return self._advance(stream, first, last, start, end)

    def _stream_at(self, start: int, length: int) -> _Stream | None:
        slack = REORDER * length
        for at, stream in enumerate(self._streams):
            if -slack <= start - stream.next <= slack:
                if at:
                    self._streams.insert(0, self._streams.pop(at))
                return stream
        return None

    def _advance(self, stream: _Stream, first: int, last: int, start: int, end: int) -> list[Extent]:
        stream.next = end
        if end >= stream.grow_at and stream.window < self._window_max:
            stream.window = min(max(2 * stream.window, 2 * (end - start), self._block_bytes), self._window_max)
            stream.grow_at = end + stream.window // 4
        wanted = [(first, last)]
        if stream.ahead <= last:
            stream.ahead = last
        target = min(end + stream.window, self._size)
        while stream.ahead < target:
            request_end = min(self._up(min(stream.ahead + self._request_bytes, target)), self._size)
            if request_end - stream.ahead < self._request_bytes and not self._worth_it(stream, request_end):
                break
            wanted.append((stream.ahead, request_end))
            stream.ahead = request_end
        return _joined(wanted, self._request_bytes)

    def _worth_it(self, stream: _Stream, request_end: int) -> bool:
        """Whether less than a full request should go out: at the end, or with half of the window used up."""
        return request_end == self._size or stream.ahead - stream.next <= stream.window // 2

    def _down(self, offset: int) -> int:
        return offset - offset % self._block_bytes

    def _up(self, offset: int) -> int:
        return min(self._down(offset + self._block_bytes - 1), self._size)


def _joined(wanted: list[Extent], length_max: int) -> list[Extent]:
    """The same, the first two as one request if they touch and are not too long together."""
    if len(wanted) > 1 and wanted[0][1] == wanted[1][0] and wanted[1][1] - wanted[0][0] <= length_max:
        return [(wanted[0][0], wanted[1][1]), *wanted[2:]]
    return wanted

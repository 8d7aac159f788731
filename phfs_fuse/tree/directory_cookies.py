"""Places in one open directory: the cookies that its readers were given, each for a name. Owns them, in little room.

Cookies rise with the names, in the order of keys, with wide gaps between: a name that comes gets one between those of
its neighbours, one that goes takes none along. So a cookie says what is behind it, whatever has come and gone since.
No I/O, no await. A name that shows nothing any more is dropped when a reader passes it: the place stays where it was.

Names are kept in chunks, of which a few are at hand and the others packed, at 5 to 15 bytes a name. Over
PACKED_BYTES_MAX the chunk that was used longest ago keeps its first name alone: who seeks to a place in it is shown
some names again, and never too few.
"""

from __future__ import annotations

import marshal
import zlib
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Final, NamedTuple

from phfs_fuse.tree.node import Node

START: Final = b""
END: Final = b"\xff"  # behind all keys, which are UTF-8
COOKIE_MAX: Final = (1 << 63) - 1
STEP: Final = 1 << 36  # from one name to the next, where none were before
CHUNK_NAMES: Final = 512
CHUNKS_AT_HAND: Final = 4
PACKED_BYTES_MAX: Final = 16 << 20
_NEAR: Final = 12  # bits: names that come one behind the other take so small a part of the gap


class Told(NamedTuple):
    """A part of a directory as a reader was told it: all that there is behind `before`, to the last of `keys`."""

    before: bytes
    keys: Sequence[bytes]
    cookies: Sequence[int]


def key_of(node: Node) -> bytes:
    """The place of `node` among its siblings: the order of a store's listing. With its name, if that is another."""
    segment = node.segment.encode("utf-8", "surrogatepass")
    key = segment + b"/" if node.is_dir else segment
    return key if segment == node.name else key + b"\0" + node.name


def name_of(key: bytes) -> bytes:
    """The name that was at the place `key`."""
    segment, _, name = key.partition(b"\0")
    return name or segment.removesuffix(b"/")


def segment_of(key: bytes) -> str:
    """The part of the store's key that is listed at the place `key`; a directory's ends in "/"."""
    return key.partition(b"\0")[0].decode("utf-8", "surrogatepass")


class _Chunk:
    """Neighbours in the order of keys. Either the lists or `packed` may be missing."""

    __slots__ = ("cookies", "is_whole", "keys", "packed")

    def __init__(self, keys: list[bytes], cookies: list[int], *, is_whole: bool) -> None:
        self.keys, self.cookies, self.is_whole = keys, cookies, is_whole
        self.packed = b""

    def pack(self) -> None:
        if not self.packed:
            steps = [after - before for before, after in pairwise([0, *self.cookies])]
            self.packed = zlib.compress(marshal.dumps((self.keys, steps)), 1)
        self.keys, self.cookies = [], []

    def unpack(self) -> None:
        if not self.keys:
            self.keys, steps = marshal.loads(zlib.decompress(self.packed))
            self.cookies = list(accumulate(steps))


class DirectoryCookies:
    """`gaps`: how often the folder had lost a name that the store has when its names began to be noted here."""

    def __init__(self, gaps: int) -> None:
        self.gaps = gaps
        self.readers = 0
        self._chunks: list[_Chunk] = []
        self._first_keys: list[bytes] = []
        self._first_cookies: list[int] = []
        self._at_hand: dict[_Chunk, None] = {}  # unpacked, used last at the end
        self._packed: dict[_Chunk, None] = {}  # and only packed, likewise
        self._packed_bytes = 0
        self._through = START  # all names to here have been listed

    # ---- questions ----

    def at(self, cookie: int) -> bytes:
        """The key behind which `cookie` goes on. Of names that share it the first: see `_spread`."""
        at = bisect_left(self._first_cookies, cookie) - 1
        if at < 0:
            return self._first_keys[0] if cookie in self._first_cookies[:1] else START
        chunk = self._unpacked(at)
        index = bisect_left(chunk.cookies, cookie)
        if index < len(chunk.cookies) and chunk.cookies[index] == cookie:
            return chunk.keys[index]
        if index == len(chunk.cookies) and cookie in self._first_cookies[at + 1 : at + 2]:
            return self._first_keys[at + 1]
        return chunk.keys[index - 1]

    def behind(self, key: bytes) -> list[bytes] | None:
        """Some keys that follow `key`, none missing between; [] if there are none. None: they are not known."""
        if key < self._through:
            keys, _, is_whole = self._following(key)
            if not is_whole:
                return None
            if found := [key for key in keys if key <= self._through]:
                return found
        return [] if self._through == END else None

    def _following(self, key: bytes) -> tuple[list[bytes], list[int], bool]:
        """The next names behind `key` and their cookies; and whether none are missing before or between them."""
        is_whole = True
        for at in range(max(0, bisect_right(self._first_keys, key) - 1), len(self._chunks)):
            chunk = self._unpacked(at)
            is_whole = is_whole and chunk.is_whole
            if (index := bisect_right(chunk.keys, key)) < len(chunk.keys):
                return chunk.keys[index:], chunk.cookies[index:], is_whole
        return [], [], is_whole

    def told(self) -> Iterator[Told]:
        """All of them, as they would be told to a reader. May be changed meanwhile."""
        before = START
        while (following := self._following(before))[0]:
            keys, cookies, is_whole = following
            is_known = is_whole and keys[-1] <= self._through
            yield Told(before if is_known else END, keys, cookies)
            before = keys[-1]

    # ---- changes ----

    def place(self, before: bytes, keys: list[bytes], is_there: Callable[[bytes], bool]) -> list[int]:
        """Cookies of `keys`, which were found to follow `before`: others between are dropped, unless `is_there`."""
        low = max(0, bisect_right(self._first_keys, before) - 1)
        high = max(low, bisect_right(self._first_keys, keys[-1]) - 1)
        chunks = self._chunks[low : high + 1]
        old_keys: list[bytes] = []
        old_cookies: list[int] = []
        for at in range(low, low + len(chunks)):
            chunk = self._unpacked(at)
            old_keys += chunk.keys
            old_cookies += chunk.cookies
        begin, end = bisect_right(old_keys, before), bisect_right(old_keys, keys[-1])
        if old_keys[begin:end] == keys:
            cookies = old_cookies[begin:end]
        else:
            known = dict(zip(old_keys[begin:end], old_cookies[begin:end], strict=True))
            merged = sorted({*keys, *(key for key in known if is_there(key))})
            floor = old_cookies[begin - 1] if begin else 0
            ceiling = old_cookies[end] if end < len(old_keys) else next(iter(self._first_cookies[high + 1 :]), None)
            given = dict(zip(merged, _numbered(merged, known, floor, ceiling), strict=True))
            cookies = [given[key] for key in keys]
            new_keys = [*old_keys[:begin], *merged, *old_keys[end:]]
            new_cookies = [*old_cookies[:begin], *given.values(), *old_cookies[end:]]
            self._replace(low, chunks, new_keys, new_cookies)
        if before <= self._through:
            self._through = max(self._through, keys[-1])
        return cookies

    def ended(self, key: bytes) -> None:
        """A listing has found nothing behind `key`."""
        if key <= self._through:
            self._through = END

    def _replace(self, low: int, chunks: Sequence[_Chunk], keys: list[bytes], cookies: list[int]) -> None:
        is_whole = all(chunk.is_whole for chunk in chunks)
        for chunk in chunks:
            self._at_hand.pop(chunk, None)
            self._forget_packed(chunk)
        cuts = range(0, len(keys), CHUNK_NAMES)
        new = [
            _Chunk(keys[cut : cut + CHUNK_NAMES], cookies[cut : cut + CHUNK_NAMES], is_whole=is_whole) for cut in cuts
        ]
        part = slice(low, low + len(chunks))
        self._chunks[part] = new
        self._first_keys[part] = [keys[cut] for cut in cuts]
        self._first_cookies[part] = [cookies[cut] for cut in cuts]
        for chunk in new:
            self._use(chunk)

    # ---- what is at hand ----

    def _unpacked(self, at: int) -> _Chunk:
        chunk = self._chunks[at]
        chunk.unpack()
        self._use(chunk)
        return chunk

    def _use(self, chunk: _Chunk) -> None:
        self._at_hand.pop(chunk, None)
        self._at_hand[chunk] = None
        self._forget_packed(chunk)
        if len(self._at_hand) > CHUNKS_AT_HAND:
            oldest = next(iter(self._at_hand))
            del self._at_hand[oldest]
            self._pack(oldest)
            while self._packed_bytes > PACKED_BYTES_MAX and len(self._packed) > 1:
                self._thin(next(iter(self._packed)))

    def _pack(self, chunk: _Chunk) -> None:
        chunk.pack()
        self._packed[chunk] = None
        self._packed_bytes += len(chunk.packed)

    def _forget_packed(self, chunk: _Chunk) -> None:
        if chunk in self._packed:
            del self._packed[chunk]
            self._packed_bytes -= len(chunk.packed)

    def _thin(self, chunk: _Chunk) -> None:
        self._forget_packed(chunk)
        chunk.unpack()
        chunk.keys, chunk.cookies, chunk.packed = chunk.keys[:1], chunk.cookies[:1], b""
        chunk.is_whole = False
        chunk.pack()


def _numbered(keys: Sequence[bytes], known: dict[bytes, int], floor: int, ceiling: int | None) -> Iterator[int]:
    """Cookies for `keys`, between `floor` and `ceiling` (None: they are the last ones)."""
    new = 0
    for key in keys:
        if (cookie := known.get(key)) is None:
            new += 1
            continue
        yield from _spread(floor, cookie, new)
        yield cookie
        floor, new = cookie, 0
    yield from _spread(floor, ceiling, new)


def _spread(low: int, high: int | None, count: int) -> list[int]:
    """`count` cookies between two. They share that of `high` where no room is left, so that whoever seeks there sees
    some names twice and misses none; a reply to a reader never has two of them.

    Names often come one behind the other at one spot: by the zeros at its end a cookie tells whether its name is one
    of those. They stay near the last one, and leave most of the gap to those that follow.
    """
    if count == 0:
        return []
    first = (low // STEP + 1) * STEP
    if high is None:
        if first + count * STEP <= COOKIE_MAX:
            return list(range(first, first + count * STEP, STEP))
        high = COOKIE_MAX
    step = (high - low) // (count + 1)
    if step == 0:
        return [high] * count
    near = min(step, max(1, (high - low) >> _NEAR))
    if low % STEP == 0 and high % STEP:
        return list(range(high - count * near, high, near))
    step = near if low % STEP and high % STEP == 0 else step
    return list(range(low + step, low + step * count + 1, step))


def restored(pages: Iterable[Told]) -> DirectoryCookies:
    """Places as they were told, oldest first: of two that contradict each other the newer one counts."""
    newest: dict[bytes, tuple[int, int]] = {}
    through = START
    for number, page in enumerate(pages):
        newest.update(zip(page.keys, ((cookie, number) for cookie in page.cookies), strict=True))
        if page.before <= through:
            through = max(through, page.keys[-1])
    kept: list[tuple[bytes, int, int]] = []
    for key, (cookie, number) in sorted(newest.items()):
        while kept and kept[-1][1] > cookie and kept[-1][2] < number:
            kept.pop()
        if not kept or kept[-1][1] <= cookie:
            kept.append((key, cookie, number))
    places = DirectoryCookies(gaps=-1)  # of the names that the tree lacks now nothing is known
    for cut in range(0, len(kept), CHUNK_NAMES):
        part = kept[cut : cut + CHUNK_NAMES]
        places._replace(len(places._chunks), (), [key for key, *_ in part], [cookie for _, cookie, _ in part])
    places._through = through
    return places

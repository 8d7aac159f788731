"""Limits of stores: what counts of a key and of metadata, and what is asked for."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from phfs_fuse import keys
from phfs_fuse.errors import IllegalName, NameTooLong, NotFound, PhfsError, StoreUnavailable
from phfs_fuse.store.base import metadata_bytes
from phfs_fuse.store.error_codes import error_of
from phfs_fuse.store.limits import NameLimits, Segment, longest_segments
from phfs_fuse.types import ObjectKey

GBK = "数据分析报告".encode("gbk")  # 12 bytes, most of them five in a key


class Store:
    """Takes segments of some length. `looks`: whether it says so before a name is stored."""

    def __init__(self, *, segment: int = 255, marker: int = 246, looks: bool = True) -> None:
        self.segment, self.marker, self.looks = segment, marker, looks
        self.requests: list[str] = []
        self.error: PhfsError | None = None
        self.is_silent = False

    def key(self, segment: Segment) -> ObjectKey:
        return ObjectKey("p/" + "x" * segment.length + "/" * segment.is_marker)

    async def look(self, key: ObjectKey) -> None:
        await self._request("look", key, refuses=self.looks)
        raise NotFound("head", key)

    async def store(self, key: ObjectKey) -> None:
        await self._request("store", key, refuses=True)

    async def _request(self, method: str, key: ObjectKey, *, refuses: bool) -> None:
        self.requests.append(method)
        if self.is_silent:
            await trio.sleep_forever()
        if self.error is not None:
            raise self.error
        is_long = any(n > (self.marker if is_marker else self.segment) for n, is_marker in longest_segments(key))
        if refuses and (is_long or " ." in key):
            raise IllegalName(method, key) if " ." in key else NameTooLong(method, key)


@pytest.mark.parametrize(
    ("key", "segments"),
    [
        ("a", [(1, False)]),
        ("a/bcd/ef", [(3, False)]),
        ("a/b/", [(1, False), (1, True)]),
        ("ab/c/", [(2, False), (1, True)]),
        ("a/" + keys.segment_of(GBK), [(52, False)]),
    ],
)
def test_the_longest_segment_is_what_the_store_gets(key: str, segments: list[tuple[int, bool]]) -> None:
    assert longest_segments(ObjectKey(key)) == segments


def test_metadata_counts_with_the_prefix_of_each_name() -> None:
    assert metadata_bytes({}) == 0
    assert metadata_bytes({"mode": "0100644", "a": "ü"}) == 11 + 4 + 7 + 11 + 1 + 2


@pytest.mark.parametrize("looks", [True, False])
async def test_a_store_is_tried_once_for_each_length(looks: bool) -> None:
    store = Store(looks=looks)
    limits = NameLimits(store)
    for _ in range(2):
        await limits.require(ObjectKey("p/" + "n" * 255))
        await limits.require(ObjectKey("p/" + "n" * 246 + "/"))
        for refused in ("n" * 256, "n" * 247 + "/", "n" * 256 + "/x", "‛AB" * 60):  # noqa: RUF001
            with pytest.raises(NameTooLong):
                await limits.require(ObjectKey("p/" + refused))
    assert store.requests.count("look") == 7  # a marker's name is looked at as one of a file too
    assert ("store" in store.requests) is not looks


async def test_ordinary_names_cost_no_request() -> None:
    store = Store()
    for name in ("x", "n" * 128, "a.b/..c", "...", "d.e/"):
        await NameLimits(store).require(ObjectKey(name))
    assert store.requests == []


@pytest.mark.parametrize("name", [" .", "a/ ./b", "..\\x", ".. "])
async def test_names_that_some_stores_take_for_dots_are_asked_about(name: str) -> None:
    store = Store()
    if " ." in name:
        with pytest.raises(IllegalName):
            await NameLimits(store).require(ObjectKey(name))
    else:
        await NameLimits(store).require(ObjectKey(name))
    assert store.requests == ["look"]


async def test_a_store_that_does_not_answer_counts_as_the_usual_one(autojump_clock: MockClock) -> None:
    store = Store()
    for store.error, store.is_silent in ((StoreUnavailable("head", "x"), False), (None, True)):
        limits = NameLimits(store)
        await limits.require(ObjectKey("n" * 255))
        await limits.require(ObjectKey("n" * 246 + "/"))
        for refused in ("n" * 256, "n" * 247 + "/"):
            with pytest.raises(NameTooLong):
                await limits.require(ObjectKey(refused))
        with pytest.raises(IllegalName):
            await limits.require(ObjectKey(".. "))
    store.is_silent = False
    store.segment = 1024
    await limits.require(ObjectKey("n" * 256))  # it is asked again


def test_minio_has_one_code_for_names_that_are_long_and_such_that_are_bad() -> None:
    assert isinstance(error_of("put", "a/" + "n" * 256, "XMinioInvalidObjectName", 400), NameTooLong)
    assert isinstance(error_of("put", "a/b", "XMinioInvalidObjectName", 400), IllegalName)
    assert isinstance(error_of("put", "a/ .", "XMinioInvalidResourceName", 400), IllegalName)


@pytest.mark.parametrize("name", [GBK * 4, b"n" * 255, "名".encode() * 85, b"\xff" * 255, "‛".encode() * 85])  # noqa: RUF001
@pytest.mark.parametrize("room", [0, 1, 2, 7, 200])
def test_a_shortened_name_fits_and_is_a_name(name: bytes, room: int) -> None:
    short = keys.shortened(name, room)
    assert name.startswith(short)
    assert len(short) <= room
    found = keys.segment_of(short + b".x")
    assert len(found.encode()) <= room + 2
    assert keys.name_of(found) == short + b".x"
    assert room < 15 or len(found.encode()) > room + 2 - 15  # and no more is cut off than has to be


@pytest.mark.parametrize("name", [b"x.rclonelink", b"x.phfs-file", b"x__XLDIR__"])
def test_endings_with_a_meaning_of_their_own_are_no_new_names(name: bytes) -> None:
    with pytest.raises(IllegalName):
        keys.new_segment(name)
    assert keys.name_of(name.decode()) == name

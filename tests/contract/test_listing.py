"""Pages of keys: complete, in order, rolled up, with metadata where the store can."""

from __future__ import annotations

import pytest
import trio

from phfs_fuse.errors import IllegalName, NotADirectory
from phfs_fuse.store.base import Listing
from tests.contract.place import Place


async def pages(place: Place, *, delimiter: bool, count_max: int = 1000) -> list[Listing]:
    found = []
    token = None
    while True:
        page = await place.store.list(place.prefix, delimiter=delimiter, token=token, count_max=count_max)
        found.append(page)
        token = page.next_token
        if token is None:
            return found


async def put_all(place: Place, names: list[str]) -> None:
    queue = iter(names)

    async def worker() -> None:
        for name in queue:
            await place.put(name)

    async with trio.open_nursery() as nursery:
        for _ in range(16):
            nursery.start_soon(worker)


async def test_a_prefix_without_keys_is_an_empty_page(place: Place) -> None:
    assert await place.list(delimiter=True) == Listing(objects=[], prefixes=[], next_token=None)


async def test_the_delimiter_rolls_up(place: Place) -> None:
    for name in ("a.txt", "a/1", "a/2/3", "b/", "b/x", "c"):
        await place.put(name)
    page = await place.list(delimiter=True)
    assert [info.key for info in page.objects] == [place.key(name) for name in ("a.txt", "c")]
    assert list(page.prefixes) == [place.key("a/"), place.key("b/")]
    inner = await place.list("a/", delimiter=True)
    assert [info.key for info in inner.objects] == [place.key("a/1")]
    assert list(inner.prefixes) == [place.key("a/2/")]
    assert len((await place.list()).objects) == 6


async def test_an_object_beside_keys_below_it(place: Place) -> None:
    await place.put("x", b"object")
    if "versitygw" in place.store_name:  # its objects are files of a file system
        with pytest.raises(NotADirectory):
            await place.put("x/y", b"below")
        assert await place.names() == ["x"]
        return
    await place.put("x/y", b"below")
    assert await place.read("x", 0, 6) == b"object"
    assert await place.read("x/y", 0, 5) == b"below"
    page = await place.list(delimiter=True)
    assert [info.key for info in page.objects] == [place.key("x")]
    # MinIO lists nothing below a key that is an object, though it has it: its listing walks folders.
    is_minio = "minio" in place.store_name
    assert list(page.prefixes) == ([] if is_minio else [place.key("x/")])
    assert await place.names() == (["x"] if is_minio else ["x", "x/y"])


async def test_a_prefix_is_no_folder(place: Place) -> None:
    for name in ("group/x", "group-b/x", "groupc"):
        await place.put(name)
    page = await place.list("group")
    assert [info.key for info in page.objects] == [place.key(name) for name in ("group-b/x", "group/x", "groupc")]


async def test_order_is_that_of_the_bytes(place: Place) -> None:
    names = ["z", "Z", "é", "\U0001f600", "\ufffd", "a-b", "a/b", "ab", "10", "9"]
    await put_all(place, names)
    assert await place.names() == sorted(names, key=str.encode)


async def test_more_than_one_page(place: Place) -> None:
    names = [f"f{number:05}" for number in range(1203)]
    await put_all(place, names)
    found = await pages(place, delimiter=False)
    assert [len(page.objects) for page in found] == [1000, 203]
    keys = [info.key for page in found for info in page.objects]
    assert keys == [place.key(name) for name in names]


async def test_small_pages_of_keys_and_prefixes(place: Place) -> None:
    names = [f"{letter}{tail}" for letter in "abcdef" for tail in (".txt", "/1", "/2")]
    await put_all(place, names)
    found = await pages(place, delimiter=True, count_max=5)
    assert all(len(page.objects) + len(page.prefixes) <= 5 for page in found)
    assert [info.key for page in found for info in page.objects] == [place.key(f"{x}.txt") for x in "abcdef"]
    assert [name for page in found for name in page.prefixes] == [place.key(f"{x}/") for x in "abcdef"]


async def test_start_after(place: Place) -> None:
    await put_all(place, ["a", "b", "c"])
    page = await place.store.list(place.prefix, delimiter=False, start_after=place.key("a"))
    assert [info.key for info in page.objects] == [place.key("b"), place.key("c")]


async def test_metadata_is_whole_or_absent(place: Place) -> None:
    await place.put("x", b"1", {"mode": "0100644", "mtime": "1.25"})
    await place.put("y", b"2")
    await place.put("d/")
    listed = [info.metadata for info in (await place.list()).objects]
    if place.store.lists_metadata:
        assert listed == [{}, {"mode": "0100644", "mtime": "1.25"}, {}]
    else:
        assert listed == [None, None, None]


async def test_which_stores_list_metadata(place: Place) -> None:
    assert place.store.lists_metadata == (place.store_name == "fake" or "minio" in place.store_name)


async def test_half_a_surrogate_is_no_prefix(place: Place) -> None:
    with pytest.raises(IllegalName):
        await place.list("\udc80")

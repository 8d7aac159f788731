"""Whole objects: what is put is what is read, under every key, and conditions hold."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator

import pytest
import trio

from phfs_fuse.errors import BadAnswer, IllegalName, InvalidArgument, NameTooLong, NotFound, VersionChanged
from phfs_fuse.store.base import LOOK_SECONDS, Expect, FileRange, Properties
from phfs_fuse.types import KIB, MIB, ETag
from tests.contract.place import Place

OTHER = ETag("0123456789abcdef0123456789abcdef")  # of no object here
ODD_NAMES = [
    " leading and trailing ",
    "plus+and space",
    "100%",
    "%41%2F",
    "a&b=c;d,e",
    "?query#fragment",
    "quotes'\"`",
    "<tag>&amp;",
    "back\\slash",
    "brackets[]{}()",
    "*star|pipe~^$!@:",
    "nfc-\u00e9",
    "nfd-e\u0301",
    "emoji-\U0001f600",
    "right-\u202e-to-left",
    "last-\ufffd",
    "tab\there",
    "control-\x01\x1f\x7f",
    "line\nfeed",
    "carriage\rreturn",
    "...",
    "..a",
]


@pytest.fixture
def big_file() -> Iterator[tuple[int, bytes]]:
    """A descriptor and its content, over the size where the data path changes."""
    data = os.urandom(3 * MIB + 17)
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        yield file.fileno(), data


async def test_put_answers_what_head_and_list_answer_later(place: Place) -> None:
    before = time.time_ns() - 2 * 10**9
    put = await place.put("x", b"hello", {"mode": "0100644", "mtime": "1.5"})
    head = await place.head("x")
    (listed,) = (await place.list()).objects
    assert (put.key, put.size, put.metadata) == (place.key("x"), 5, {"mode": "0100644", "mtime": "1.5"})
    assert (head.etag, head.size, head.metadata) == (put.etag, put.size, put.metadata)
    assert (listed.etag, listed.size) == (put.etag, put.size)
    assert listed.modified_ns == head.modified_ns
    assert before < put.modified_ns < time.time_ns() + 2 * 10**9
    assert '"' not in put.etag


async def test_metadata_names_come_back_in_lower_case(place: Place) -> None:
    await place.put("x", b"", {"MTime": "12.25", "under_score": "a b", "dash-ed": ""})
    assert (await place.head("x")).metadata == {"mtime": "12.25", "under_score": "a b", "dash-ed": ""}


@pytest.mark.parametrize("value", ["é", "two\nlines", " blank", "nul\0"])
async def test_metadata_that_no_header_carries_is_refused(place: Place, value: str) -> None:
    with pytest.raises(InvalidArgument):
        await place.put("x", b"", {"name": value})
    assert await place.names() == []


async def test_an_empty_object_and_a_directory_marker(place: Place) -> None:
    await place.put("empty")
    await place.put("dir/")
    assert (await place.head("empty")).size == 0
    assert (await place.head("dir/")).size == 0
    assert await place.names() == ["dir/", "empty"]


async def test_ranges(place: Place) -> None:
    data = bytes(range(256)) * 1024
    etag = (await place.put("x", data)).etag
    for start, end in ((0, 1), (0, len(data)), (1000, 3000), (len(data) - 1, len(data)), (7, 7)):
        assert await place.read("x", start, end, etag) == data[start:end]
        assert await place.read("x", start, end) == data[start:end]


async def test_a_body_from_a_file(place: Place, big_file: tuple[int, bytes]) -> None:
    fd, data = big_file
    for name, start, length in (("small", 10, 100), ("middle", 1, 300 * KIB), ("big", 5, len(data) - 5)):
        info = await place.put(name, FileRange(fd, start, length))
        assert info.size == length
        assert await place.read(name, 0, length, info.etag) == data[start : start + length]


async def test_bytes_that_the_file_does_not_have(place: Place, big_file: tuple[int, bytes]) -> None:
    fd, data = big_file
    for length in (100, len(data)):
        with pytest.raises((OSError, BadAnswer)):
            await place.put("x", FileRange(fd, len(data) - 10, length))
    assert await place.names() == []


async def test_the_sinks_own_error_comes_through(place: Place) -> None:
    await place.put("x", b"hello")

    def sink(offset: int, chunk: bytes | memoryview) -> None:
        raise OSError(28, "no space")

    with pytest.raises(OSError, match="no space"):
        await place.store.get(place.key("x"), 0, 5, etag=None, sink=sink)
    assert await place.read("x", 0, 5) == b"hello"


async def test_reading_beyond_the_end_is_no_success(place: Place) -> None:
    etag = (await place.put("x", b"hello")).etag
    for start, end in ((0, 6), (5, 6), (100, 200)):
        with pytest.raises(BadAnswer):
            await place.read("x", start, end, etag)


async def test_what_is_not_there(place: Place) -> None:
    with pytest.raises(NotFound):
        await place.head("none")
    with pytest.raises(NotFound):
        await place.read("none", 0, 1)
    await place.store.delete(place.key("none"))
    assert await place.store.delete_many({place.key("none"): None}) == {}


async def test_reading_a_version_that_is_gone(place: Place) -> None:
    old = (await place.put("x", b"old")).etag
    await place.put("x", b"new")
    with pytest.raises(VersionChanged):
        await place.read("x", 0, 3, old)
    await place.store.delete(place.key("x"))
    with pytest.raises(VersionChanged):
        await place.read("x", 0, 3, old)


async def test_put_where_nothing_may_be(place: Place) -> None:
    await place.put("x", b"first", expect=Expect(None))
    with pytest.raises(VersionChanged):
        await place.put("x", b"second", expect=Expect(None))
    assert await place.read("x", 0, 5) == b"first"


async def test_put_over_a_version(place: Place) -> None:
    first = await place.put("x", b"first")
    second = await place.put("x", b"second", expect=Expect(first.etag))
    with pytest.raises(VersionChanged):
        await place.put("x", b"third", expect=Expect(first.etag))
    assert (await place.head("x")).etag == second.etag


async def test_put_over_a_version_of_an_object_that_is_gone(place: Place) -> None:
    with pytest.raises(VersionChanged):
        await place.put("x", b"late", expect=Expect(OTHER))
    assert await place.names() == []


async def test_copy_with_new_metadata(place: Place) -> None:
    source = await place.put("x", b"hello", {"mode": "0100644"})
    copied = await place.store.copy(
        source.key, source.etag, place.key("y"), 5, {"mode": "0100755"}, expect=Expect(None)
    )
    head = await place.head("y")
    assert (head.etag, head.size, head.metadata) == (copied.etag, 5, {"mode": "0100755"})
    assert await place.read("y", 0, 5, copied.etag) == b"hello"
    assert (await place.head("x")).metadata == {"mode": "0100644"}


async def test_copy_onto_itself_changes_metadata_only(place: Place) -> None:
    source = await place.put("x", b"hello", {"mode": "0100644"})
    copied = await place.store.copy(source.key, source.etag, source.key, 5, {"uid": "7"}, expect=Expect(source.etag))
    assert (await place.head("x")).metadata == copied.metadata == {"uid": "7"}
    assert await place.read("x", 0, 5, copied.etag) == b"hello"


async def test_copy_to_where_nothing_may_be(place: Place) -> None:
    source, other = await place.put("source", b"ours"), await place.put("other", b"theirs")
    expect = Expect(None)
    with pytest.raises(VersionChanged):
        await place.store.copy(source.key, source.etag, other.key, 4, {}, expect=expect)
    with pytest.raises(VersionChanged):  # a look of long ago
        await place.store.copy(
            source.key, source.etag, other.key, 4, {}, expect=expect, seen_at=trio.current_time() - LOOK_SECONDS - 0.1
        )
    new = place.key("new")
    seen_at = trio.current_time()
    assert await place.store.look([new, other.key]) == {other.key: other.etag}
    copied = await place.store.copy(source.key, source.etag, new, 4, {}, expect=expect, seen_at=seen_at)
    assert (await place.store.head(new)).etag == copied.etag
    assert (await place.store.head(other.key)).etag == other.etag


async def test_a_look_at_many(place: Place) -> None:
    """Among others, some of them not there, some far from each other."""
    there = {
        f"d{number % 3}/n{number:03}": await place.put(f"d{number % 3}/n{number:03}", b"x") for number in range(60)
    }
    for number in range(30):
        await place.put(f"d1/n{number:03}-beside", b"x")
    wanted = [place.key(name) for name in there] + [place.key(f"d{number % 5}/never{number}") for number in range(30)]
    found = await place.store.look(wanted)
    assert found == {info.key: info.etag for info in there.values()}
    assert await place.store.look([]) == {}


async def test_copy_of_another_version(place: Place) -> None:
    source = await place.put("x", b"hello")
    for name in ("x", "gone"):
        with pytest.raises(VersionChanged):
            await place.store.copy(place.key(name), OTHER, place.key("y"), 5, {}, expect=None)
    await place.put("y", b"there")
    for etag in (None, OTHER):
        with pytest.raises(VersionChanged):
            await place.store.copy(source.key, source.etag, place.key("y"), 5, {}, expect=Expect(etag))
    assert await place.read("y", 0, 5) == b"there"


async def test_delete_of_a_version(place: Place) -> None:
    etag = (await place.put("x", b"hello")).etag
    with pytest.raises(VersionChanged):
        await place.store.delete(place.key("x"), expect=Expect(OTHER))
    await place.store.delete(place.key("x"), expect=Expect(etag))
    await place.store.delete(place.key("x"), expect=Expect(etag))  # is gone: what was asked for
    assert await place.names() == []


async def test_delete_many(place: Place) -> None:
    names = [f"n{number:04}" for number in range(20)]
    for name in [*names, "stays"]:
        await place.put(name)
    assert await place.store.delete_many({place.key(name): None for name in names}) == {}
    assert await place.store.delete_many({}) == {}
    assert await place.names() == ["stays"]


@pytest.fixture(params=ODD_NAMES)
def name(place: Place, request: pytest.FixtureRequest) -> str:
    if "moto" in place.store_name and "\n" in request.param:
        pytest.skip("moto routes no path with a line feed")  # within the async test the reason would be lost
    if "versitygw" in place.store_name and "\x01" in request.param:
        pytest.skip("versitygw 1.8 ignores encoding-type=url: its listings cannot spell control characters")
    return str(request.param)


async def test_odd_names(place: Place, name: str) -> None:
    data = name.encode()
    put = await place.put(name, data, {"mode": "0100644"}, Expect(None))
    assert (await place.head(name)).etag == put.etag
    assert await place.read(name, 0, len(data), put.etag) == data
    copy = place.key(f"copy of {name}")
    await place.store.copy(place.key(name), put.etag, copy, len(data), {}, expect=Expect(None))
    assert sorted(await place.names()) == sorted([name, f"copy of {name}"])
    assert await place.store.delete_many({place.key(name): put.etag}) == {}
    await place.store.delete(copy)
    assert await place.names() == []


@pytest.mark.parametrize("name", ["..", "a/../b", "./a", "a/.", "nul\0", "half-\udc80"])
async def test_keys_that_would_reach_another_object_are_refused(place: Place, name: str) -> None:
    with pytest.raises(IllegalName):
        await place.put(name, b"x")
    with pytest.raises(IllegalName):
        await place.head(name)
    with pytest.raises(IllegalName):
        await place.store.delete(place.key(name))


async def test_the_longest_key(place: Place) -> None:
    name = "/".join(["d" * 200] * 5)
    name += "x" * (1024 - len(place.key(name)))
    await place.put(name, b"x")
    assert await place.names() == [name]
    with pytest.raises(NameTooLong):
        await place.put(name + "x", b"x")


@pytest.mark.parametrize("names", [["a", "b", "c"], [f"n{number:04}" for number in range(60)]], ids=["few", "many"])
async def test_delete_many_of_versions(place: Place, names: list[str]) -> None:
    versions = {place.key(name): (await place.put(name, b"1")).etag for name in names}
    versions[place.key("never")] = OTHER
    await place.put(names[1], b"2")
    await place.put(f"{names[-1]}-beside", b"3")
    failed = await place.store.delete_many(versions)
    assert {key: type(exc) for key, exc in failed.items()} == {place.key(names[1]): VersionChanged}
    assert await place.names() == [names[1], f"{names[-1]}-beside"]


KEPT = {
    "content-type": "application/vnd.my+json",
    "cache-control": "max-age=60",
    "content-disposition": 'attachment; filename="a b.json"',
    "content-encoding": "gzip",
    "content-language": "de",
    "expires": "Thu, 01 Jan 1970 00:00:00 GMT",
}


async def kept(place: Place, name: str) -> tuple[dict[str, str], dict[str, str], str]:
    """Of the object: its headers of `KEPT`, its metadata, its tags."""
    found = await place.head(name)
    properties = await place.store.properties(found.key, found.etag)
    headers = {key: value for key, value in properties.headers.items() if key in KEPT}
    return headers, dict(properties.metadata), properties.tags


@pytest.fixture
def their(place: Place) -> Properties:
    """Properties as others give them."""
    return Properties(headers=KEPT, metadata={"project": "alpha"}, tags="note=a%20b&team=red")


async def test_properties_of_a_new_object(place: Place) -> None:
    stored = await place.put("x.txt", b"hello", {"mode": "0100644"})
    assert await kept(place, "x.txt") == ({"content-type": "text/plain"}, {"mode": "0100644"}, "")
    for key, etag in ((stored.key, OTHER), (place.key("none"), OTHER)):
        with pytest.raises(VersionChanged):
            await place.store.properties(key, etag)


@pytest.mark.parametrize("size", [1, 3 * MIB])
async def test_a_version_stored_anew_keeps_properties(place: Place, their: Properties, size: int) -> None:
    metadata = {**their.metadata, "mode": "0100644"}
    await place.store.put(place.key("x"), b"x" * size, metadata, expect=None, properties=their)
    assert await kept(place, "x") == (KEPT, metadata, their.tags)


async def test_a_copy_has_all_of_its_source(place: Place, their: Properties) -> None:
    source = await place.store.put(place.key("x"), b"hello", their.metadata, expect=None, properties=their)
    copy = await place.store.copy(source.key, source.etag, place.key("y.txt"), 5, None, expect=Expect(None))
    assert (await place.head("y.txt")).etag == copy.etag
    headers, metadata, tags = await kept(place, "y.txt")
    if "minio" in place.store_name:  # which loses this one
        headers["expires"] = KEPT["expires"]
    assert (headers, metadata, tags) == (KEPT, {"project": "alpha"}, their.tags)
    assert await place.read("y.txt", 0, 5) == b"hello"


async def test_new_metadata_leaves_properties(place: Place, their: Properties) -> None:
    source = await place.store.put(place.key("x"), b"hello", their.metadata, expect=None, properties=their)
    found = await place.store.properties(source.key, source.etag)
    metadata = {**their.metadata, "mode": "0100600"}
    await place.store.copy(
        source.key, source.etag, source.key, 5, metadata, expect=Expect(source.etag), properties=found
    )
    assert await kept(place, "x") == (KEPT, metadata, their.tags)


async def test_an_upload_in_parts_keeps_properties(place: Place, their: Properties) -> None:
    key = place.key("x")
    upload_id = await place.store.create_multipart(key, their.metadata, their)
    part = await place.store.upload_part(key, upload_id, 1, b"hello")
    await place.store.complete_multipart(key, upload_id, [part], expect=None)
    assert await kept(place, "x") == (KEPT, dict(their.metadata), their.tags)


async def test_text_that_is_not_ascii_is_kept(place: Place) -> None:
    """As MinIO takes it from other clients, and tells it; boto3 would not sign it."""
    if place.store_name != "crt-minio":
        pytest.skip("only awscrt sends it")
    their = Properties(headers={"content-disposition": "inline; filename=é"}, metadata={"title": "Übung 日本"})
    info = await place.store.put(place.key("x"), b"x", their.metadata, expect=None, properties=their)
    told = await place.store.properties(info.key, info.etag)
    assert told.headers["content-disposition"] == "inline; filename=é"
    for size in (1, 3 * MIB):
        info = await place.store.put(place.key("x"), b"x" * size, told.metadata, expect=None, properties=told)
        found = await place.store.properties(info.key, info.etag)
        assert (found.headers, found.metadata, found.tags) == (told.headers, told.metadata, told.tags)

"""Limits of stores: what is known of them holds when it is tried."""

from __future__ import annotations

import pytest

from phfs_fuse.errors import IllegalName, NameTooLong, NotFound, PhfsError
from phfs_fuse.store.base import metadata_bytes
from phfs_fuse.types import KEY_BYTES_MAX
from tests.contract.place import Place

NAMES = [
    "n" * 246, "n" * 247, "n" * 255, "n" * 256, "n" * 246 + "/", "n" * 247 + "/", "n" * 256 + "/x", "‛CA" * 52,  # noqa: RUF001
    " .", "a/.. ", "a\\..\\b", "a.b", "..a",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
async def test_a_name_is_known_to_be_stored_or_refused(place: Place, name: str) -> None:
    try:
        await place.store.require_key(place.key(name))
    except (NameTooLong, IllegalName):
        with pytest.raises(PhfsError):  # versitygw names another reason
            await place.put(name)
        with pytest.raises(NotFound):
            await place.head(name)
        assert not (await place.list(name)).objects
        await place.store.delete(place.key(name))  # it is not there
        assert await place.store.delete_many({place.key(name): None, place.key("x"): None}) == {}
    else:
        await place.put(name)
        assert await place.names() == [name]
        await place.store.delete(place.key(name))
    assert await place.names() == []


@pytest.mark.parametrize("end", ["", "/"])
async def test_a_key_may_be_as_long_as_is_said(place: Place, end: str) -> None:
    folders = ("d" * 200 + "/") * 6
    name = folders[: KEY_BYTES_MAX - len(place.prefix) - 2] + "x" + (end or "x")
    await place.store.require_key(place.key(name))
    await place.put(name)
    assert await place.names() == [name]
    with pytest.raises(NameTooLong):
        await place.store.require_key(place.key("x" + name))


@pytest.mark.parametrize("count", [1, 40])
async def test_metadata_may_be_as_big_as_is_said(place: Place, count: int) -> None:
    metadata = {f"a{number}": "" for number in range(count)}
    metadata["a0"] = "v" * (place.store.limits.metadata_bytes_max - metadata_bytes(metadata))
    assert metadata_bytes(metadata) == place.store.limits.metadata_bytes_max
    info = await place.put("x", b"1", metadata)
    assert (await place.head("x")).metadata == metadata
    copied = await place.store.copy(place.key("x"), info.etag, place.key("y"), 1, metadata, expect=None)
    assert copied.metadata == metadata

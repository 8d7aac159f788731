"""Headers, metadata and tags that others stored with an object stay over what is done to it here (P1b)."""

from __future__ import annotations

import os
from collections import Counter
from typing import cast

import pytest
from trio.testing import MockClock

from phfs_fuse.attrs import parse_seconds
from phfs_fuse.types import MIB, ObjectKey
from phfs_fuse.vfs.vfs import Change
from tests.support.fake_store import FakeStore
from tests.support.world import PREFIX, World, content

THEIRS = {"content-type": "application/vnd.my+json", "cache-control": "max-age=60", "expires": "0"}


def seed_theirs(world: World, name: str, data: bytes = b"hello", **more: str) -> None:
    metadata = {"project": "alpha", "mtime": "1.5", **more}
    cast(FakeStore, world.store).seed(PREFIX + name, data, metadata, THEIRS, "team=red")


def theirs_of(world: World, name: str) -> tuple[dict[str, str], str | None, str]:
    found = cast(FakeStore, world.store).objects[ObjectKey(PREFIX + name)]
    return dict(found.headers), found.metadata.get("project"), found.tags


STAYS = (THEIRS, "alpha", "team=red")


async def append(world: World, name: str, data: bytes) -> None:
    node = await world.node(name)
    fh = world.vfs.open(node.ino, os.O_WRONLY | os.O_APPEND)
    await world.vfs.write(fh, node.size, data)
    world.vfs.release(fh)


async def test_what_others_stored_with_a_file_stays(world: World, autojump_clock: MockClock) -> None:
    for name in ("chmod", "move", "both", "append", "partial", "folder/in"):
        seed_theirs(world, name, md5chksum="of the bytes")
    await world.vfs.setattr((await world.node("chmod")).ino, Change(mode=0o600))
    await world.vfs.rename(1, b"move", 1, b"moved.txt", 0)
    await world.vfs.setattr((await world.node("both")).ino, Change(mode=0o600))
    await world.vfs.rename(1, b"both", 1, b"both.txt", 0)
    await append(world, "append", b" you")
    await world.write_again("partial", b"J")
    await world.vfs.rename(1, b"folder", 1, b"other", 0)
    await world.settle()
    assert content(world, "append") == b"hello you"
    assert content(world, "partial") == b"Jello"
    for name in ("chmod", "moved.txt", "both.txt", "append", "partial", "other/in"):
        assert theirs_of(world, name) == STAYS, name
    objects = world.store.objects
    assert objects[ObjectKey(PREFIX + "chmod")].metadata["mode"] == "0100600"
    assert objects[ObjectKey(PREFIX + "both.txt")].metadata["md5chksum"] == "of the bytes"
    assert "md5chksum" not in objects[ObjectKey(PREFIX + "append")].metadata
    assert "mode" not in objects[ObjectKey(PREFIX + "moved.txt")].metadata  # copied as it was


async def test_what_others_stored_with_a_big_file_stays(world: World, autojump_clock: MockClock) -> None:
    seed_theirs(world, "big", os.urandom(20 * MIB))
    await append(world, "big", b"more")
    await world.settle()
    assert theirs_of(world, "big") == STAYS
    assert world.store.requests["upload_part_copy"] > 0


async def test_new_bytes_are_a_new_object(world: World, autojump_clock: MockClock) -> None:
    for name in ("truncated.txt", "replaced.txt"):
        seed_theirs(world, name)
    node = await world.node("truncated.txt")
    fh = world.vfs.open(node.ino, os.O_WRONLY | os.O_TRUNC)
    await world.vfs.write(fh, 0, b"new")
    world.vfs.release(fh)
    await world.write("replaced.tmp", b"new")
    await world.vfs.rename(1, b"replaced.tmp", 1, b"replaced.txt", 0)
    await world.settle()
    for name in ("truncated.txt", "replaced.txt"):
        assert theirs_of(world, name) == ({"content-type": "text/plain"}, None, "")


async def test_new_bytes_that_get_their_name_late_have_its_type(world: World, autojump_clock: MockClock) -> None:
    await world.write("page.html.part", b"<html>")
    await world.settle()
    await world.vfs.rename(1, b"page.html.part", 1, b"page.html", 0)
    await world.settle()
    assert theirs_of(world, "page.html")[0] == {"content-type": "text/html"}


async def test_a_ring_of_renames_keeps_what_others_stored(world: World, autojump_clock: MockClock) -> None:
    seed_theirs(world, "a", b"bytes of a")
    seed_theirs(world, "b", b"bytes of b")
    for old, new in ((b"a", b"t"), (b"b", b"a"), (b"t", b"b")):
        await world.vfs.rename(1, old, 1, new, 0)
    await world.settle()
    assert (content(world, "a"), content(world, "b")) == (b"bytes of b", b"bytes of a")
    assert (theirs_of(world, "a"), theirs_of(world, "b")) == (STAYS, STAYS)


async def test_a_time_that_only_the_store_has_outlives_a_rename(world: World, autojump_clock: MockClock) -> None:
    cast(FakeStore, world.store).seed(PREFIX + "x", b"hello")
    before = (await world.node("x")).mtime_ns
    await world.vfs.rename(1, b"x", 1, b"y", 0)
    await world.settle()
    assert parse_seconds(world.store.objects[ObjectKey(PREFIX + "y")].metadata["mtime"]) == before


async def test_files_of_a_folder_that_is_moved_are_copied_unseen(world: World, autojump_clock: MockClock) -> None:
    for number in range(50):
        cast(FakeStore, world.store).seed(f"{PREFIX}old/f{number}", b"x")
    await world.names((await world.node("old")).ino)
    await world.vfs.rename(1, b"old", 1, b"new", 0)
    before = Counter(world.store.requests)
    await world.settle()
    asked = world.store.requests - before
    assert (asked["copy"], asked["properties"]) == (50, 0)
    assert asked["head"] + asked["look"] <= 10


async def test_a_copy_in_parts_takes_all_along(
    world: World, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phfs_fuse.store.base.COPY_BYTES_MAX", MIB)
    data = os.urandom(12 * MIB)
    seed_theirs(world, "plain", data)
    seed_theirs(world, "changed", data)
    await world.vfs.setattr((await world.node("changed")).ino, Change(mode=0o600))
    for name in ("plain", "changed"):
        await world.vfs.rename(1, name.encode(), 1, f"{name}.txt".encode(), 0)
    await world.settle()
    for name in ("plain.txt", "changed.txt"):
        assert theirs_of(world, name) == STAYS
        assert content(world, name) == data
    assert world.store.requests["upload_part_copy"] > 0
    assert world.store.requests["copy"] == 0

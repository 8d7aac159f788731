"""One entry that cannot be read or shown hides nothing else of its folder, and no page decides what belongs to it."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from phfs_fuse.errors import (
    AccessDenied,
    InvalidArgument,
    NameTooLong,
    NotEmpty,
    NotSupported,
    PhfsError,
    StoreUnavailable,
)
from phfs_fuse.store.base import Listing, ObjectInfo
from phfs_fuse.tree.node import NEVER
from phfs_fuse.types import ObjectKey
from phfs_fuse.vfs.attributes import Change
from tests.support.fake_store import FakeStore
from tests.support.world import PREFIX, World, content, keys, made, running


class OddStore(FakeStore):
    """HEAD of the keys in `refuses` fails, of those in `unreadable` a listing says what cannot be; `ghosts` are
    listed as folders, and have nothing below them; a page has `page_max` entries."""

    def __init__(self, *, lists_metadata: bool = False) -> None:
        super().__init__(lists_metadata=lists_metadata)
        self.refuses: dict[str, PhfsError] = {}
        self.unreadable: set[str] = set()
        self.ghosts: set[str] = set()
        self.page_max = 1000
        self.hides = False

    @property
    def hides_below(self) -> bool:
        return self.hides

    @property
    def lists_ghosts(self) -> bool:
        return bool(self.ghosts)

    async def head(self, key: ObjectKey, *, surely: bool = False) -> ObjectInfo:
        if (error := self.refuses.get(key.removeprefix(PREFIX))) is not None:
            self.requests["head"] += 1
            raise error
        return await super().head(key, surely=surely)

    async def list(
        self,
        prefix: str,
        *,
        delimiter: bool,
        token: str | None = None,
        start_after: str = "",
        count_max: int = 1000,
    ) -> Listing:
        page = await super().list(
            prefix,
            delimiter=delimiter,
            token=token,
            start_after=start_after,
            count_max=min(count_max, self.page_max),
        )
        if self.hides:
            page = self._without_hidden(page)
        odd = [info.key for info in page.objects if info.key.removeprefix(PREFIX) in self.unreadable]
        ghosts = [PREFIX + name for name in self.ghosts] if delimiter and prefix == PREFIX else []
        return Listing(
            objects=[info for info in page.objects if info.key not in odd],
            prefixes=sorted({*page.prefixes, *ghosts}),
            next_token=page.next_token,
            unreadable=odd,
        )

    def _without_hidden(self, page: Listing) -> Listing:
        """As MinIO does: nothing below an object but a marker."""

        def is_hidden(key: str) -> bool:
            above = key.removesuffix("/").split("/")[:-1]
            return any("/".join(above[:count]) in self.objects for count in range(1, len(above) + 1))

        objects = [info for info in page.objects if not is_hidden(info.key)]
        prefixes = [prefix for prefix in page.prefixes if prefix.removesuffix("/") not in self.objects]
        return Listing(objects=objects, prefixes=prefixes, next_token=page.next_token)


@pytest.fixture
def store() -> OddStore:
    return OddStore()


@pytest.fixture
async def world(store: OddStore, tmp_path: Path) -> AsyncIterator[World]:
    async with running(made(store, tmp_path)) as world:
        yield world


@pytest.mark.parametrize(
    "error", [AccessDenied("head", "x", ""), InvalidArgument("head", "x", "SSE-C"), StoreUnavailable("head", "x", "")]
)
async def test_an_object_of_which_head_fails_has_defaults(
    world: World, store: OddStore, error: PhfsError, autojump_clock: MockClock
) -> None:
    for name in ("a", "bad", "z", "bad-folder/", "bad-folder/in"):
        store.seed(PREFIX + name, b"x", {"mode": "0100600"})
    store.refuses = {"bad": error, "bad-folder/": error}
    assert (await world.node("bad")).mode == 0o100644  # asked for alone
    assert sorted(await world.names()) == ["a", "bad", "bad-folder", "z"]
    assert (await world.node("bad")).mode == 0o100644
    assert (await world.node("a")).mode == 0o100600


@pytest.mark.parametrize("listed", [False, True])
async def test_an_object_that_needs_a_key_of_its_owner_is_not_changed(
    world: World, store: OddStore, listed: bool, autojump_clock: MockClock
) -> None:
    """The store could neither copy nor read it (SSE-C): what cannot follow is refused at the call."""
    for name in ("d/bad", "d/fine"):
        store.seed(PREFIX + name, b"x", {"mode": "0100600"})
    store.refuses = {"d/bad": InvalidArgument("head", "d/bad", "InvalidRequest")}
    folder = await world.node("d")
    if listed:
        await world.names(folder.ino)
    bad, before = await world.node("d/bad"), store.objects[ObjectKey(PREFIX + "d/bad")]
    for change in (Change(mode=0o640), Change(uid=5), Change(mtime_ns=5), Change(size=4), Change(size=0)):
        with pytest.raises(NotSupported):
            await world.vfs.setattr(bad.ino, change)
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_APPEND, os.O_WRONLY | os.O_TRUNC):
        with pytest.raises(NotSupported):
            world.vfs.open(bad.ino, flags)
    for parent, name in ((folder.ino, b"bad"), (1, b"d")):
        with pytest.raises(NotSupported):
            await world.vfs.rename(parent, name, 1, b"e", 0)
    await world.node("d/fine")
    with pytest.raises(NotSupported):
        await world.vfs.rename(folder.ino, b"fine", folder.ino, b"bad", 0)
    with pytest.raises(NotSupported):
        await world.vfs.setxattr(bad.ino, b"user.a", b"b")
    assert (bad.mode, bad.dirty) == (0o100644, None)
    await world.settle()
    assert store.objects[ObjectKey(PREFIX + "d/bad")] == before
    await world.vfs.setattr((await world.node("d/fine")).ino, Change(mode=0o640))
    await world.settle()
    assert store.objects[ObjectKey(PREFIX + "d/fine")].metadata["mode"] == "0100640"


async def test_an_object_that_needs_a_key_of_its_owner_is_removed(
    world: World, store: OddStore, autojump_clock: MockClock
) -> None:
    store.seed(PREFIX + "bad", b"x")
    store.refuses = {"bad": InvalidArgument("head", "bad", "InvalidRequest")}
    await world.vfs.unlink(1, b"bad")
    await world.settle()
    assert "bad" not in keys(world)


async def test_a_store_that_refuses_all_is_no_bad_entry(world: World, store: OddStore) -> None:
    store.seed(PREFIX + "x", b"x")
    store.denied = True
    with pytest.raises(AccessDenied):
        await world.node("x")
    store.denied = False
    assert await world.names() == ["x"]


async def test_what_the_store_says_nonsense_of_is_left_out_and_counted(world: World, store: OddStore) -> None:
    for name in ("d/a", "d/bad", "d/z"):
        store.seed(PREFIX + name)
    store.unreadable = {"d/bad"}
    assert sorted(await world.names((await world.node("d")).ino)) == ["a", "z"]
    assert world.namespace.illegal_keys == 1


async def test_prefixes_of_removed_objects_are_no_folders(world: World, store: OddStore) -> None:
    store.seed(PREFIX + "real/x")
    store.seed(PREFIX + "marked/")
    store.ghosts = {"ghost/"}
    assert sorted(await world.names()) == ["marked", "real"]


@pytest.mark.parametrize("listed", [False, True])
async def test_a_folder_of_keys_without_a_name_stays(
    world: World, store: OddStore, listed: bool, autojump_clock: MockClock
) -> None:
    store.seed(PREFIX + "d//odd")
    store.seed(PREFIX + "up/d//odd")
    folder, above = await world.node("d"), await world.node("up")
    if listed:
        assert await world.names(folder.ino) == []
    with pytest.raises(NotEmpty):
        await world.vfs.rmdir(1, b"d")
    with pytest.raises(NotSupported):
        await world.vfs.rename(1, b"d", 1, b"e", 0)
    with pytest.raises(NotSupported):
        await world.vfs.rename(1, b"up", 1, b"e", 0)
    assert above.name == b"up"
    store.remove(PREFIX + "d//odd")
    await trio.sleep(60)
    store.seed(PREFIX + "d/")
    await world.vfs.rmdir(1, b"d")
    await world.settle()
    assert keys(world) == ["up/d//odd"]


async def test_a_link_whose_target_cannot_be_one_is_not_read(world: World, store: OddStore) -> None:
    store.seed(PREFIX + "long", b"a" * 4096, {"mode": "0120777"})
    store.seed(PREFIX + "longest", b"a" * 4095, {"mode": "0120777"})
    with pytest.raises(NameTooLong):
        await world.vfs.readlink((await world.node("long")).ino)
    assert len(await world.vfs.readlink((await world.node("longest")).ino)) == 4095


@pytest.mark.parametrize("hides", [False, True])
async def test_an_object_that_takes_the_name_of_a_folder_in_use(
    world: World, store: OddStore, hides: bool, autojump_clock: MockClock
) -> None:
    """Where the store lists nothing below it, the folder goes on under another name; else beside it."""
    store.hides = hides
    await world.vfs.mkdir(1, b"d", 0o755, 0, 0)
    await world.write("d/old", b"old")
    await world.settle()
    store.seed(PREFIX + "d", b"theirs")
    node = await world.write("d/new", b"new")
    await trio.sleep(0.1)
    world.inodes.root.complete_at = node.parent.checked_at = NEVER  # type: ignore[union-attr]
    await world.vfs.lookup(1, b"d")
    await world.settle()
    await trio.sleep(60)
    names = sorted(await world.names())
    if hides:
        assert names[0] == "d"
        assert names[1].startswith("d.conflict-")
        assert await world.read("d") == b"theirs"
        folder = names[1]
    else:
        assert names == ["d", "d.phfs-file"]
        folder = "d"
    assert await world.read(f"{folder}/new") == b"new"
    assert await world.read(f"{folder}/old") == b"old"
    assert content(world, f"{folder}/new") == b"new"


SEGMENTS = st.lists(
    st.sampled_from(["x", "x-1", "x.rclonelink", "x/in", "x!", "x0", "y", "y.phfs-file", "y/in", "y-/in"]),
    unique=True,
)


@pytest.mark.parametrize("page_max", [1, 2, 3])
@given(names=SEGMENTS)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_page_decides_what_belongs_to_a_folder(
    page_max: int, names: Sequence[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    async def listed(count: int) -> list[str]:
        store = OddStore()
        store.page_max = count
        for name in names:
            store.seed(PREFIX + name)
        world = made(store, tmp_path_factory.mktemp("world"))
        try:
            return await world.names()
        finally:
            world.journal.close()

    def run(call: Callable[[], object]) -> list[str]:
        found = trio.run(call)  # type: ignore[arg-type]
        assert isinstance(found, list)
        return found

    whole, paged = run(lambda: listed(1000)), run(lambda: listed(page_max))
    assert sorted(paged) == sorted(whole)
    assert len(set(paged)) == len(paged)

"""Folders of thousands of names over a store with MinIO's habits: what programs here did is never undone by an
answer, no name is skipped or listed twice, and in the end mount, store and model agree.

Programs of this mount and another client change names of their own in the same folders, while readers list them, with
events and without, and the worker dies. PHFS_MODEL_SEED and PHFS_MODEL_EXAMPLES run it longer or otherwise.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from random import Random

import pytest
import trio
import trio.lowlevel
from trio.testing import MockClock

from phfs_fuse.errors import NotFound, PhfsError
from phfs_fuse.pending.recovery import Recovery
from tests.support.habits import HabitStore
from tests.support.world import PREFIX, World, made, running

SEED = int(os.environ.get("PHFS_MODEL_SEED", "1"))
SEEDS = range(SEED, SEED + max(1, int(os.environ.get("PHFS_MODEL_EXAMPLES", "12")) // 12))
FOLDERS = ("big", "small", "small/deep")
NAMES = {"big": 1200, "small": 40, "small/deep": 10}
PAGE = 50
LIVES = 3
STEPS = 120
QUIET_SECONDS = 60.0  # for what is under way; with events that is shorter than what is heard of is believed


class Model:
    """The files of this mount (`m...`) and of the other client (`o...`), and when each name changed last."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self.files: dict[str, bytes] = {}
        self.changed_at: dict[str, int] = {}
        self.clock = 0
        self.busy: set[str] = set()  # names with a call under way

    def set(self, path: str, data: bytes | None) -> None:
        self.clock += 1
        self.changed_at[path] = self.clock
        if data is None:
            del self.files[path]
        else:
            self.files[path] = data

    def some(self, kind: str, *, is_there: bool = True) -> str | None:
        """A path of that kind that nothing is done to."""
        for _ in range(20):
            folder = self._random.choice(FOLDERS)
            path = f"{folder}/{kind}{self._random.randrange(NAMES[folder]):04}"
            if path not in self.busy and (path in self.files) == is_there:
                return path
        return None

    def names(self, folder: str) -> set[str]:
        return {path.rpartition("/")[2] for path in self.files if path.rpartition("/")[0] == folder}


class Run:
    """One life of a worker."""

    def __init__(self, world: World, store: HabitStore, model: Model, random: Random) -> None:
        self.world, self.store, self.model, self.random = world, store, model, random
        self.listed = 0

    async def program(self) -> None:
        """Changes files by name, and looks at once."""
        for _ in range(STEPS):
            action = self.random.choice([self.write, self.write, self.replace, self.remove, self.move, self.look])
            await action()
            if self.random.random() < 0.3:
                await trio.sleep(self.random.choice([0.01, 0.3, 2.0]))

    async def other(self) -> None:
        """The other client: plain S3."""
        for _ in range(STEPS):
            if (path := self.model.some("o", is_there=self.random.random() < 0.7)) is not None:
                if path in self.model.files and self.random.random() < 0.5:
                    self.store.remove(PREFIX + path)
                    self.model.set(path, None)
                else:
                    self.store.seed(PREFIX + path, data := self.data())
                    self.model.set(path, data)
            await trio.sleep(self.random.choice([0.01, 0.1, 1.0]))

    async def reader(self) -> None:
        """Lists a folder page by page, with pauses."""
        for _ in range(6):
            await self.list_one(self.random.choice(("big", *FOLDERS)))
            await trio.sleep(self.random.choice([0.0, 1.0, 7.0]))

    async def list_one(self, folder: str) -> None:
        began, before = self.model.clock, self.model.names(folder)
        busy = set(self.model.busy)
        node = await self.world.node(folder)
        fh = self.world.vfs.opendir(node.ino)
        names: list[str] = []
        offset = 0
        try:
            while page := await self.world.vfs.readdir(fh, offset):
                names += [kid.name.decode() for _, kid in page if not kid.is_dir]
                offset = page[-1][0]
                busy |= self.model.busy
                if self.random.random() < 0.3:
                    await trio.sleep(self.random.choice([0.01, 0.5, 8.0]))
        finally:
            with trio.CancelScope(shield=True):
                await self.world.vfs.releasedir(fh)
        assert len(names) == len(set(names)), f"{folder}: listed twice"
        after = self.model.names(folder)
        known = {n for n in before | after | set(names) if not n.startswith(".")}
        touched = {
            n for n in known if self.model.changed_at.get(f"{folder}/{n}", 0) > began or f"{folder}/{n}" in busy
        }
        ours = {n for n in known - touched if n.startswith("m")}
        assert ours & set(names) == ours & before, f"{folder}: {sorted((ours & set(names)) ^ (ours & before))[:9]}"
        recent = {
            n for n in known if self.model.changed_at.get(f"{folder}/{n}", 0) > began - 40
        }  # may be known later
        others = {n for n in known - touched - recent if n.startswith("o")}
        assert not (others & before) - set(names), f"{folder}: skipped {sorted((others & before) - set(names))[:9]}"
        for name in sorted(n for n in touched if n.startswith("m")):
            if (path := f"{folder}/{name}") not in self.model.busy:
                with self.doing(path):
                    await self.check(path)
        self.listed += 1

    def data(self) -> bytes:
        return str(self.random.random()).encode()

    async def write(self) -> None:
        path = self.model.some("m", is_there=self.random.random() < 0.5)
        if path is None:
            return
        with self.doing(path):
            await self.stored(path, self.data())

    async def stored(self, path: str, data: bytes) -> None:
        folder, _, name = path.rpartition("/")
        parent = await self.world.node(folder)
        flags = os.O_RDWR | os.O_TRUNC
        node, fh = await self.world.vfs.create(parent.ino, name.encode(), 0o644, flags, 0, 0)
        node.lookups += 1
        await self.world.vfs.write(fh, 0, data)
        await self.world.vfs.flush(fh)
        self.world.vfs.release(fh)
        self.model.set(path, data)
        if self.random.random() < 0.5:
            self.world.vfs.forget([(node.ino, node.lookups)])

    async def replace(self) -> None:
        if (path := self.model.some("m")) is None:
            return
        folder, _, name = path.rpartition("/")
        new = f"{folder}/.{name}"
        with self.doing(path, new):
            await self.stored(new, data := self.data())
            parent = await self.world.node(folder)
            await self.world.vfs.rename(parent.ino, b"." + name.encode(), parent.ino, name.encode(), 0)
            self.model.set(new, None)
            self.model.set(path, data)

    async def remove(self) -> None:
        if (path := self.model.some("m")) is None:
            return
        folder, _, name = path.rpartition("/")
        with self.doing(path):
            parent = await self.world.node(folder)
            await self.world.vfs.unlink(parent.ino, name.encode())
            self.model.set(path, None)

    async def move(self) -> None:
        source, target = self.model.some("m"), self.model.some("m", is_there=self.random.random() < 0.3)
        if source is None or target is None or source == target:
            return
        (folder, _, name), (to, _, to_name) = source.rpartition("/"), target.rpartition("/")
        with self.doing(source, target):
            parent, to_parent = await self.world.node(folder), await self.world.node(to)
            await self.world.vfs.rename(parent.ino, name.encode(), to_parent.ino, to_name.encode(), 0)
            data = self.model.files[source]
            self.model.set(source, None)
            self.model.set(target, data)

    async def look(self) -> None:
        path = self.model.some("m", is_there=self.random.random() < 0.7)
        if path is not None:
            with self.doing(path):
                await self.check(path)

    async def check(self, path: str) -> None:
        if path in self.model.files:
            assert await self.world.read(path) == self.model.files[path], path
        else:
            with pytest.raises(NotFound):
                await self.world.node(path)

    def doing(self, *paths: str) -> Doing:
        return Doing(self.model, paths)

    async def agree(self) -> None:
        """Mount, store and model hold the same."""
        with trio.fail_after(3600):
            await self.world.settle()
        await trio.sleep(QUIET_SECONDS)
        stored = {str(key).removeprefix(PREFIX): found.data for key, found in self.store.objects.items()}
        assert {path: data for path, data in stored.items() if not path.endswith("/")} == self.model.files
        for folder in FOLDERS:
            with suppress(NotFound):
                node = await self.world.node(folder)
                names = {name for name in await self.world.names(node.ino) if f"{folder}/{name}" not in FOLDERS}
                assert names == self.model.names(folder), sorted(names ^ self.model.names(folder))[:9]
        for path in self.random.sample(sorted(self.model.files), min(60, len(self.model.files))):
            await self.check(path)
        assert not len(self.world.changes.gone)
        assert not self.world.inodes.questions._open


class Doing:
    def __init__(self, model: Model, paths: tuple[str, ...]) -> None:
        self._model, self._paths = model, paths

    def __enter__(self) -> None:
        self._model.busy.update(self._paths)

    def __exit__(self, *_: object) -> None:
        self._model.busy.difference_update(self._paths)


@pytest.mark.slow
@pytest.mark.parametrize("events", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
async def test_what_was_done_here_is_never_undone_by_an_answer(
    tmp_path: Path, autojump_clock: MockClock, seed: int, events: bool
) -> None:
    random = Random(f"{seed} {events}")
    model = Model(random)
    store = HabitStore(PAGE, seed=seed, lists_metadata=random.random() < 0.8)
    store.has_events = events
    for folder in FOLDERS:
        for number in range(NAMES[folder]):
            for kind in "mo":
                if random.random() < 0.8:
                    path = f"{folder}/{kind}{number:04}"
                    store.seed(PREFIX + path, data := path.encode())
                    model.set(path, data)
    for life in range(LIVES):
        world = made(store, tmp_path)
        recovery = Recovery(world.journal, world.area, world.inodes, world.defaults.directory)
        world.changes.recover(recovery.nodes())
        assert recovery.saved == []
        async with trio.open_nursery() as services:
            services.start_soon(store.tell_late)
            if events:
                services.start_soon(world.events.run)
            async with running(world):
                run = Run(world, store, model, random)
                with trio.move_on_after(random.uniform(20, 200) if life + 1 < LIVES else 100_000):
                    async with trio.open_nursery() as programs:
                        for program in (run.program, run.program, run.other, run.reader, run.reader):
                            programs.start_soon(program)
                await trio.lowlevel.checkpoint()
                if life + 1 == LIVES:
                    await run.agree()
                    assert run.listed
            services.cancel_scope.cancel()
        store.cut_events()
        model.busy.clear()
        world.journal.close()
        with suppress(PhfsError):
            world.kernel.close()

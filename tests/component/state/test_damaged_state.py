"""The files of the local state are cut or changed anywhere: no byte that was answered goes without being placed,
saved aside or refused by name."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from phfs_fuse.errors import LocalStateError
from phfs_fuse.pending.recovery import Recovery
from phfs_fuse.tree.kernel_log import KernelLog
from tests.support.fake_store import FakeStore
from tests.support.world import World, made

Damage = Callable[[Path, random.Random], None]
TIMES = 25
FILES = {f"file-{number}": b"<bytes of file %d>" % number * 300 for number in range(8)}


def copied(directory: Path, to: Path) -> Path:
    shutil.rmtree(to, ignore_errors=True)
    return Path(shutil.copytree(directory, to))


@pytest.fixture
async def left(tmp_path: Path) -> Path:
    """The state that a dead process left: some files on the way, in the database and in its log."""
    store = FakeStore()
    world = made(store, tmp_path / "first")
    for number, (name, data) in enumerate(FILES.items()):
        await world.write(name, data)
        if number == 4:
            world.journal.checkpoint()
    left = copied(tmp_path / "first", tmp_path / "left")
    world.kernel.close()
    world.area.close()
    world.journal.close()
    return left


def cut(path: Path, chance: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: chance.randrange(len(data))])


def flip(path: Path, chance: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def recovered(directory: Path) -> set[bytes]:
    """All contents that can be found after the next start."""
    world = made(FakeStore(), directory)
    try:
        recovery = Recovery(world.journal, world.area, world.inodes, world.defaults.directory)
        placed = [node for node, _ in recovery.nodes() if node.staged is not None]
        found = {path.read_bytes() for layer in placed if layer.staged for path in [layer.staged.top.path]}
        return found | {path.read_bytes() for path in recovery.saved if path.exists()}
    finally:
        close(world)


def close(world: World) -> None:
    world.kernel.close()
    world.area.close()
    world.journal.close()


@pytest.mark.parametrize("damage", [cut, flip])
@pytest.mark.parametrize("name", ["journal.db", "journal.db-wal"])
async def test_a_damaged_journal(left: Path, tmp_path: Path, name: str, damage: Damage) -> None:
    assert (left / name).stat().st_size
    refused = 0
    for seed in range(TIMES):
        state = copied(left, tmp_path / "state")
        damage(state / name, random.Random(seed))
        try:
            found = recovered(state)
        except LocalStateError:  # of a newer format or another volume, as far as one can tell
            refused += 1
            found = {path.read_bytes() for path in (state / "staging").glob("*.data")}
        missing = set(FILES.values()) - found
        assert not missing, f"seed {seed}: {len(missing)} files"
    assert refused < TIMES / 4


@pytest.mark.parametrize("damage", [cut, flip])
async def test_a_damaged_log_of_what_the_kernel_knows(left: Path, tmp_path: Path, damage: Damage) -> None:
    """What is before the damage counts."""
    world = made(FakeStore(), tmp_path / "other")
    try:
        whole = KernelLog(left / "kernel.log", world.inodes).load()
        for seed in range(TIMES):
            state = copied(left, tmp_path / "state")
            damage(state / "kernel.log", random.Random(seed))
            try:
                known = KernelLog(state / "kernel.log", world.inodes).load()
            except LocalStateError:
                continue  # its head
            assert known.nodes.keys() <= whole.nodes.keys()
    finally:
        close(world)
    await trio.lowlevel.checkpoint()


@pytest.fixture
async def layered(tmp_path: Path) -> tuple[Path, list[bytes]]:
    """A layer over stored bytes, after each of whose writes the log was as long as `sizes` says."""
    world = made(FakeStore(), tmp_path / "first")
    layer = world.area.new(seen=1000, size=1000)
    states = []
    for number in range(10):
        layer.write(number * 50, b"%d" % number * 20)
        states.append(layer.path.with_suffix(".ext").read_bytes())
    close(world)
    await trio.lowlevel.checkpoint()
    return tmp_path / "first", states


async def test_a_torn_log_of_a_layer(layered: tuple[Path, list[bytes]], tmp_path: Path) -> None:
    """Cut anywhere, just the whole records count."""
    first, states = layered
    for size in range(len(states[-1]) + 1):
        state = copied(first, tmp_path / "state")
        (path,) = (state / "staging").glob("*.ext")
        path.write_bytes(states[-1][:size])
        world = made(FakeStore(), state)
        layer = world.area.reopen(int(path.stem), 1000)
        whole = sum(size >= len(known) for known in states)
        assert layer.extents.total_bytes == 20 * whole, size
        close(world)

"""The node's limits among its volumes, and what volumes leave in the cache."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from phfs_csi.config import NodeConfig
from phfs_csi.node.caches import keep_within, left_behind
from phfs_csi.node.records import Records, VolumeRecord
from phfs_csi.node.shares import SHARE_BYTES_MIN, Share, Shares
from phfs_fuse.types import GIB, MIB


@pytest.fixture
def config(tmp_path: Path) -> NodeConfig:
    return NodeConfig(
        node_id="n",
        state_dir=tmp_path / "state",
        cache_dir=tmp_path / "cache",
        cache_bytes_max=12 * GIB,
        dirty_bytes_max=6 * GIB,
    )


@pytest.fixture
def records(config: NodeConfig) -> Records:
    return Records(config.state_dir)


def volume(name: str, **more: object) -> VolumeRecord:
    return VolumeRecord(volume_id=name, source="s3://b/", path=Path("/") / name, **more)  # type: ignore[arg-type]


def fill(path: Path, bytes_: int, used_at: float) -> None:
    path.mkdir(parents=True)
    (path / "blocks").write_bytes(os.urandom(bytes_))
    os.utime(path, (used_at, used_at))


def test_each_has_the_same(config: NodeConfig, records: Records) -> None:
    shares = Shares(config, records)
    for count, name in enumerate("abc", 1):
        records.save(volume(name))
        assert shares.of(volume("a")) == Share(12 * GIB // count, 6 * GIB // count)
    records.save(volume("c", is_ended=True))  # its uploads go on, it takes no more
    assert shares.of(volume("a")) == Share(6 * GIB, 3 * GIB)


def test_a_volume_may_want_less(config: NodeConfig, records: Records) -> None:
    records.save(volume("a", cache_bytes_max=GIB))
    assert Shares(config, records).of(volume("a", cache_bytes_max=GIB)) == Share(GIB, 6 * GIB)


def test_nobody_gets_less_than_it_needs(config: NodeConfig, records: Records) -> None:
    for number in range(1000):
        records.save(volume(f"v{number}"))
    assert Shares(config, records).of(volume("v1")) == Share(SHARE_BYTES_MIN, SHARE_BYTES_MIN)


def test_what_is_left_behind_counts_as_one_volume(config: NodeConfig, records: Records) -> None:
    records.save(volume("a"))
    fill(config.cache_dir / volume("a").key, 1, 1)
    assert Shares(config, records).of(volume("a")).cache_bytes == 12 * GIB
    for name in ("gone-1", "gone-2"):
        fill(config.cache_dir / name, 1, 1)
    assert Shares(config, records).of(volume("a")).cache_bytes == 6 * GIB


def test_the_oldest_goes_first(tmp_path: Path) -> None:
    for number, name in enumerate(("oldest", "old", "new", "mounted")):
        fill(tmp_path / name, MIB, 1000.0 + number)
    found = left_behind(tmp_path, {"mounted"})
    assert [path.name for path in found] == ["new", "old", "oldest"]
    keep_within(found, 2 * MIB + MIB // 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mounted", "new", "old"]
    keep_within(left_behind(tmp_path, {"mounted"}), 0)
    assert [path.name for path in tmp_path.iterdir()] == ["mounted"]


def test_no_cache_yet(tmp_path: Path) -> None:
    assert left_behind(tmp_path / "none", set()) == []

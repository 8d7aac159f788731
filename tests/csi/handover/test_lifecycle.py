"""Who serves when there are two: what a plugin says of itself meanwhile."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from phfs_csi.config import NodeConfig
from phfs_csi.handover.lifecycle import Lifecycle
from phfs_csi.node.forkserver_client import ForkServer
from phfs_csi.node.upkeep import Upkeep


class FakeUpkeep:
    is_settled = True

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def release(self) -> list[str]:
        return ["vol"]


class FakeSpawner:
    def start(self) -> None: ...

    def stop(self) -> None: ...


class FakeDoor:
    is_open = True

    def close_door(self) -> None:
        self.is_open = False

    def open_door(self) -> None:
        self.is_open = True


def test_a_plugin_that_lets_go_was_succeeded_until_it_goes_on(tmp_path: Path) -> None:
    config = NodeConfig(node_id="n", state_dir=tmp_path)
    door = FakeDoor()
    life = Lifecycle(config, cast("Upkeep", FakeUpkeep()), cast("ForkServer", FakeSpawner()))
    assert life.start(door)
    assert (life.ready(), life.is_succeeded) == ("", False)
    assert life.let_go() == ["vol"]
    assert life.ready() != ""
    assert (life.is_succeeded, door.is_open) == (True, False)
    life.go_on()
    assert (life.ready(), life.is_succeeded, door.is_open) == ("", False, True)
    life.stop()

"""What dies and what goes on: programs in the mounts see a pause, or, where nothing holds the mounts, new ones."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from phfs_fuse.host.mount_table import mount_table
from tests.csi.node.test_mounts import eventually
from tests.csi.plugin import Holder, Plugin, Volume, a_plugin, children, mounts_below, sh
from tests.support.mounts import s3_client, shared_server

pytestmark = [pytest.mark.fuse, pytest.mark.minio]

SECONDS = 120.0
WRITER = """if True:
    import os, sys
    root, stop = sys.argv[1:]
    number = 0
    with open(f"{root}/log", "ab", buffering=0) as log:
        while not os.path.exists(stop):
            number += 1
            log.write(b"%07d\\n" % number)
            with open(f"{root}/new", "wb") as file:
                file.write(b"%d" % number)
            os.rename(f"{root}/new", f"{root}/file-{number % 20}")
    print(number)
"""
READER = """if True:
    import os, sys
    root, stop = sys.argv[1:]
    number = 0
    with open(f"{root}/big", "rb", buffering=0) as big:
        while not os.path.exists(stop):
            number += 1
            big.seek(number * 8192 % 1_000_000)
            assert big.read(8192) == b"x" * 8192
            assert "big" in os.listdir(root)
    print(number)
"""


@pytest.fixture
def bucket() -> str:
    name = f"csi-{time.monotonic_ns()}"
    s3_client(shared_server()).create_bucket(Bucket=name)
    return name


class Held:
    """A plugin with a holder, as in a pod; more of both may come."""

    def __init__(self, plugin: Plugin, holder: Holder) -> None:
        self.plugin = plugin
        self.holders = [holder]
        self.plugins: list[subprocess.Popen[bytes]] = []

    def next_holder(self) -> None:
        first = self.holders[0]
        before = os.stat(first.path).st_ino
        self.holders.append(Holder(first.path, first.log))
        eventually(lambda: os.stat(first.path).st_ino != before)

    def next_plugin(self, pod_uid: str) -> None:
        assert self.plugin.process is not None
        self.plugins.append(self.plugin.process)
        self.plugin.start(f"--pod-uid={pod_uid}")


@pytest.fixture
def held(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Held]:
    with a_held_plugin(tmp_path_factory.mktemp("holder")) as found:
        yield found


@contextmanager
def a_held_plugin(root: Path) -> Iterator[Held]:
    holder = Holder(root / "h.sock", root / "holder.log")
    try:
        eventually(lambda: holder.path.exists())
        with a_plugin(
            f"--holder-socket={holder.path}", f"--handover-socket={root}/p.sock", "--pod-uid=first"
        ) as plugin:
            found = Held(plugin, holder)
            yield found
            for process in found.plugins:
                process.terminate()
                process.wait(SECONDS)
    finally:
        for one in found.holders if "found" in locals() else [holder]:
            one.kill()


@contextmanager
def load(volume: Volume, target: Path, tmp_path: Path) -> Iterator[None]:
    """A writer and a reader that must see no error, and nothing of what was written may be missing."""
    sh('head -c 1100000 /dev/zero | tr "\\0" x > "$1/big"; sync -f "$1"', target)
    stop = tmp_path / "stop"
    programs = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(target), str(stop)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for code in (WRITER, READER)
    ]
    try:
        time.sleep(1)
        yield
        time.sleep(1)
    finally:
        stop.touch()
        done = [program.communicate(timeout=SECONDS) for program in programs]
    assert [(program.returncode, found[1]) for program, found in zip(programs, done, strict=True)] == [(0, "")] * 2
    written = int(done[0][0])
    sh('sync -f "$1"', target)
    sh('sync "$1/log"', target)
    assert volume.object("log") == b"".join(b"%07d\n" % number for number in range(1, written + 1))


def published(plugin: Plugin, bucket: str, name: str = "vol") -> tuple[Volume, Path]:
    volume = Volume(plugin, bucket, name)
    volume.stage()
    return volume, volume.publish()


# --- with a holder


@pytest.mark.parametrize("who", ["worker", "plugin", "container", "holder"])
def test_programs_see_a_pause(held: Held, bucket: str, tmp_path: Path, who: str) -> None:
    plugin = held.plugin
    volume, target = published(plugin, bucket)
    with load(volume, target, tmp_path):
        for _ in range(2):
            if who == "worker":
                kill_worker(plugin)
            elif who == "holder":
                held.holders[0].kill()
                held.holders[0].restart()
            elif who == "plugin":
                plugin.kill()
                plugin.start()
            else:
                plugin.kill_container()
                plugin.start()
            sh('ls "$1"', target)
    volume.unpublish()
    volume.unstage()
    assert mounts_below(plugin.root) == []


def test_the_end_of_the_container_by_a_signal(held: Held, bucket: str, tmp_path: Path) -> None:
    """SIGTERM: what is in work is answered, and the next plugin goes on."""
    volume, target = published(held.plugin, bucket)
    with load(volume, target, tmp_path):
        held.plugin.stop()
        assert held.plugin.keepers() == []
        held.plugin.start()
    volume.unpublish()
    volume.unstage()


def test_the_holder_may_die_before_the_plugin(held: Held, bucket: str, tmp_path: Path) -> None:
    """The keepers give a new holder what the dead one had."""
    volume, target = published(held.plugin, bucket)
    with load(volume, target, tmp_path):
        held.holders[0].kill()
        held.holders[0].restart()
        eventually(lambda: held.holders[0].log.read_text().count("holds name=") == 2)
        held.plugin.kill_container()
        held.plugin.start()
    volume.unpublish()
    volume.unstage()


@pytest.mark.parametrize("call", ["stage", "publish", "unpublish"])
@pytest.mark.parametrize("who", ["worker", "plugin", "container", "holder"])
def test_a_crash_between_two_calls(held: Held, bucket: str, call: str, who: str) -> None:
    plugin = held.plugin
    volume = Volume(plugin, bucket)

    def crash() -> None:
        if who == "worker":
            kill_worker(plugin)
        elif who == "holder":
            held.holders[0].kill()
            held.holders[0].restart()
        else:
            (plugin.kill if who == "plugin" else plugin.kill_container)()
            plugin.start()

    volume.stage()
    if call == "stage":
        crash()
    target = volume.publish()
    if call == "publish":
        crash()
    sh('echo hello > "$1/file"', target)
    volume.unpublish()
    if call == "unpublish":
        crash()
    volume.unstage()
    assert volume.object("file") == b"hello\n"
    assert mounts_below(plugin.root) == []
    assert plugin.keepers() == []


# --- an upgrade


def test_a_hand_over_under_load(held: Held, bucket: str, tmp_path: Path) -> None:
    plugin = held.plugin
    volume, target = published(plugin, bucket)
    with load(volume, target, tmp_path):
        for number in range(2):
            held.next_holder()
            held.next_plugin(f"next-{number}")
            time.sleep(0.5)
    assert plugin.log().count("handed over") == 2
    for process in held.plugins:  # idle: nothing of theirs is left to end
        process.terminate()
        process.wait(SECONDS)
    assert sh('cat "$1/big" | wc -c', target).strip() == "1100000"
    volume.unpublish()
    volume.unstage()
    assert mounts_below(plugin.root) == []


def test_a_successor_that_dies_while_taking_over(held: Held, bucket: str, tmp_path: Path) -> None:
    """The plugin before goes on: asked by hand, as a successor does that then crashes."""
    plugin = held.plugin
    volume, target = published(plugin, bucket)
    code = """if True:
        import os, sys
        from pathlib import Path
        from phfs_csi.handover.handover import ask
        print(ask(Path(sys.argv[1]), "crashing").released, flush=True)
        os.kill(os.getpid(), 9)
    """
    (flag,) = [flag for flag in plugin.flags if flag.startswith("--handover-socket=")]
    with load(volume, target, tmp_path):
        done = subprocess.run(
            [sys.executable, "-c", code, flag.partition("=")[2]], capture_output=True, text=True, timeout=SECONDS
        )
        assert done.stdout == "['vol']\n", done.stderr
        eventually(plugin.is_ready)
    volume.unpublish()
    volume.unstage()


# --- without a holder


def test_mounts_are_made_again_where_nothing_was_left(bucket: str) -> None:
    """As after a reset of the node, where pods see the new mounts by propagation."""
    with a_plugin() as plugin:
        volume, target = published(plugin, bucket)
        other = volume.publish("other", readonly=True)
        sh('echo hello > "$1/file"; sync "$1/file"', target)
        plugin.kill_container()
        assert str(target) in mount_table()  # dead
        plugin.start()
        for path in (target, other):
            eventually(lambda path=path: _reads(path / "file"), plugin.log)  # type: ignore[misc]
        assert "Read-only" in sh('touch "$1/x" 2>&1 || true', other)
        assert sum(path == str(target) for path in mount_table()) == 1
        volume.unpublish()
        volume.unpublish("other")
        volume.unstage()
        assert mounts_below(plugin.root) == []


def test_a_dead_target_is_published_again(bucket: str) -> None:
    """What a kubelet does that was restarted: publish onto targets whose server is gone."""
    with a_plugin() as plugin:
        volume, target = published(plugin, bucket)
        sh('echo hello > "$1/file"; sync "$1/file"', target)
        keepers = plugin.keepers()
        workers = [worker for pid in keepers for worker in children(pid)]
        for pid in keepers:
            os.kill(pid, signal.SIGKILL)
        eventually(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers))  # they serve for a moment
        eventually(lambda: plugin.code("NodePublishVolume", volume.publish_request()) == "OK", plugin.log)
        eventually(lambda: _reads(target / "file"))
        volume.publish("new")
        assert sh('cat "$1/file"', volume.target("new")) == "hello\n"


def test_what_was_closed_survives_the_end_of_all(bucket: str) -> None:
    with a_plugin() as plugin:
        volume, target = published(plugin, bucket)
        sh('for n in $(seq 50); do echo $n > "$1/f$n"; done', target)
        plugin.kill_container()
        plugin.start()
        eventually(lambda: _reads(target / "f50"), plugin.log)
        volume.unpublish()
        volume.unstage()
        assert [volume.object(f"f{n}") for n in range(1, 51)] == [b"%d\n" % n for n in range(1, 51)]


def test_a_plugin_alone_may_be_replaced_under_its_mounts(bucket: str, tmp_path: Path) -> None:
    """Without a holder the processes of the mounts go on, and the next plugin finds them."""
    with a_plugin() as plugin:
        volume, target = published(plugin, bucket)
        keepers = plugin.keepers()
        with load(volume, target, tmp_path):
            plugin.stop()
            plugin.start()
        assert plugin.keepers() == keepers
        volume.unpublish()
        volume.unstage()


@pytest.mark.slow
def test_fifty_volumes(held: Held, bucket: str) -> None:
    plugin = held.plugin
    volumes = [Volume(plugin, bucket, f"v{number}") for number in range(50)]
    for volume in volumes:
        volume.stage()
        sh('echo "$2" > "$1/file"', volume.publish(), volume.name)
    plugin.kill_container()
    plugin.start()
    for volume in volumes:
        assert sh('cat "$1/file"', volume.target("pod-1")) == f"{volume.name}\n"
    for volume in volumes:
        volume.unpublish()
        volume.unstage()
    assert mounts_below(plugin.root) == []
    assert [volume.object("file").decode() for volume in volumes] == [f"{volume.name}\n" for volume in volumes]


def kill_worker(plugin: Plugin) -> None:
    for keeper in plugin.keepers():
        for pid in children(keeper):
            os.kill(pid, signal.SIGKILL)


def _reads(path: Path) -> bool:
    done = subprocess.run(["cat", str(path)], capture_output=True, timeout=60)
    return done.returncode == 0

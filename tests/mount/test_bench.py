"""`phfs bench` for real and small: phfs and rclone on a real store; the relay in front of one."""

from __future__ import annotations

import http.client
import http.server
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from phfs_fuse.bench import processes
from phfs_fuse.bench.loads import Load
from phfs_fuse.bench.sizes import SIZES
from phfs_fuse.bench.store import Store
from phfs_fuse.bench.systems import System, Target
from phfs_fuse.bench.trial import Sources, Trial
from phfs_fuse.host.mount_table import mount_table
from tests.support.mounts import s3_client
from tests.support.servers import Server, real_store

SECONDS = 300
BUCKET = "benched"
needs_fuse = pytest.mark.skipif(not os.path.exists("/dev/fuse"), reason="no /dev/fuse")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with real_store() as found, closing(s3_client(found)) as client:
        client.create_bucket(Bucket=BUCKET)
        yield found


@pytest.fixture
def work() -> Iterator[Path]:
    """With a short path: sockets lie below it."""
    with tempfile.TemporaryDirectory(prefix="phfs-b-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def command(server: Server, work: Path, *flags: str) -> tuple[Sequence[str], dict[str, str]]:
    where = ("--endpoint-url", server.endpoint_url, "--bucket", BUCKET, "--work-dir", str(work))
    line = [sys.executable, "-m", "phfs_fuse", "bench", "--size", "small", "--reps", "1", *where, *flags]
    kept = {name: os.environ[name] for name in os.environ if not name.startswith(("PHFS_", "AWS_"))}
    return line, {**kept, **server.env}


def keys(server: Server) -> list[str]:
    with closing(s3_client(server)) as client:
        return [entry["Key"] for entry in client.list_objects_v2(Bucket=BUCKET).get("Contents", ())]


def require_nothing_left(server: Server, work: Path) -> None:
    assert keys(server) == []
    assert not any(place.startswith(str(work)) for place in mount_table())
    assert list(work.iterdir()) == []


@pytest.mark.fuse
@pytest.mark.slow
@needs_fuse
def test_a_small_run_on_phfs_and_rclone(server: Server, work: Path, tmp_path: Path) -> None:
    figures, chart = tmp_path / "out.json", tmp_path / "out.png"
    flags = ("--only", "write,list", "--against", "rclone,goofys")
    line, environ = command(server, work, *flags, "--json", str(figures), "--plot", str(chart))
    done = subprocess.run(line, env=environ, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    assert "left out: goofys" in done.stderr
    assert "write 32 MiB in 1 MiB writes, to close" in done.stdout
    assert server.secret_key not in done.stdout + done.stderr + figures.read_text()

    found = json.loads(figures.read_text())
    assert found["systems"] == ["phfs", "rclone"]
    assert found["failures"] == []
    seen = {(sample["measure"], sample["system"]) for sample in found["samples"]}
    measures = ("write", "write-stored", "list-cold", "list-again")
    assert seen == {(m, s) for m in measures for s in ("phfs", "rclone")} | {("write-stored", "reference")}
    assert all(sample["seconds"] > 0 for sample in found["samples"])
    assert all(cost["pss_bytes"] > 1 << 20 for cost in found["costs"])
    sent = {(one["workload"], one["system"]): one["up_bytes"] for one in found["traffic"]}
    assert 32 << 20 <= sent["write", "phfs"] < 34 << 20
    assert 32 << 20 <= sent["write", "rclone"] < 34 << 20
    assert {"cpu", "kernel"} <= found["machine"].keys()
    assert chart.read_bytes().startswith(b"\x89PNG")
    require_nothing_left(server, work)


@pytest.mark.fuse
@pytest.mark.slow
@needs_fuse
def test_an_interrupted_run_leaves_nothing(server: Server, work: Path) -> None:
    line, environ = command(server, work, "--only", "write", "--against", "rclone", "--no-counts")
    with subprocess.Popen(line, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        deadline = time.monotonic() + SECONDS
        while not any(place.startswith(str(work)) for place in mount_table()):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)  # there is no event for a mount of another process
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    require_nothing_left(server, work)


def test_directories_that_are_mounted_already(tmp_path: Path) -> None:
    for name in ("a", "b", "work"):
        (tmp_path / name).mkdir()
    dirs = f"a={tmp_path / 'a'},b={tmp_path / 'b'}"
    flags = ("--size", "small", "--reps", "1", "--work-dir", str(tmp_path / "work"), "--json", str(tmp_path / "json"))
    line = [sys.executable, "-m", "phfs_fuse", "bench", "--dirs", dirs, *flags]
    done = subprocess.run(line, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "json").read_text())
    seen = {sample["measure"] for sample in found["samples"] if sample["system"] == "b"}
    assert {"write", "read-cold", "list-again", "git-clone", "pip-install", "remove", "parallel-cold"} <= seen
    assert not any(measure.endswith("-stored") for measure in seen)
    assert all(list((tmp_path / name).iterdir()) == [] for name in ("a", "b", "work"))


@pytest.mark.parametrize(
    ("flags", "line", "code"),
    [
        (("--bucket", "no-such-bucket"), "phfs: s3://no-such-bucket: there is no such bucket; make it first\n", 3),
        (("--only", "nap"), "phfs: --only: 'nap' is no workload; phfs bench --list shows them\n", 2),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    server: Server, tmp_path: Path, flags: tuple[str, ...], line: str, code: int
) -> None:
    done_line, environ = command(server, tmp_path, *flags)
    done = subprocess.run(done_line, env=environ, capture_output=True, text=True, timeout=SECONDS)
    assert (done.returncode, done.stderr, done.stdout) == (code, line, "")


# --- the relay


class _Echo(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def echo() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Echo) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{found.server_address[1]}"
        found.shutdown()


def test_the_relay_delays_and_counts_and_changes_nothing() -> None:
    body = os.urandom(20 << 20)
    with echo() as url, processes.relay(url, 0.02) as relay:
        connection = http.client.HTTPConnection(relay.endpoint_url.removeprefix("http://"), timeout=60)
        with closing(connection):
            for sent in (body, b"small"):
                began = time.monotonic()
                connection.request("PUT", "/x", sent)
                assert connection.getresponse().read() == sent
                assert time.monotonic() - began >= 0.02  # never less than a longer line would take
        counts = relay.counts()
    assert counts["PUT"] == 2
    assert counts["up_bytes"] > len(body)
    assert counts["down_bytes"] > len(body)


# --- what goes wrong is said, and the run goes on


class Broken(System):
    name = "broken"

    def command(self, target: Target) -> list[str]:
        return ["sh", "-c", "echo starting; echo no such device; exit 3"]


def test_a_mount_that_does_not_start_has_failed_with_its_last_words(tmp_path: Path) -> None:
    target = Target(
        endpoint_url=None,
        bucket="pail",
        prefix="p/",
        mountpoint=tmp_path / "mnt",
        work=tmp_path,
        credentials={},
        server="",
    )
    with (
        pytest.raises(processes.Failed, match="mount ended with 3: no such device"),
        processes.mounted(Broken(), target),
    ):
        pass


def test_an_action_that_takes_too_long_or_breaks_has_failed(tmp_path: Path) -> None:
    with processes.actor({}) as worker:
        with pytest.raises(processes.Failed, match=r"read: .*No such file"):
            worker.do("read", SECONDS, path=str(tmp_path / "none"))
        with pytest.raises(processes.Failed, match="false ended with 1"):
            worker.do("run", SECONDS, command=["false"], cwd="/")
        with pytest.raises(processes.Failed, match="no end after 0 s"):
            worker.do("run", 0.1, command=["sleep", "600"], cwd="/")


def test_a_file_with_other_bytes_has_failed(tmp_path: Path) -> None:
    load = Load(1, 5000)
    with processes.actor({}) as worker:
        trial = Trial(
            root=tmp_path,
            work=tmp_path,
            sizes=SIZES["small"],
            actor=worker,
            sources=Sources(tmp_path),
            store=None,
            prefix="",
            endpoint_url=None,
            timeout_seconds=SECONDS,
        )
        trial.do("write", path=trial.path("file"), load=load.dump(), unit=4096)
        trial.expect({"file": load})
        with (tmp_path / "file").open("r+b") as file:
            file.write(b"x" if load.range(0, 1) != b"x" else b"y")
        with pytest.raises(processes.Failed, match="the bytes of the files"):
            trial.expect({"file": load})


def test_the_store_notices_what_is_missing_wrong_or_too_much(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    store, loads = Store(server.endpoint_url, BUCKET), {"a": Load(1, 5000), "b": Load(2, 5000)}
    with closing(store.client):
        store.put("x/", loads)
        assert store.wrong("x/", loads) is None
        assert store.wrong("x/", {"a": loads["a"]}) == "1 objects too many in the store, such as b"
        assert store.wrong("x/", {**loads, "c": Load(3, 10)}) == "c is not in the store"
        assert store.wrong("x/", {**loads, "b": Load(2, 6000)}) == "b has 5000 bytes in the store, not 6000"
        assert store.wrong("x/", {**loads, "b": Load(3, 5000)}) == "b has other bytes in the store"
        store.clean("x/")
        assert store.list("x/") == {}

"""What programs on a mount see while its store fails, and that nothing is lost by it (P5).

MinIO behind a proxy that does what each test says. Programs run in processes of their own, with a time limit.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from phfs_fuse.types import MIB
from tests.mount.place import MountPlace, a_mount, saved, script
from tests.support.mounts import s3_client, shared_server
from tests.support.proxy import Answer, Forward, Proxy, Request, forward_all, proxy
from tests.support.servers import minio_binary

pytestmark = [pytest.mark.fuse, pytest.mark.minio]
DATA = random.Random(4).randbytes(3 * MIB + 5)
AWAY_SECONDS = int(os.environ.get("PHFS_AWAY_SECONDS", "6"))
EXPECTED = [
    r"upload of key=|delete of key=|failed: |: the store |the worker ended with SIGKILL|the keeper is gone",
]
Script = Callable[[Request], Answer | Forward]


SHOWN = """
import os, sys, time
end = time.monotonic() + 60
while not all(map(os.path.exists, sys.argv[1:])):
    assert time.monotonic() < end
    time.sleep(0.1)
"""


def body_of(name: str) -> bytes:
    last = name.rpartition("/")[2]
    return last.encode() if last in ("small", "moved", "removed") else DATA


@dataclass
class Behind:
    """A mount and the proxy before its store."""

    place: MountPlace
    front: Proxy

    @property
    def path(self) -> Path:
        return self.place.path

    def stored(self, name: str) -> bytes | None:
        mount = self.place.mount
        try:
            return bytes(mount.s3.get_object(Bucket=mount.bucket, Key=mount.prefix + name)["Body"].read())
        except mount.s3.exceptions.NoSuchKey:
            return None

    def put(self, *names: str) -> None:
        """Store objects as another client does, and wait until the mount shows them."""
        mount = self.place.mount
        for name in names:
            mount.s3.put_object(Bucket=mount.bucket, Key=mount.prefix + name, Body=body_of(name))
        script(SHOWN, *(self.path / name for name in names))

    @contextmanager
    def failing(self, how: Script) -> Iterator[None]:
        self.front.script = how
        try:
            yield
        finally:
            self.front.script = forward_all


@pytest.fixture(scope="module")
def behind() -> Iterator[Behind]:
    if minio_binary() is None:
        pytest.skip("no MinIO server: set PHFS_TEST_MINIO or run .ci/run, which installs one")
    server = shared_server()
    flags = ("--attr-ttl", "1s", "-o", "retry-max=1s,attempts=2,read-timeout=3s,connect-timeout=3s,fsync-timeout=6s")
    with (
        proxy(server.endpoint_url) as front,
        a_mount(*flags, server=replace(server, endpoint_url=front.endpoint_url)) as place,
    ):
        place.mount.expected += EXPECTED
        place.mount.s3.close()
        place.mount.s3 = s3_client(server)  # past the proxy
        yield Behind(place, front)


def refused(status: int, code: str) -> Script:
    body = f"<Error><Code>{code}</Code><Message>made to fail</Message></Error>".encode()
    return lambda _: Answer(status, {"Content-Type": "application/xml"}, body)


class Hang:
    """Says nothing until it is let go."""

    def __init__(self, when: Callable[[Request], bool] = lambda _: True) -> None:
        self.let_go = threading.Event()
        self.reached = threading.Event()
        self._when = when

    def __call__(self, request: Request) -> Answer | Forward:
        if self._when(request):
            self.reached.set()
            self.let_go.wait(60)
        return Forward()


def lost(_: Request) -> Forward:
    return Forward(lost=True)


# What a program does with a store that fails: each line tells how a call ended.
PROGRAM = """
import errno, json, os, sys
os.chdir(sys.argv[1])
held = [open(name, "rb") for name in os.listdir(".")]  # the kernel does not forget what is open
for file in held:
    file.name == "cold" or file.read()
held += [open(name, "w") for name in ("known-new", "waits")]
print("ready", flush=True)
sys.stdin.readline()
said = {}
def attempt(name, call):
    try:
        said[name] = call()
    except OSError as exc:
        said[name] = errno.errorcode[exc.errno]
def wait_for_store():
    with open("waits", "w") as file:
        file.write("waits")
        file.flush()
        os.fsync(file.fileno())
attempt("cached", lambda: len(open("known", "rb").read()))
attempt("cold", lambda: len(open("cold", "rb").read()))
attempt("write", lambda: open("known-new", "w").write("new"))
attempt("change", lambda: open("small", "r+").write("S"))
attempt("rename", lambda: os.rename("moved", "known-moved"))
attempt("unlink", lambda: os.unlink("removed"))
attempt("fsync", wait_for_store)
print(json.dumps(said))
"""
FAILURES = {
    "internal error": (refused(500, "InternalError"), "ETIMEDOUT", "EIO"),
    "slow down": (refused(503, "SlowDown"), "ETIMEDOUT", "EIO"),
    "unknown key": (refused(403, "InvalidAccessKeyId"), "EACCES", "EACCES"),
    "no such bucket": (refused(404, "NoSuchBucket"), "ETIMEDOUT", "EIO"),
    "connection reset": (lost, "ETIMEDOUT", "EIO"),
    "silence": (None, "ETIMEDOUT", "ETIMEDOUT"),
}


@pytest.mark.parametrize("how", FAILURES)
def test_what_is_known_goes_on_and_all_is_stored_afterwards(behind: Behind, how: str) -> None:
    failure, fsync_says, cold_says = FAILURES[how]
    folder = how.replace(" ", "-")
    behind.put(*(f"{folder}/{name}" for name in ("cold", "known", "small", "moved", "removed")))
    hang = Hang()
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, behind.path / folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == "ready\n"
        with behind.failing(failure or hang):
            said = json.loads(program.communicate("go on\n", timeout=120)[0])
    hang.let_go.set()
    assert (said.pop("cold"), said.pop("fsync")) == (cold_says, fsync_says)
    assert said == {"cached": len(DATA), "write": 3, "change": 1, "rename": None, "unlink": None}
    behind.place.sync()
    found = {name: behind.stored(f"{folder}/{name}") for name in ("known-new", "small", "known-moved", "waits")}
    assert found == {"known-new": b"new", "small": b"Small", "known-moved": b"moved", "waits": b"waits"}
    assert [behind.stored(f"{folder}/{name}") for name in ("moved", "removed")] == [None, None]
    digest = 'import hashlib, sys; print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest())'
    assert script(digest, behind.path / folder / "cold").strip() == hashlib.sha256(DATA).hexdigest()


# The same changes below the mount and in a local folder, of few names, so that most are of one that was made, moved
# or removed before. Prints how many of each there were, and how many the mount could not do for want of the store.
CHANGES = """
import collections, errno, json, os, random, sys, time
roots, rounds, rng = sys.argv[1:3], int(sys.argv[3]), random.Random(int(sys.argv[4]))
names = ["a", "b", "d", "e", "d/a", "d/b", "e/a", "d/d", "d/d/a", "e/d"]
done = collections.Counter()
def write(root, name, text):
    with open(f"{root}/{name}", "w") as file:
        file.write(text)
calls = {
    "write": lambda root, one, other, text: write(root, one, text),
    "rename": lambda root, one, other, text: os.rename(f"{root}/{one}", f"{root}/{other}"),
    "unlink": lambda root, one, other, text: os.unlink(f"{root}/{one}"),
    "mkdir": lambda root, one, other, text: os.mkdir(f"{root}/{one}"),
    "rmdir": lambda root, one, other, text: os.rmdir(f"{root}/{one}"),
}
def outcome(call, *arguments):
    try:
        call(*arguments)
        return "done"
    except OSError as exc:
        return errno.errorcode[exc.errno]
for folder, _, _ in os.walk(roots[0]):
    pass
print("ready", flush=True)
sys.stdin.readline()
for _ in range(rounds):
    for _ in range(30):
        op = rng.choice(["write", "write", "write", "rename", "rename", "unlink", "mkdir", "rmdir"])
        one, other = rng.choices(names, k=2)
        arguments = one, other, f"{op} {sum(done.values())}"
        said = outcome(calls[op], roots[0], *arguments)
        if said == "EIO":
            done["refused"] += 1
            continue
        wanted = outcome(calls[op], roots[1], *arguments)
        assert said == wanted, (op, one, other, said, wanted)
        done[op if said == "done" else "fails"] += 1
    time.sleep(1)  # longer than the quiet time: what there is is tried
print(json.dumps(done))
"""


@pytest.mark.parametrize("seed", [1, 2])
def test_names_that_changed_again_and_again_while_the_store_was_away(
    behind: Behind, tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """When it is back it gets the last state of each name and nothing else, whatever the order of the changes."""
    folder, local = f"away-{seed}", tmp_path / "local"
    for name in ["a", "d/a", "d/d/a", "e/a"]:
        behind.put(f"{folder}/{name}")
        (local / name).parent.mkdir(parents=True, exist_ok=True)
        (local / name).write_bytes(body_of(name))
    with subprocess.Popen(
        [sys.executable, "-c", CHANGES, behind.path / folder, local, str(AWAY_SECONDS), str(seed)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == "ready\n"
        with behind.failing(refused(503, "SlowDown")):
            said = json.loads(program.communicate("go on\n", timeout=3 * AWAY_SECONDS + 120)[0])
    assert program.returncode == 0
    behind.place.sync()
    with capsys.disabled():
        print(f"\naway for {AWAY_SECONDS} s: {said}")
    stored = saved(behind.place, behind.path / folder, tmp_path / "stored")
    assert contents(stored) == contents(local)
    assert min(said[op] for op in ("write", "rename", "unlink", "mkdir", "rmdir")) > 0


def contents(root: Path) -> dict[str, bytes | None]:
    """Files with their bytes, and folders."""
    return {str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in root.rglob("*")}


@pytest.mark.parametrize("cut", [0, 1, 70_000])
def test_bodies_that_end_early_are_never_served(behind: Behind, cut: int) -> None:
    """While every answer is cut a read fails, or gets the right bytes in the end; nothing else stays in the cache."""
    name = f"cut-{cut}"
    behind.put(name)
    digest = """if True:
        import hashlib, sys
        try:
            print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest())
        except OSError:
            print("failed")
    """
    right = hashlib.sha256(DATA).hexdigest()
    with behind.failing(lambda request: Forward(cut=cut) if f"/{name}" in request.path else Forward()):
        said = script(digest, behind.path / name, seconds=60).strip()
        assert said == "failed" if cut < 2 else said in ("failed", right)
    cuts = iter([cut])

    def once(request: Request) -> Forward:
        return Forward(cut=next(cuts, None) if request.method == "GET" and f"/{name}" in request.path else None)

    with behind.failing(once):
        assert script(digest, behind.path / name).strip() == right


def test_one_request_that_hangs_holds_up_nobody_else(behind: Behind) -> None:
    behind.put("hang/stuck", "hang/other")
    hang = Hang(lambda request: request.method == "GET" and "hang/stuck" in request.path)
    size = "import sys; print(len(open(sys.argv[1], 'rb').read()))"
    answers: list[str] = []
    with behind.failing(hang):
        reader = threading.Thread(
            target=lambda: answers.append(
                script(f"try:\n    {size}\nexcept OSError as exc: print(exc.errno)", behind.path / "hang/stuck")
            )
        )
        reader.start()
        assert hang.reached.wait(60)
        assert int(script(size, behind.path / "hang/other")) == len(DATA)
        script("import sys; open(sys.argv[1], 'w').write('written')", behind.path / "hang/new")
        behind.place.mount.sync("hang/new")
        assert behind.stored("hang/new") == b"written"
        reader.join(60)  # it has a deadline of its own
        hang.let_go.set()
    assert answers in ([f"{errno.ETIMEDOUT}\n"], [f"{len(DATA)}\n"])


def test_multipart_uploads_of_a_dead_worker_are_aborted_and_no_others(behind: Behind) -> None:
    mount = behind.place.mount
    theirs = mount.s3.create_multipart_upload(Bucket=mount.bucket, Key=f"{mount.prefix}theirs")["UploadId"]

    def uploads() -> set[str]:
        found = set()
        for name in ("theirs", "parts"):  # MinIO lists those of one whole key
            listed = mount.s3.list_multipart_uploads(Bucket=mount.bucket, Prefix=mount.prefix + name)
            found |= {row["UploadId"] for row in listed.get("Uploads", ())}
        return found

    hang = Hang(lambda request: request.method == "PUT" and "partNumber" in request.path)
    with behind.failing(hang):
        script(f"import sys; open(sys.argv[1], 'wb').write(b'x' * {20 * MIB})", behind.path / "parts")
        assert hang.reached.wait(60)
        (ours,) = uploads() - {theirs}
        mount.kill_worker()
        hang.let_go.set()
    behind.place.sync()
    for _ in range(300):
        if ours not in uploads():
            break
        threading.Event().wait(0.1)
    assert uploads() == {theirs}
    assert behind.stored("parts") == b"x" * (20 * MIB)
    mount.s3.abort_multipart_upload(Bucket=mount.bucket, Key=f"{mount.prefix}theirs", UploadId=theirs)

"""`phfs demo`: a store in memory with sample groups, mounted, to try things. State: the store, a directory.

Nothing here reads the mounts: that is left to other processes, since the store they need runs in this one.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from phfs_fuse.errors import MountpointError, StartupError, UsageError

BUCKET: Final = "primehub"
GROUPS: Final = ("research", "data-science")
MOUNT_SECONDS: Final = 60
STEP_SECONDS: Final = 30
DRAIN_SECONDS: Final = 60


@dataclass(frozen=True, slots=True)
class Sample:
    """An object as another program may have written it."""

    body: bytes
    mode: str = ""  # of the object metadata; "": none, as from the web console

    @property
    def metadata(self) -> Mapping[str, str]:
        return {"mode": self.mode, "mtime": "1735689600"} if self.mode else {}


def _notebook(*sources: str) -> Sample:
    cells: list[Mapping[str, object]] = [
        {"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": [], "source": [source]}
        for source in sources
    ]
    document = {
        "cells": cells,
        "metadata": {"language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return Sample(json.dumps(document, indent=1).encode())


_MEASURES = "".join(f"2025-01-{day:02},{20 + day % 7},{day * 3 % 11}\n" for day in range(1, 32))
SAMPLES: Final[Mapping[str, Sample]] = {
    "research/README.md": Sample(b"# research\nThe shared space of the group. Written by the web console.\n"),
    "research/notebooks/first.ipynb": _notebook("1 + 1", "import csv"),
    "research/notebooks/plots.ipynb": _notebook("rows = list(csv.reader(open('../data/latest.csv')))"),
    "research/data/measures-2025.csv": Sample(b"day,celsius,rain\n" + _MEASURES.encode()),
    "research/data/latest.csv": Sample(b"measures-2025.csv", "0120777"),  # a symlink
    "research/bin/hello.sh": Sample(b"#!/bin/sh\necho hello from an object\n", "0100755"),
    "research/models/": Sample(b""),  # an empty directory
    "data-science/train.ipynb": _notebook("print('training')"),
    "data-science/datasets/numbers.csv": Sample(
        b"n,square\n" + b"".join(b"%d,%d\n" % (n, n * n) for n in range(100))
    ),
}

# Run by sh in the mount of the first group; each has to succeed.
CHECKS: Final = (
    ("list what other programs wrote", "ls -l . && test -f notebooks/first.ipynb && test -d models"),
    ("read through a symlink", "grep -q 2025-01-31 data/latest.csv"),
    ("run a program", "bin/hello.sh"),
    (
        "write, append, rename",
        "echo one > draft && echo two >> draft && mv draft results.txt && cat results.txt",
    ),
    ("make and remove directories", "mkdir -p a/b/c && touch a/b/c/file && rm -r a && test ! -e a"),
)


def run(directory: Path | None, *, keep: bool, once: bool) -> int:
    """Mount the sample groups below `directory`; return after Ctrl-C or SIGTERM, with `once` after checks.

    `keep` leaves the directory behind; one that was named by the caller, or after an error, is always left.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.ExitStack() as stack:
        base = stack.enter_context(_workplace(directory, keep))
        url = stack.enter_context(_store())
        environ = _environ()
        _fill(url, environ)
        roots = [stack.enter_context(_mounted(base, group, url, environ)) for group in GROUPS]
        if once:
            _check(roots[0], url, environ)
        else:
            _invite(roots, url)
            with contextlib.suppress(KeyboardInterrupt):
                threading.Event().wait()
            print("\nunmounting")
    return 0


@contextlib.contextmanager
def _workplace(directory: Path | None, keep: bool) -> Iterator[Path]:
    base = Path(tempfile.mkdtemp(prefix="phfs-demo-")) if directory is None else directory.absolute()
    base.mkdir(parents=True, exist_ok=True)
    keep = keep or directory is not None
    try:
        yield base
        if not keep:
            shutil.rmtree(base)  # never reached when an unmount failed
    finally:
        if base.exists():
            print(f"left behind: {base}")


@contextlib.contextmanager
def _store() -> Iterator[str]:
    """The URL of an S3 store on the loopback address, which forgets everything at the end."""
    try:
        from moto.server import ThreadedMotoServer
    except ImportError as exc:
        raise UsageError("the demo needs moto: pip install 'phfs-fuse[demo]'") from exc
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # else a line per request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield f"http://{host}:{port}"
    finally:
        server.stop()


def _environ() -> dict[str, str]:
    """Of all commands here: credentials that this store takes, and none of the caller's settings."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "PHFS_"))}
    runtime = {name: os.environ[name] for name in ("PHFS_RUNTIME_DIR",) if name in os.environ}
    credentials = {
        "AWS_ACCESS_KEY_ID": "demo",
        "AWS_SECRET_ACCESS_KEY": "demo",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    return kept | runtime | credentials


def _client(url: str, environ: Mapping[str, str]) -> Any:
    import boto3

    return boto3.client(
        "s3",
        endpoint_url=url,
        aws_access_key_id=environ["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=environ["AWS_SECRET_ACCESS_KEY"],
        region_name=environ["AWS_DEFAULT_REGION"],
    )


def _fill(url: str, environ: Mapping[str, str]) -> None:
    store = _client(url, environ)
    store.create_bucket(Bucket=BUCKET)
    for path, sample in SAMPLES.items():
        store.put_object(Bucket=BUCKET, Key=f"groups/{path}", Body=sample.body, Metadata=sample.metadata)


@contextlib.contextmanager
def _mounted(base: Path, group: str, url: str, environ: Mapping[str, str]) -> Iterator[Path]:
    root = base / group
    root.mkdir(exist_ok=True)
    places = (f"--cache-dir={base / 'cache'}", f"--state-dir={base / 'state'}")
    _phfs("mount", f"--group={group}", f"--endpoint-url={url}", *places, str(root), environ=environ)
    try:
        yield root
    finally:
        try:
            _phfs("umount", f"--timeout={DRAIN_SECONDS}", str(root), environ=environ)
        except StartupError:
            subprocess.run(["umount" if os.geteuid() == 0 else "fusermount3", *_LAZY, str(root)], check=False)
            raise


_LAZY: Final = ("-l",) if os.geteuid() == 0 else ("-u", "-z")


def _phfs(*arguments: str, environ: Mapping[str, str]) -> None:
    """Run a phfs command; its own message has been shown when it fails."""
    command = [sys.executable, "-m", "phfs_fuse", *arguments]
    seconds = MOUNT_SECONDS + DRAIN_SECONDS
    try:
        code = subprocess.run(command, env=dict(environ), timeout=seconds, check=False).returncode
    except subprocess.TimeoutExpired as exc:
        raise MountpointError(f"phfs {arguments[0]} did not end within {seconds} s") from exc
    if code != 0:
        raise MountpointError(f"phfs {arguments[0]} failed with exit code {code}")


def _check(root: Path, url: str, environ: Mapping[str, str]) -> None:
    """Raises: StartupError at the first step that fails."""
    for title, script in CHECKS:
        _step(title, ["sh", "-ec", script], root)
    _phfs("sync", str(root), environ=environ)
    found = _client(url, environ).get_object(Bucket=BUCKET, Key=f"groups/{GROUPS[0]}/results.txt")["Body"].read()
    if found != b"one\ntwo\n":
        raise StartupError(f"the store has {found!r} in results.txt")
    _phfs("status", environ=environ)
    print("all steps passed")


def _step(title: str, command: Sequence[str], directory: Path) -> None:
    print(f"--- {title}", flush=True)
    # The shell goes there itself: with cwd= this process would wait for the mount.
    entered = ["sh", "-c", 'cd "$0" && exec "$@"', str(directory), *command]
    try:
        code = subprocess.run(entered, timeout=STEP_SECONDS, check=False).returncode
    except subprocess.TimeoutExpired as exc:
        raise StartupError(f"{title}: no end after {STEP_SECONDS} s") from exc
    if code != 0:
        raise StartupError(f"{title}: exit code {code}")


def _invite(roots: Sequence[Path], url: str) -> None:
    first = roots[0]
    phfs = "phfs" if shutil.which("phfs") else str(Path(sys.executable).with_name("phfs"))
    print(f"""
The store of this demo, in memory: {url} (access key and secret: demo)
Mounted: {", ".join(map(str, roots))}

Try, in another terminal:
  ls -lR {first}
  {first}/bin/hello.sh
  cp -a /etc/services {first}/models/ && {phfs} sync {first}
  AWS_ACCESS_KEY_ID=demo AWS_SECRET_ACCESS_KEY=demo aws --endpoint-url {url} s3 ls --recursive s3://{BUCKET}
  {phfs} status

Ctrl-C unmounts and ends. Nothing is kept.
""")

"""The process that works in a mount: one JSON request a line on standard input, one answer a line on standard output.

A process of its own, so that a mount that hangs hangs nobody else, and so that its start is in no figure. State:
none between requests but the working memory of the loads.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, TypedDict

from phfs_fuse.bench.loads import HEAD_BYTES, MIB, Load, piece, random_places

ERROR_CHARS_MAX: Final = 300


@dataclass(slots=True)
class Clock:
    """`began` and `ended` are CLOCK_MONOTONIC, which all processes share."""

    began: float = 0.0
    ended: float = 0.0
    value: Any = None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        self.began = time.monotonic()
        yield
        self.ended = time.monotonic()


class Dumped(TypedDict):
    """Of a `Load`."""

    seed: int
    size: int


Action = Callable[..., None]
ACTIONS: dict[str, Action] = {}


def action(function: Action) -> Action:
    ACTIONS[function.__name__] = function
    return function


@action
def look(clock: Clock, path: str) -> None:
    """Whether the path is there."""
    clock.value = os.path.exists(path)


@action
def write(clock: Clock, path: str, load: Dumped, unit: int) -> None:
    """A new file in writes of `unit` bytes, to the end of close."""
    content = Load(**load)
    for _ in content.chunks():  # fills the pool before the clock runs
        break
    with clock():
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            for chunk in content.chunks():
                for start in range(0, len(chunk), unit):
                    _write_all(descriptor, chunk[start : start + unit])
        finally:
            os.close(descriptor)


@action
def write_files(clock: Clock, root: str, loads: dict[str, Dumped]) -> None:
    """One file after the other, each to the end of close."""
    folders = sorted({os.path.dirname(os.path.join(root, name)) for name in loads})
    bodies = [(os.path.join(root, name), Load(**load)) for name, load in loads.items()]
    small = [(path, b"".join(load.chunks()) if load.size <= MIB else b"", load) for path, load in bodies]
    with clock():
        for folder in folders:
            os.makedirs(folder, exist_ok=True)
        for path, body, load in small:
            with open(path, "xb", buffering=0) as file:
                for chunk in [body] if body else load.chunks():
                    _write_all(file.fileno(), chunk)


def _write_all(descriptor: int, data: bytes | memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


@action
def read(clock: Clock, path: str) -> None:
    """All of it in reads of 1 MiB; the value is the SHA-256 of the first bytes of each."""
    heads = []
    with clock(), open(path, "rb", buffering=0) as file:
        buffer = memoryview(bytearray(MIB))
        while count := _fill(file, buffer):
            heads.append(bytes(buffer[: min(count, HEAD_BYTES)]))
    clock.value = hashlib.sha256(b"".join(heads)).hexdigest()


def _fill(file: io.FileIO, buffer: memoryview) -> int:
    got = 0
    while got < len(buffer) and (count := file.readinto(buffer[got:])):
        got += count
    return got


@action
def sums(clock: Clock, root: str, names: Sequence[str]) -> None:
    """The SHA-256 of each file: for checks, no measure."""
    clock.value = []
    for name in names:
        with open(os.path.join(root, name), "rb") as file:
            clock.value.append(hashlib.file_digest(file, "sha256").hexdigest())


@action
def first_byte(clock: Clock, path: str) -> None:
    with clock(), open(path, "rb", buffering=0) as file:
        got = file.read(1)
    clock.value = got.hex()


@action
def read_random(clock: Clock, path: str, size: int, count: int, unit: int) -> None:
    """The same places each time; the value is the SHA-256 of all that was read."""
    places = random_places(size, count, unit)
    with clock():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            pieces = [os.pread(descriptor, unit, place) for place in places]
        finally:
            os.close(descriptor)
    clock.value = hashlib.sha256(b"".join(pieces)).hexdigest()


@action
def read_files(clock: Clock, root: str, names: Sequence[str], threads: int) -> None:
    """Whole small files; the value is the SHA-256 of all of them in order."""
    paths = [os.path.join(root, name) for name in names]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(len, [""] * threads))  # the threads are there
        with clock():
            bodies = list(pool.map(_read_whole, paths)) if threads > 1 else [_read_whole(path) for path in paths]
    clock.value = hashlib.sha256(b"".join(bodies)).hexdigest()


def _read_whole(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return file.readall()


@action
def run(clock: Clock, command: Sequence[str], cwd: str, env: dict[str, str] | None = None) -> None:
    """A program; the value is the number of lines that it printed and its first ones."""
    with clock():
        done = subprocess.run(
            command,
            cwd=cwd,
            env={**os.environ, "LC_ALL": "C", **(env or {})},
            capture_output=True,
            text=True,
            errors="replace",
        )
    if done.returncode != 0:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise OSError(f"{command[0]} ended with {done.returncode}: {''.join(last)}")
    lines = done.stdout.splitlines()
    clock.value = {"count": len(lines), "first": lines[:3], "files": sum(line.startswith("-") for line in lines)}


_READER: Final = """
import sys
buffer, total = bytearray(1 << 20), 0
print("ready", flush=True)
sys.stdin.readline()
with open(sys.argv[1], "rb", 0) as file:
    while count := file.readinto(buffer):
        total += count
print(total)
"""


@action
def readers(clock: Clock, paths: Sequence[str]) -> None:
    """As many processes as paths, each opens one and reads it to its end; the value is their sizes."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-S", "-c", _READER, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for path in paths
    ]
    pipes = [(process.stdin, process.stdout) for process in processes]
    for _, output in pipes:
        assert output is not None
        output.readline()  # it is ready
    with clock():
        for start, _ in pipes:
            assert start is not None
            print(file=start, flush=True)
        clock.value = [int(process.communicate()[0] or -1) for process in processes]


@action
def rename(clock: Clock, old: str, new: str) -> None:
    with clock():
        os.rename(old, new)


@action
def overwrite(clock: Clock, path: str, offset: int, seed: int, size: int) -> None:
    body = piece(seed, size)
    with clock():
        descriptor = os.open(path, os.O_RDWR)
        try:
            os.pwrite(descriptor, body, offset)
        finally:
            os.close(descriptor)


@action
def append(clock: Clock, path: str, pieces: Sequence[Sequence[int]]) -> None:
    """Each piece (seed, size) by an open and a close of its own."""
    bodies = [piece(seed, size) for seed, size in pieces]
    with clock():
        for body in bodies:
            with open(path, "ab", buffering=0) as file:
                _write_all(file.fileno(), body)


@action
def upload_file(clock: Clock, local: str, endpoint_url: str | None, bucket: str, key: str) -> None:
    """What boto3 itself needs for it."""
    client = _client(endpoint_url)
    client.head_bucket(Bucket=bucket)
    with clock():
        client.upload_file(local, bucket, key)


@action
def ranged_gets(clock: Clock, endpoint_url: str | None, bucket: str, key: str, size: int, unit: int) -> None:
    """Parallel GETs of ranges, to nowhere."""
    client = _client(endpoint_url)
    client.head_bucket(Bucket=bucket)

    def get(start: int) -> int:
        body = client.get_object(Bucket=bucket, Key=key, Range=f"bytes={start}-{min(start + unit, size) - 1}")["Body"]
        with open(os.devnull, "wb") as nowhere:
            return sum(nowhere.write(chunk) for chunk in body.iter_chunks(MIB))

    with ThreadPoolExecutor(8) as pool, clock():
        clock.value = sum(pool.map(get, range(0, size, unit)))


def _client(endpoint_url: str | None) -> Any:
    from phfs_fuse.bench.store import s3_client

    return s3_client(endpoint_url)


def main() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        clock = Clock()
        try:
            ACTIONS[request["do"]](clock, **request["with"])
            answer = {"began": clock.began, "ended": clock.ended, "value": clock.value}
        except Exception as exc:  # the one who asked decides
            answer = {"error": f"{request['do']}: {exc}"[:ERROR_CHARS_MAX]}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()

"""The processes that the benchmark starts: actor, mounts, relay, store. Each ends with its `with` block."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from phfs_fuse.bench.systems import System, Target
from phfs_fuse.bench.usage import Watch
from phfs_fuse.errors import StartupError, UsageError
from phfs_fuse.host.mount_table import mount_table
from phfs_fuse.host.processes import readable

READY_SECONDS: Final = 60.0
END_SECONDS: Final = 10.0
DRAIN_SECONDS: Final = 120.0
_ACCESS: Final = {"AWS_ACCESS_KEY_ID": "phfs-bench", "AWS_SECRET_ACCESS_KEY": "phfs-bench-secret"}


class Failed(Exception):
    """A system did not do what was asked; the text says why, in one line."""


def end(process: subprocess.Popen[Any]) -> None:
    """SIGTERM, then SIGKILL to the process and its group. One that hangs in the kernel is left."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                process.wait(END_SECONDS)


# --- the one that works in the mount


@dataclass(frozen=True, slots=True)
class Done:
    began: float  # CLOCK_MONOTONIC
    ended: float
    value: Any

    @property
    def seconds(self) -> float:
        return self.ended - self.began


class Actor:
    """Runs one action after the other, in a process of its own."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "phfs_fuse.bench.actor"],
            env={**os.environ, **environ},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self._buffer = b""

    def do(self, action: str, seconds: float, **arguments: object) -> Done:
        """Raises: Failed when the action does, or after `seconds`."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": action, "with": arguments}).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError as exc:
            raise Failed(f"{action}: the process that works in the mount has ended") from exc
        answer = json.loads(self._line(action, seconds))
        if "error" in answer:
            raise Failed(answer["error"])
        return Done(answer["began"], answer["ended"], answer["value"])

    def _line(self, action: str, seconds: float) -> bytes:
        assert self._process.stdout is not None
        descriptor, deadline = self._process.stdout.fileno(), time.monotonic() + seconds
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not readable(descriptor, left):
                raise Failed(f"{action}: no end after {seconds:.0f} s")
            if not (got := os.read(descriptor, 1 << 16)):
                raise Failed(f"{action}: the process that works in the mount has ended")
            self._buffer += got
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def end(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(END_SECONDS)
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(OSError):
                assert pipe is not None
                pipe.close()


@contextmanager
def actor(environ: Mapping[str, str]) -> Iterator[Actor]:
    found = Actor(environ)
    try:
        yield found
    finally:
        found.end()


# --- mounts


@contextmanager
def mounted(system: System, target: Target) -> Iterator[Watch]:
    """A mount that serves; its end waits for uploads, and leaves nothing.

    Raises: Failed when it does not get ready, or does not end by itself.
    """
    log = target.work / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            system.command(target),
            env={**os.environ, **system.environ(target)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    watch = None
    try:
        _wait_mounted(process, target.mountpoint, log)
        watch = Watch(process.pid)
        yield watch
        _unmount(process, target.mountpoint, log)
    finally:
        if watch is not None:
            watch.end()
        _remove(process, target.mountpoint)


def _wait_mounted(process: subprocess.Popen[bytes], mountpoint: Path, log: Path) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while str(mountpoint) not in mount_table():
        if process.poll() is not None:
            raise Failed(f"mount ended with {process.returncode}: {last_line(log)}")
        if time.monotonic() > deadline:
            raise Failed(f"not mounted after {READY_SECONDS:.0f} s: {last_line(log)}")
        time.sleep(0.02)


def _unmount(process: subprocess.Popen[bytes], mountpoint: Path, log: Path) -> None:
    for _ in range(50):  # a program that has just ended may still hold it
        if subprocess.run(["fusermount3", "-u", str(mountpoint)], capture_output=True).returncode == 0:
            break
        time.sleep(0.1)
    else:
        raise Failed("cannot be unmounted: busy")
    try:
        process.wait(DRAIN_SECONDS)
    except subprocess.TimeoutExpired as exc:
        raise Failed(f"has not ended {DRAIN_SECONDS:.0f} s after its unmount: {last_line(log)}") from exc


def _remove(process: subprocess.Popen[bytes], mountpoint: Path) -> None:
    """By force: detach, end what serves it."""
    entry = mount_table().get(str(mountpoint))
    if entry is not None:
        for command in (["fusermount3", "-u", "-z"], ["umount", "-l"]):
            if str(mountpoint) in mount_table():
                with suppress(OSError, subprocess.TimeoutExpired):
                    subprocess.run([*command, str(mountpoint)], capture_output=True, timeout=END_SECONDS)
    end(process)
    if entry is not None and process.poll() is None:  # it waits for itself
        with suppress(OSError):
            Path(f"/sys/fs/fuse/connections/{entry.device.partition(':')[2]}/abort").write_text("1")
        end(process)


def last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1][:200] if lines else "it said nothing"


# --- relay and store


class Relay:
    """The relay's process: where it listens, and what went through it so far."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        self._process = process
        self.endpoint_url = f"http://127.0.0.1:{int(process.stdout.readline())}"

    def counts(self) -> dict[str, int]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(file=self._process.stdin, flush=True)
        if not (line := self._process.stdout.readline()):
            raise StartupError("the relay in front of the store has ended")
        found: dict[str, int] = json.loads(line)
        return found


@contextmanager
def relay(endpoint_url: str, delay_seconds: float) -> Iterator[Relay]:
    """Raises: UsageError for an endpoint that it cannot stand before."""
    parts = urlsplit(endpoint_url)
    if parts.scheme != "http" or not parts.hostname:
        raise UsageError(f"{endpoint_url}: a delay and counts need plain http; leave --latency-ms away")
    place = [parts.hostname, str(parts.port or 80), str(delay_seconds)]
    process = subprocess.Popen(
        [sys.executable, "-m", "phfs_fuse.bench.relay", *place],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield Relay(process)
    finally:
        end(process)
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


@contextmanager
def embedded() -> Iterator[str]:
    """moto in a process of its own: slow, for trying things out. Raises: UsageError without moto."""
    try:
        import moto.server  # noqa: F401
    except ImportError as exc:
        raise UsageError("--embedded needs moto: pip install 'phfs-fuse[bench]'") from exc
    with _server(lambda port, _: [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", port], {}) as url:
        yield url


@contextmanager
def minio(binary: Path) -> Iterator[str]:
    """A MinIO on the loopback address, its data in a temporary folder."""
    if not os.access(binary, os.X_OK):
        raise UsageError(f"--minio: {binary} is no program")
    environ = {
        "MINIO_ROOT_USER": _ACCESS["AWS_ACCESS_KEY_ID"],
        "MINIO_ROOT_PASSWORD": _ACCESS["AWS_SECRET_ACCESS_KEY"],
        "MINIO_BROWSER": "off",
    }
    with _server(
        lambda port, data: [str(binary), "server", "--quiet", "--address", f"127.0.0.1:{port}", data], environ
    ) as url:
        yield url


def own_credentials() -> Mapping[str, str]:
    """Of the stores that are started here."""
    return {**_ACCESS, "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}


@contextmanager
def _server(command: Callable[[str, str], list[str]], environ: Mapping[str, str]) -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="phfs-bench-store-", ignore_cleanup_errors=True) as folder:
        data = Path(folder, "data")
        data.mkdir()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        log = Path(folder, "log")
        with log.open("wb") as output:
            process = subprocess.Popen(
                command(str(port), str(data)),
                env={**os.environ, **environ},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            _wait_answer(process, f"http://127.0.0.1:{port}/", log)
            yield f"http://127.0.0.1:{port}"
        finally:
            end(process)


def _wait_answer(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            opener.open(url, timeout=1).close()
            return
        except urllib.error.HTTPError as exc:
            if exc.code < 500:
                return
        except OSError:
            pass
        time.sleep(0.05)
    raise StartupError(f"the store does not start: {last_line(log)}")

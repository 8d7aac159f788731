"""Rounds of programs that work on mounts while workers and keepers are killed, stores fail and disks fill up.

    python -m tests.torture --seconds 300 --seed 1 --mounts 2

After each round all is drained (in some rounds a keeper is killed first, with uploads waiting, and the volume is
mounted again) and compared: what programs see on each mount, what the objects say, and what was promised (the model
of each program). Ends with 0 if nothing was lost, torn or mixed up, no call failed that may not and the logs have no
line that the faults do not explain; else with 1, and the findings on standard output.
The same seed gives the same operations and faults, at other moments.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from phfs_fuse.errors import StartupError
from phfs_fuse.types import MIB
from tests.support.mounts import mounted
from tests.support.proxy import Proxy, Request, proxy
from tests.support.servers import Server, minio
from tests.torture.faults import KINDS, Faults
from tests.torture.keys import Keys
from tests.torture.rounds import FLAGS, ROUND_SECONDS, Place, Torture, big_files

FAULTS = [*KINDS, "deletes", "keys"]
DISKS = {"state": 96 * MIB, "cache": 48 * MIB}


def _place(stack: ExitStack, server: Server, at: int, bucket: str | None, options: argparse.Namespace) -> Place:
    front: Proxy = stack.enter_context(proxy(server.endpoint_url))
    front.keeps_requests = False
    path = Path(f"{options.keep_log}-{at}.requests") if options.keep_log else Path(os.devnull)
    asked = stack.enter_context(path.open("w"))

    def seen(request: Request) -> None:
        if options.keep_log:
            now = datetime.now(UTC).isoformat(timespec="milliseconds")
            print(now, request.method, request.path, file=asked)

    faults = Faults(random.Random(options.seed * 10 + at), seen)
    front.script = faults.script
    has_disks = os.geteuid() == 0
    keys: Keys | None = None
    flags: tuple[str, ...] = FLAGS
    if "keys" in options.faults:
        path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="phfs-keys-"))) / "credentials"
        keys, flags = Keys(server, path), (*flags, "--credentials-file", str(path))
    mount = stack.enter_context(
        mounted(
            *flags,
            *(("--log-level", "debug") if options.keep_log else ()),
            server=replace(server, endpoint_url=front.endpoint_url),
            bucket=bucket,
            disks=DISKS if has_disks else None,
        )
    )
    mount.expected.append("")  # the verdict on the log is given here
    return Place(mount, front, faults, has_disks, keys)


def _torture(options: argparse.Namespace, stack: ExitStack) -> Torture:
    server = stack.enter_context(minio())
    places: list[Place] = []
    for at in range(options.mounts):
        places.append(_place(stack, server, at, places[0].mount.bucket if places else None, options))
    torture = Torture(places, server, options.seed, options.faults, options.keep_log)
    end = time.monotonic() + options.seconds
    number = 0
    try:
        while time.monotonic() < end and not torture.findings:
            number += 1
            begun = time.monotonic()
            big = options.big or big_files(number, options.seed)
            torture.round(number, big, min(ROUND_SECONDS, max(5.0, end - time.monotonic())))
            took = f"{big or 'no'} files in one folder, {time.monotonic() - begun:.0f} s"
            print(f"round {number}, {took}: {dict(torture.done)}, findings {len(torture.findings)}", flush=True)
        torture.end()
    except Exception as exc:
        torture.give_up(exc)
    return torture


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description="See the module.")
    parser.add_argument(
        "--seconds", type=float, default=300.0, help="in all, without the checks after the last round"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--mounts", type=int, default=1, help="of one prefix, on this machine")
    parser.add_argument("--keep-log", type=Path, help="copy logs and requests of the mounts to files of this name")
    parser.add_argument("--big", type=int, help="every round works in a folder of so many files")
    parser.add_argument(
        "--faults", type=lambda text: text.split(","), default=FAULTS, help=f"some of {','.join(FAULTS)}"
    )
    options = parser.parse_args()
    started = time.monotonic()
    with ExitStack() as stack:
        torture = _torture(options, stack)
        print(torture.report(time.monotonic() - started), flush=True)
    return 1 if torture.findings else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except StartupError as exc:
        sys.exit(f"torture: {exc}")

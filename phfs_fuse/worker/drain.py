"""Upload what an ended mount has left in its state directory, without mounting. The process of `phfs drain`.

State: what a worker has, less the kernel's side. It may be killed at any time, as a worker may; what has not gone up
then stays. Status and limits are answered on the control socket, as by a mount.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Final, NoReturn

import trio

from phfs_fuse import metrics
from phfs_fuse.config.model import MountConfig
from phfs_fuse.config.resolve import load_config
from phfs_fuse.errors import MountpointError, NotDrained, StartupError
from phfs_fuse.host import logs
from phfs_fuse.tasks import lasting
from phfs_fuse.worker.control_socket import ControlServer
from phfs_fuse.worker.main import first_startup_error, prepare_process
from phfs_fuse.worker.status import Answers
from phfs_fuse.worker.wiring import Mount, opened

log = logging.getLogger(__name__)

REPORT_SECONDS: Final = 5.0


class _NoMount:
    async def shutdown(self, *, lazy: bool) -> NoReturn:
        raise MountpointError("nothing is mounted here: uploads go on until they are done")

    async def upgrade(self) -> NoReturn:
        raise MountpointError("nothing is mounted here")


async def upload_left(config: MountConfig) -> None:
    """Return when the store has what was left. Raises: NotDrained after `drain_seconds`; StartupError."""
    async with opened(config) as mount:
        mount.recover()  # logs what it finds
        if _is_done(mount):
            log.info("nothing is left to upload in %s", config.writeback.directory)
            return
        await mount.check()
        async with trio.open_nursery() as services:
            control = ControlServer(config.control_socket, Answers(mount), _NoMount())
            await services.start(lasting, "cache", mount.blocks.run)
            await services.start(lasting, "write-back", mount.writeback.run)
            await services.start(lasting, "control socket", control.run)
            services.start_soon(lasting, "report", partial(_report, mount))
            await mount.settling.drain()
            is_tidy = await mount.writeback.multiparts.finish()
            services.cancel_scope.cancel()
        mount.require_stored()
        if not is_tidy:
            raise NotDrained(
                f"{config.store.url}: all files are in the store, unfinished uploads are not removed yet"
            )
        log.info("uploaded files=%d bytes=%d", metrics.UPLOADED_FILES.values[""], metrics.UPLOADED_BYTES.values[""])


def _is_done(mount: Mount) -> bool:
    left = mount.settling.pending()
    return not (left.files or left.deletes or mount.writeback.multiparts.left().aborts)


async def _report(mount: Mount) -> None:
    """Service: say how far it is."""
    while True:
        await trio.sleep(REPORT_SECONDS)
        left = mount.settling.pending()
        log.info("draining files=%d deletes=%d bytes=%d", left.files, left.deletes, left.bytes)


async def _main(config: MountConfig) -> int:
    try:
        await upload_left(config)
    except* StartupError as group:
        exc = first_startup_error(group)
        print(f"phfs: {logs.printable(logs.redacted(str(exc)))}", file=sys.stderr, flush=True)
        code = exc.exit_code
    else:
        code = 0
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m phfs_fuse.worker.drain")
    parser.add_argument("--config", type=Path, required=True)
    options = parser.parse_args(arguments)
    config = load_config(options.config.read_text(encoding="utf-8"))
    options.config.unlink(missing_ok=True)
    logs.setup(config.log_level, config.log_format, name=config.log_name)
    prepare_process()
    return trio.run(partial(_main, config))


if __name__ == "__main__":
    sys.exit(main())

"""The process of a worker: one mount (pyfuse3 keeps global state), from what the keeper hands over to an exit code.

Start: lock the state, read the journal, ask the store, tell the keeper, take the descriptor, serve. State: none; the
objects are built by `wiring`, what goes on and ends is in `serving`.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import resource
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import trio

from phfs_fuse.config.model import MountConfig
from phfs_fuse.config.resolve import load_config
from phfs_fuse.errors import MountpointError, StartupError
from phfs_fuse.fuse.ops import operations
from phfs_fuse.fuse.session import Session
from phfs_fuse.host import logs
from phfs_fuse.host.confinement import confine
from phfs_fuse.state.disk_reserve import room_to_resume
from phfs_fuse.state.journal import Journal
from phfs_fuse.tree.kernel_log import KernelLog
from phfs_fuse.worker.control_socket import ControlServer
from phfs_fuse.worker.keeper_link import KeeperLink
from phfs_fuse.worker.serving import Services
from phfs_fuse.worker.status import Answers
from phfs_fuse.worker.wiring import KERNEL_LOG, opened

log = logging.getLogger(__name__)


async def _serve(config: MountConfig, link: KeeperLink, *, resume: bool) -> None:
    if resume:
        await room_to_resume(config.writeback.directory)
    async with opened(config) as mount:
        if resume:  # without asking the store: the kernel's requests wait
            mount.resume()
        else:
            await mount.check()
            mount.kernel.begin()
        mount.recover()
        mount.quotas.begin(resumed=resume)
        fd = await link.receive_descriptor()
        ops = operations(mount.vfs, config.tree, mount.demand.note, link)
        session = Session(ops, fd, resume=resume, on_statfs=ops.statfs_for, on_fallocate=ops.fallocate_errno)
        services = Services(mount, link, session, resumed=resume)
        try:
            await services.run(ControlServer(config.control_socket, Answers(mount), services))
        finally:
            session.close()


async def _main(config: MountConfig, fd: int, *, resume: bool, standby: bool) -> int:
    link = KeeperLink(fd)
    try:
        if standby:
            Journal.check(config.writeback.directory)
            KernelLog.check(config.writeback.directory / KERNEL_LOG)
            await link.standby()
        await _serve(config, link, resume=resume)
    except* StartupError as group:
        exc = first_startup_error(group)
        log.error("%s", exc)
        with contextlib.suppress(MountpointError):
            await link.failed(str(exc), exc.exit_code)
        code = exc.exit_code
    else:
        code = 0
    return code


def first_startup_error(group: BaseException) -> StartupError:
    while isinstance(group, BaseExceptionGroup):
        group = group.exceptions[0]
    assert isinstance(group, StartupError)
    return group


def prepare_process() -> None:
    """As many open files as allowed: staging, cache and connections each hold some. Less work for the collector.
    Confined."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    confine()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m phfs_fuse.mount")
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--resume", action="store_true", help="the kernel knows the mount already")
    parser.add_argument("--standby", action="store_true", help="begin when the worker before has ended")
    options = parser.parse_args(arguments)
    config = load_config(options.config.read_text())
    logs.setup(config.log_level, config.log_format, name=config.log_name)
    prepare_process()
    return trio.run(partial(_main, config, options.fd, resume=options.resume, standby=options.standby))

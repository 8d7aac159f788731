"""What was uploaded becomes the blocks of the new version, without a download. Owns no state.

The local file is moved into the cache where that can be, else copied. Small ones are entered (checksums written) at
once, others on a thread, with their blocks busy meanwhile.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import partial

from phfs_fuse import metrics
from phfs_fuse.cache import file_format
from phfs_fuse.cache.disk import INLINE_BYTES
from phfs_fuse.cache.file_format import Layout
from phfs_fuse.cache.version import Shared, Version
from phfs_fuse.extents import Extents
from phfs_fuse.tasks import survived

log = logging.getLogger(__name__)


def adopt(shared: Shared, version: Version, source: str, covered: Extents) -> None:
    """Take the blocks that lie in `covered` from the local file `source`, by moving it here if that can be.
    Raises: OSError."""
    file, source_fd = version.file, -1
    blocks = file.layout.covered_blocks(covered)
    if not blocks or shared.disk.is_full:
        return
    if not file.take(source, blocks):
        if not file.attach():
            return
        blocks = Extents(hole for extent in blocks for hole in file.ready.gaps(*extent))
        for extent in version.fills.busy:
            blocks.remove(*extent)
        source_fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
        metrics.COPIED.add(blocks.total_bytes)
    if blocks.total_bytes <= INLINE_BYTES or shared.fetching.nursery is None:
        _enter_now(version, blocks, source_fd)
        return
    for extent in blocks:
        version.fills.busy.add(*extent)
    version.refs += 1
    shared.fetching.nursery.start_soon(survived, "keeping bytes", _enter, version, blocks, source_fd)


def _enter_now(version: Version, blocks: Extents, source_fd: int) -> None:
    """Write the checksums of blocks that are in the file, or are copied from `source_fd` first."""
    file = version.file
    try:
        file_format.enter(file.fd, file.layout, file.disk.checksum, blocks, source_fd)
        _entered(version, blocks)
    finally:
        if source_fd >= 0:
            os.close(source_fd)


async def _enter(version: Version, blocks: Extents, source_fd: int) -> None:
    """The same on a thread."""
    file = version.file
    fds = [source_fd] if source_fd >= 0 else []
    try:
        if file.attach():
            fds.append(fd := os.dup(file.fd))
            call = partial(file_format.enter, fd, file.layout, file.disk.checksum, blocks, source_fd)
            await file.disk.run(call, abandon_on_cancel=False)
            _entered(version, blocks)
    except OSError as exc:
        log.info("bytes of key=%s are not kept: %s", file.key, exc)
    finally:
        for fd in fds:
            os.close(fd)
        for extent in blocks:
            version.fills.free(*extent)
        version.close()


def _entered(version: Version, blocks: Extents) -> None:
    file = version.file
    for extent in blocks:
        for start, end in file.ready.gaps(*extent):
            version.fills.add(start, end)
            file.disk.charge(file.name, end - start)


def graft(
    shared: Shared, version: Version, path: str, old: Layout, source: str, covered: Extents, same: Extents
) -> None:
    """Make the cache file of an older version, at `path`, that of `version` in the background: bytes in `covered`
    are those of the local file `source`, bytes in `same` are as they were. Raises: OSError."""
    assert shared.fetching.nursery is not None
    source_fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    version.fills.busy.add(0, version.size)
    version.refs += 1
    checksum = shared.disk.checksum
    call = partial(file_format.graft, path, old, version.file.layout, checksum, source_fd, covered, same)
    shared.fetching.nursery.start_soon(survived, "keeping bytes", _graft, version, path, call, source_fd)


async def _graft(version: Version, path: str, call: Callable[[], None], source_fd: int) -> None:
    file = version.file
    try:
        await file.disk.run(call, abandon_on_cancel=False)
        file.disk.directory.move_in(path, file.name)
        file.reopen()
        file.attach()
    except OSError as exc:
        log.info("bytes of key=%s are not kept: %s", file.key, exc)
        file.disk.throw_away(path)
    finally:
        os.close(source_fd)
        version.fills.free(0, version.size)
        version.close()

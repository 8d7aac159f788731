"""The worker's side of the mount: the line to its keeper, and libfuse's session on the keeper's connection.

State: the packet socket to the keeper, and (in pyfuse3, one per process) the session.

    link = KeeperLink(fd)                        # fd from the command line
    ...                                          # check the store; on failure: await link.failed(...) and end
    session = Session(ops, await link.receive_descriptor(), resume=resume)
    nursery.start_soon(partial(link.run, on_drain=..., on_gone=...))
    nursery.start_soon(session.serve)            # returns when the mount has ended
    await session.established.wait()
    await link.ready()
"""

from __future__ import annotations

import logging
import os
import socket
import struct
from collections.abc import Callable
from typing import Final

import pyfuse3
import trio

from phfs_fuse import messages
from phfs_fuse.errors import MountpointError
from phfs_fuse.messages import Kind, Message

log = logging.getLogger(__name__)

# One task serves one request until it is answered: so many may wait for the store before answers that need no
# store wait too. An idle task holds 1 MiB of address space, of which it touches a page or two.
TASKS_MIN: Final = 10
TASKS_MAX: Final = 1000

# Source: include/uapi/linux/fuse.h
FUSE_INIT: Final = 26
FUSE_NOTIFY_RESEND: Final = 7
_REQUEST_HEADER: Final = struct.Struct(
    "<IIQQIIIHH"
)  # length, opcode, unique, nodeid, uid, gid, pid, extensions, padding
_INIT_BODY: Final = struct.Struct("<IIIII11I")  # major, minor, max_readahead, flags, flags2, unused
_NOTIFICATION: Final = struct.Struct("<IiQ")  # length, code, 0
_INIT_UNIQUE: Final = 0x7FFF_FFFF_FFFF_FFF0  # the kernel counts up from 2: no request of it has this number
_INIT_FLAGS: Final = (
    0x3FFF_FFFF  # everything that libfuse can choose from, as every kernel since 4.20 offers it
)


_INT: Final = struct.Struct("i")  # as a control message carries a descriptor


class KeeperLink:
    """The line to the keeper. `run` must be running for `unmount` to return."""

    def __init__(self, fd: int) -> None:
        self._socket = trio.socket.from_stdlib_socket(socket.socket(fileno=fd))
        self._unmounting = trio.Lock()
        self._answers, self._answered = trio.open_memory_channel[Message](1)

    async def receive_descriptor(self) -> int:
        """Say that the checks passed; return the descriptor of the mount. Awaits the keeper.

        Raises:
            MountpointError: the keeper is gone or could not mount (it has told the user why).
        """
        await self._send(Message(kind=Kind.CHECKED))
        space = socket.CMSG_SPACE(_INT.size)
        packet, control, _flags, _address = await self._socket.recvmsg(
            messages.PACKET_BYTES_MAX, space, socket.MSG_CMSG_CLOEXEC
        )
        for level, kind, data in control:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                (fd,) = _INT.unpack_from(data)
                return int(fd)
        raise MountpointError(f"no mount from the keeper, which said {packet!r}")

    async def ready(self) -> None:
        await self._send(Message(kind=Kind.READY))

    async def failed(self, reason: str, exit_code: int) -> None:
        """Give the keeper the line for the user and the exit code of the command. The caller then ends."""
        await self._send(Message(kind=Kind.FAILED, reason=reason, exit_code=exit_code))

    async def unmount(self, *, lazy: bool) -> None:
        """Have the keeper unmount. Returns when the mount point is free; until then requests have to be
        served, since the kernel writes its dirty pages first. With `lazy` it returns at once, and the session
        ends with the last open file.

        Raises:
            MountpointError: not `lazy`, and files are open; the mount stays as it is.
        """
        async with self._unmounting:
            await self._send(Message(kind=Kind.UNMOUNT, lazy=lazy))
            answer = await self._answered.receive()
        if answer.kind is Kind.BUSY:
            raise MountpointError(answer.reason)

    async def run(self, *, on_drain: Callable[[bool], None], on_gone: Callable[[], None]) -> None:
        """Service: hear the keeper until it is gone, or until cancelled.

        `on_drain(now)` asks for upload and unmount, a second time with `now`: without further uploads.
        `on_gone` says that nobody would restart this worker or unmount for it: it has to end, and the mount
        stays broken.
        """
        while packet := await self._receive():
            message = messages.decode(packet)
            if message.kind is Kind.DRAIN:
                on_drain(message.now)
            elif message.kind in (Kind.UNMOUNTED, Kind.BUSY):
                self._hear_answer(message)
        on_gone()

    def _hear_answer(self, message: Message) -> None:
        # After a resume the answer may be for the worker before: nobody waits for it then.
        if self._unmounting.locked():
            self._answers.send_nowait(message)

    async def _receive(self) -> bytes:
        try:
            return await self._socket.recv(messages.PACKET_BYTES_MAX)
        except ConnectionError:
            return b""

    async def _send(self, message: Message) -> None:
        try:
            await self._socket.send(messages.encode(message))
        except (BrokenPipeError, ConnectionError) as exc:
            raise MountpointError("the keeper of this mount is gone") from exc


class Session:
    """libfuse's session on the connection behind `fd`, which it takes over. One per process."""

    def __init__(self, ops: pyfuse3.Operations, fd: int, *, resume: bool) -> None:
        self.established = trio.Event()  # requests are answered from now on
        self._fd = fd
        self._then = ops.init
        ops.init = self._on_init  # type: ignore[method-assign]
        self._session_fd = _pretended_kernel() if resume else fd
        pyfuse3.init(ops, f"/dev/fd/{self._session_fd}", set(pyfuse3.default_options))

    async def serve(self) -> None:
        """Service: answer requests until the mount has ended, by umount or by an abort of the connection."""
        await pyfuse3.main(min_tasks=TASKS_MIN, max_tasks=TASKS_MAX)

    def close(self) -> None:
        """Free the session. Does not unmount: a mount without a server stays broken."""
        pyfuse3.close(unmount=False)

    def _on_init(self) -> None:
        """Called by libfuse when it has read FUSE_INIT, before it answers and before the loop waits again."""
        self._then()
        if self._session_fd != self._fd:
            self._take_over()
        self.established.set()

    def _take_over(self) -> None:
        # Here and not later: afterwards the loop waits on the descriptor already. libfuse's answer to our
        # FUSE_INIT goes to the living connection, which knows no such request: ENOENT, which libfuse ignores.
        os.dup2(self._fd, self._session_fd, inheritable=False)
        os.close(self._fd)
        self._fd = self._session_fd
        try:
            os.write(self._fd, _NOTIFICATION.pack(_NOTIFICATION.size, FUSE_NOTIFY_RESEND, 0))
        except OSError as exc:
            log.warning(
                "requests that were in work at the restart stay stuck until killed: resend: %s", exc.strerror
            )


def _pretended_kernel() -> int:
    """A descriptor from which libfuse reads a FUSE_INIT request.

    The kernel shakes hands once per connection, and a session that did not shake hands refuses to serve.
    """
    ours, kernel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    body = _INIT_BODY.pack(7, 38, 128 << 10, _INIT_FLAGS, 0, *([0] * 11))
    length = _REQUEST_HEADER.size + len(body)
    with kernel:
        kernel.send(_REQUEST_HEADER.pack(length, FUSE_INIT, _INIT_UNIQUE, 0, 0, 0, 0, 0, 0) + body)
    return ours.detach()

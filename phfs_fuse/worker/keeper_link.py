"""The worker's line to its keeper: packets of `keeper.messages`, and the descriptor of the mount.

State: the packet socket, and which answer is awaited.

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
import socket
import struct
from collections.abc import Callable, Sequence
from typing import Final

import trio

from phfs_fuse.errors import MountpointError, startup_error
from phfs_fuse.keeper import messages
from phfs_fuse.keeper.messages import Kind, Message
from phfs_fuse.types import Name

log = logging.getLogger(__name__)

_INT: Final = struct.Struct("i")  # as a control message carries a descriptor


class KeeperLink:
    """The line to the keeper. `run` must be running for `unmount` to return."""

    def __init__(self, fd: int) -> None:
        self._plain = socket.socket(fileno=fd)
        self._socket = trio.socket.from_stdlib_socket(self._plain)
        self._asking = trio.Lock()
        self._awaited: Sequence[Kind] = ()
        self._answers, self._answered = trio.open_memory_channel[Message](1)
        self._expired = trio.Event()
        self._expire_count = self._expired_count = 0
        self.expires = 0  # the keeper can tell the kernel to look names up again, or drop them: see `messages`

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
                self.expires = messages.decode(packet).expires
                (fd,) = _INT.unpack_from(data)
                return int(fd)
        raise MountpointError(f"the keeper gave no mount{': ' if packet else ''}{packet.decode()}")

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
        answer = await self._ask(Message(kind=Kind.UNMOUNT, lazy=lazy), Kind.UNMOUNTED, Kind.BUSY)
        if answer.kind is Kind.BUSY:
            raise MountpointError(answer.reason)

    async def expire(self, names: Sequence[Name]) -> None:
        """Have the kernel look these names up again; returns when it knows."""
        packed = [(ino, name.hex()) for ino, name in names]
        self._expire_count += 1
        number = self._expire_count
        await self._send(Message(kind=Kind.EXPIRE, names=packed))
        await self.told(number)

    def drop(self, name: Name) -> int | None:
        """Have the kernel forget a name, and what it believes of its file unless that is open. Does not wait.
        Returns what `told` waits for; None: the keeper is busy, or knows nothing of that."""
        if self.expires < messages.EXPIRES_AND_DROPS:
            return None
        ino, bare = name
        packet = messages.encode(Message(kind=Kind.EXPIRE, names=[(ino, bare.hex())], drop=True))
        try:
            self._plain.send(packet)  # which never blocks: trio's mode is the socket's
        except OSError:
            return None
        self._expire_count += 1
        return self._expire_count

    async def told(self, number: int) -> None:
        """Wait until the keeper has told the kernel what it was asked to up to `number`."""
        while self._expired_count < number:
            await self._expired.wait()

    async def standby(self) -> None:
        """Say that this worker can take over; returns when the one before has ended."""
        await self._send(Message(kind=Kind.STANDBY))
        if not await self._receive():
            raise MountpointError("the keeper of this mount is gone")

    async def upgrade(self) -> None:
        """Have the keeper put another worker in the place of this one. Returns when this one has to end.
        Raises: StartupError, nothing has changed."""
        answer = await self._ask(Message(kind=Kind.UPGRADE), Kind.HANDOVER, Kind.REFUSED)
        if answer.kind is Kind.REFUSED:
            raise startup_error(answer.exit_code, f"not upgraded: {answer.reason}")

    async def _ask(self, message: Message, *answers: Kind) -> Message:
        async with self._asking:
            self._awaited = answers
            try:
                await self._send(message)
                return await self._answered.receive()
            finally:
                self._awaited = ()

    async def run(
        self,
        *,
        on_drain: Callable[[bool], None],
        on_handover: Callable[[], None],
        on_gone: Callable[[], None],
    ) -> None:
        """Service: hear the keeper until it is gone, or until cancelled.

        `on_drain(now)` asks for upload and unmount, a second time with `now`: without further uploads.
        `on_handover` asks to answer what is in work, and then to end: another worker goes on.
        `on_gone` says that nobody would restart this worker or unmount for it: it has to end, and the mount
        stays broken.
        """
        while packet := await self._receive():
            try:
                message = messages.decode(packet)
            except (ValueError, TypeError, KeyError):  # of another version
                log.error("not understood, ignored: %r", packet[:200])
                continue
            if message.kind is Kind.EXPIRED:
                self._expired_count += 1
                self._expired.set()
                self._expired = trio.Event()
            if message.kind is Kind.DRAIN:
                on_drain(message.now)
            elif message.kind in self._awaited:  # else it may be for the worker before: nobody waits for it
                self._awaited = ()
                self._answers.send_nowait(message)
            if message.kind is Kind.HANDOVER:
                on_handover()
        on_gone()

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

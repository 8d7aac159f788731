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
from collections.abc import Callable, Sequence
from enum import Flag
from pathlib import Path
from typing import Final

import pyfuse3
import trio

from phfs_fuse import messages
from phfs_fuse.eager import eager_requests
from phfs_fuse.errors import MountpointError, startup_error
from phfs_fuse.expiry import Name
from phfs_fuse.messages import Kind, Message
from phfs_fuse.statfsino import telling

log = logging.getLogger(__name__)

# One task serves one request until it is answered: so many may wait for the store before answers that need no
# store wait too. An idle task holds 1 MiB of address space, of which it touches a page or two.
TASKS_MIN: Final = 10
TASKS_MAX: Final = 1000

# Source: include/uapi/linux/fuse.h
MINOR: Final = 31  # of protocol 7: Linux 5.4, and all that libfuse needs to know
FUSE_INIT: Final = 26
FUSE_NOTIFY_RESEND: Final = 7
WRITE_BYTES_MAX: Final = 1 << 20  # of one request, and what libfuse's buffer holds
# Read-ahead and write-back requests under way. At the kernel's 12, a few that wait for the store hold up all others.
BACKGROUND_MAX: Final = 128


class InitFlag(Flag):
    """What this session asks of the kernel, where the kernel has it."""

    ASYNC_READ = 1 << 0
    ATOMIC_O_TRUNC = 1 << 3
    EXPORT_SUPPORT = 1 << 4
    BIG_WRITES = 1 << 5
    AUTO_INVAL_DATA = 1 << 12
    DO_READDIRPLUS = 1 << 13
    ASYNC_DIO = 1 << 15
    WRITEBACK_CACHE = 1 << 16
    PARALLEL_DIROPS = 1 << 18
    MAX_PAGES = 1 << 22


_REQUEST: Final = struct.Struct("<IIQQIIIHH")  # length, opcode, unique, nodeid, uid, gid, pid, extensions, -
_INIT_IN: Final = struct.Struct("<IIIII11I")  # major, minor, max_readahead, flags, flags2, -
_REPLY: Final = struct.Struct("<IiQ")  # length, error, unique; of a notification: length, code, 0
# major, minor, max_readahead, flags, max_background, congestion_threshold, max_write, time_gran, max_pages, -
_INIT_OUT: Final = struct.Struct("<IIIIHHIIH34x")
_PRETENDED_UNIQUE: Final = 0x7FFF_FFFF_FFFF_FFF0  # the kernel counts up from 2: no request of it has this number
_PRETENDED_FLAGS: Final = 0x3FFF_FFFF  # everything: what libfuse then chooses stays within this process
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


class Session:
    """libfuse's session on the connection behind `fd`, which it takes over. One per process.

    The kernel shakes hands once per connection, so that a worker that resumes has to pretend towards libfuse that
    it did: libfuse reads a request of our own from a socket, in whose place the connection then is put. The first
    worker does the same, after it has answered the kernel itself: libfuse's answer would leave things out
    (PARALLEL_DIROPS, in libfuse 3.14) or has no setting for them (max_background).
    """

    def __init__(
        self,
        ops: pyfuse3.Operations,
        fd: int,
        *,
        resume: bool,
        on_statfs: Callable[[int], None],
        on_fallocate: Callable[[int], int],
    ) -> None:
        """`on_statfs` hears the inode right before a statfs handler is called; `on_fallocate` says how to answer one
        that ends at a byte."""
        self.established = trio.Event()  # requests are answered from now on
        self._fd, self._resume = fd, resume
        if not resume:
            _shake_hands(fd, _wanted(ops))
        self._then = ops.init
        ops.init = self._on_init  # type: ignore[method-assign]
        self._session_fd = _pretended_kernel()
        with telling(Path(pyfuse3.__file__), on_statfs, on_fallocate):
            pyfuse3.init(ops, f"/dev/fd/{self._session_fd}", set(pyfuse3.default_options))

    async def serve(self) -> None:
        """Service: answer requests until the mount has ended, by umount or by an abort of the connection."""
        with eager_requests(self._session_fd):
            await pyfuse3.main(min_tasks=TASKS_MIN, max_tasks=TASKS_MAX)

    def stop(self) -> None:
        """Have `serve` return although the mount has not ended: programs that hold on to it get ENOTCONN."""
        pyfuse3.terminate()

    def close(self) -> None:
        """Free the session. Does not unmount: a mount without a server stays broken."""
        pyfuse3.close(unmount=False)

    def _on_init(self) -> None:
        """Called by libfuse when it has read FUSE_INIT, before it answers and before the loop waits again."""
        self._then()
        # Here and not later: afterwards the loop waits on the descriptor already. libfuse's answer goes to the
        # living connection, which knows no such request: ENOENT, which libfuse ignores.
        os.dup2(self._fd, self._session_fd, inheritable=False)
        os.close(self._fd)
        if self._resume:
            _ask_again(self._session_fd)
        self.established.set()


def _wanted(ops: pyfuse3.Operations) -> InitFlag:
    wanted = ~InitFlag(0)
    if not ops.enable_writeback_cache:
        wanted &= ~InitFlag.WRITEBACK_CACHE
    return wanted if ops.supports_dot_lookup else wanted & ~InitFlag.EXPORT_SUPPORT


def _shake_hands(fd: int, wanted: InitFlag) -> None:
    """Answer the FUSE_INIT that the kernel queued at mount."""
    request = os.read(fd, WRITE_BYTES_MAX)
    _length, opcode, unique, *_ = _REQUEST.unpack_from(request)
    _major, _minor, read_ahead_bytes, offered = struct.unpack_from("<4I", request, _REQUEST.size)
    assert opcode == FUSE_INIT, opcode
    flags = wanted.value & offered
    background = (BACKGROUND_MAX, BACKGROUND_MAX * 3 // 4)
    pages_max = WRITE_BYTES_MAX // os.sysconf("SC_PAGE_SIZE")
    body = _INIT_OUT.pack(7, MINOR, read_ahead_bytes, flags, *background, WRITE_BYTES_MAX, 1, pages_max)
    os.write(fd, _REPLY.pack(_REPLY.size + len(body), 0, unique) + body)
    log.debug("the kernel offered %#x and got %s", offered, InitFlag(flags))


def _ask_again(fd: int) -> None:
    """Have the kernel send again what the worker before had taken and not answered. Needs Linux 6.9."""
    try:
        os.write(fd, _REPLY.pack(_REPLY.size, FUSE_NOTIFY_RESEND, 0))
    except OSError as exc:
        log.warning("requests that were in work at the restart stay stuck until killed: %s", exc.strerror)


def _pretended_kernel() -> int:
    """A descriptor from which libfuse reads a FUSE_INIT request."""
    ours, kernel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    body = _INIT_IN.pack(7, MINOR, 128 << 10, _PRETENDED_FLAGS, 0, *([0] * 11))
    length = _REQUEST.size + len(body)
    with kernel:
        kernel.send(_REQUEST.pack(length, FUSE_INIT, _PRETENDED_UNIQUE, 0, 0, 0, 0, 0, 0) + body)
    return ours.detach()

"""The clients of one bucket for as long as credentials and certificates stay the same. Owns the clients.

Credentials of a file, a profile or a mounted Secret change while a mount is served, and so does the authority that
signed the store's certificate. Both are noticed by their files, looked at every `LOOK_SECONDS`, and at the next
refusal by the store; then new clients take the place of the old ones. Temporary credentials (roles, web identity,
processes) are renewed by boto3 itself; a refusal has it ask for new ones ahead of time.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

import trio
from botocore.session import Session

from phfs_fuse.config.model import StoreConfig
from phfs_fuse.errors import ClockOff, CredentialsRefused, PhfsError, WrongRegion
from phfs_fuse.store.clients import Clients, open_clients

log = logging.getLogger(__name__)

T = TypeVar("T")

LOOK_SECONDS: Final = 30.0  # between two looks at the files
RENEW_SECONDS: Final = 10.0  # between two renewals that refusals ask for


class Access:
    """Clients that the first call opens. `core` brings credentials that never change; None: the usual chain."""

    def __init__(self, config: StoreConfig, core: Session | None = None) -> None:
        self._config, self._core = config, core
        self.on_replaced: Callable[[], None] | None = None  # new clients took the place of the old ones
        self._clients: Clients | None = None
        self._look_at = 0.0
        self._renew_at = 0.0
        self._region: str | None = None  # where the bucket was found, if that is another than was configured
        self._lock = trio.Lock()

    @property
    def is_aws(self) -> bool:
        """Whether the store is known to be AWS, which it is once there are clients."""
        return self._clients is not None and self._clients.is_aws

    async def clients(self) -> Clients:
        """Raises: CredentialsRefused, InvalidArgument, if there are none yet."""
        if self._clients is not None and trio.current_time() < self._look_at:
            return self._clients
        async with self._lock:
            if self._clients is None:
                self._clients = await self._open()
            elif trio.current_time() >= self._look_at and await trio.to_thread.run_sync(self._clients.is_outdated):
                await self._replace("a file of credentials or certificates has changed")
            self._look_at = trio.current_time() + LOOK_SECONDS
            return self._clients

    async def renewing(self, call: Callable[[], Awaitable[T]]) -> T:
        """What `call` returns, if need be at a second try with other credentials, or for the bucket's own region."""
        clients = self._clients
        try:
            return await call()
        except ClockOff:  # whoever signs
            raise
        except CredentialsRefused as exc:
            if not await self._is_renewed(clients or self._clients, is_region=isinstance(exc, WrongRegion)):
                raise
        return await call()

    async def _is_renewed(self, refused: Clients | None, *, is_region: bool) -> bool:
        """Whether there are other clients now than those whose request was refused."""
        async with self._lock:
            if self._clients is not refused:
                return True  # another request was quicker
            if self._clients is None or self._core is not None:
                return False
            now = trio.current_time()
            is_futile = now < self._renew_at or not (is_region or self._clients.has_source_of_credentials)
            if is_futile and not await trio.to_thread.run_sync(self._clients.is_outdated):
                return False
            self._renew_at = now + RENEW_SECONDS
            if not is_region:
                return await self._replace("the store has refused a request", must_differ=True)
            self._region = await trio.to_thread.run_sync(self._clients.bucket_region, self._config.bucket)
            if self._region in (None, self._clients.region):
                return False
            return await self._replace(f"the bucket is in {self._region}")

    async def aclose(self) -> None:
        if self._clients is not None:
            await trio.to_thread.run_sync(self._clients.close)

    async def _open(self) -> Clients:
        return await trio.to_thread.run_sync(open_clients, self._config, self._core, self._region)

    async def _replace(self, why: str, *, must_differ: bool = False) -> bool:
        """Requests under way end with the clients that they began with."""
        assert self._clients is not None
        try:
            found = await self._open()
            if must_differ and await trio.to_thread.run_sync(found.has_credentials_of, self._clients):
                await trio.to_thread.run_sync(found.close)
                return False
        except PhfsError as exc:
            log.warning("%s, and no other access is found: %s", why, exc)
            return False
        log.info("new clients of the store: %s", why)
        before, self._clients = self._clients, found
        if self.on_replaced is not None:
            self.on_replaced()
        await trio.to_thread.run_sync(before.close)
        return True

"""The answers that are not data: one class per meaning, one errno or exit code per class. Owns no state."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import ClassVar


class PhfsError(Exception):
    """An answer to a file-system request that is an error.

    `op` is what was being done, `subject` the key or path it was done to, `reason` why it failed, `code` the store's
    word for it, if it came from there.
    """

    errno: ClassVar[int] = errno.EIO
    code: str = ""

    def __init__(self, op: str, subject: str, reason: str = "") -> None:
        super().__init__(op, subject, reason)
        self.op, self.subject, self.reason = op, subject, reason

    def __str__(self) -> str:
        text = f"{self.op} {self.subject}"
        return f"{text}: {self.reason}" if self.reason else text


class NotFound(PhfsError):
    errno = errno.ENOENT


class BucketNotFound(PhfsError):
    """The bucket itself is not there: that says nothing about a file of it."""

    errno = errno.EIO


class Exists(PhfsError):
    errno = errno.EEXIST


class NotADirectory(PhfsError):
    errno = errno.ENOTDIR


class IsADirectory(PhfsError):
    errno = errno.EISDIR


class NotEmpty(PhfsError):
    errno = errno.ENOTEMPTY


class AccessDenied(PhfsError):
    """The store knows who asks, and does not allow it."""

    errno = errno.EACCES


class CredentialsRefused(AccessDenied):
    """The store does not accept these credentials, or does not say why it refuses: the same may work with others."""


class WrongRegion(CredentialsRefused):
    """The store takes requests for this bucket only if they are signed for its own region."""


class ClockOff(CredentialsRefused):
    """The store refuses what is signed with the time of this machine, for as long as that is too far from its own."""


class InvalidArgument(PhfsError):
    errno = errno.EINVAL


class BoundToFolder(PhfsError):
    """What cannot leave its directory as it is; programs then copy it."""

    errno = errno.EXDEV


class IllegalName(PhfsError):
    """A name or key that cannot be carried by the other side."""

    errno = errno.EINVAL


class NameTooLong(PhfsError):
    errno = errno.ENAMETOOLONG


class NotSupported(PhfsError):
    errno = errno.ENOTSUP


class ReadOnly(PhfsError):
    errno = errno.EROFS


class TooLarge(PhfsError):
    errno = errno.EFBIG


class NoSpace(PhfsError):
    """The dirty limit or the local disk is full."""

    errno = errno.ENOSPC


class QuotaExceeded(PhfsError):
    errno = errno.EDQUOT


class NoAttribute(PhfsError):
    errno = errno.ENODATA


class StaleVersion(PhfsError):
    """The version that was asked for is no longer in the store."""

    errno = errno.ESTALE


class VersionChanged(PhfsError):
    """A conditional request lost: the object is not (or no longer) the version that it names. Also 'gone'."""

    errno = errno.EIO


class StoreUnavailable(PhfsError):
    """The store did not answer, or answered that it cannot now; the same request may succeed later."""

    errno = errno.EIO


class StoreTimeout(StoreUnavailable):
    errno = errno.ETIMEDOUT


class BadAnswer(StoreUnavailable):
    """The store's answer contradicts itself or the request (length, checksum, XML)."""


class StartupError(Exception):
    """A reason why a command cannot do its work: one line (thing, reason, remedy) and an exit code."""

    exit_code: ClassVar[int] = 1
    refused: Sequence[str] = ()  # one line more for each change that the store has refused


class UsageError(StartupError):
    """A flag, a config key, an option or their combination is wrong."""

    exit_code = 2


class ConfigError(UsageError):
    """`field` has `value`, which is not `wanted`."""

    def __init__(self, field: str, value: object, wanted: str) -> None:
        super().__init__(f"{field}: {value!r} is not valid, expected {wanted}")
        self.field, self.value, self.wanted = field, value, wanted


class StoreStartupError(StartupError):
    """Bucket missing, credentials wrong or missing, no permission, endpoint out of reach."""

    exit_code = 3


class MountpointError(StartupError):
    """Mount point missing, not a directory, not empty, in use, or FUSE not usable."""

    exit_code = 4


class LocalStateError(StartupError):
    """State or cache directory not writable, full, locked by another mount, or of a newer format."""

    exit_code = 5


class NotDrained(StartupError):
    """Bytes are still waiting for upload; they stay in the state directory."""

    exit_code = 6


class StoreRefused(NotDrained):
    """The mount has ended; the store had refused some changes for good. One line more for each."""

    def __init__(self, line: str, refused: Sequence[str]) -> None:
        super().__init__(line)
        self.refused = refused


def startup_error(exit_code: int, line: str) -> StartupError:
    """The error that another process ended with."""
    kinds = (UsageError, StoreStartupError, MountpointError, LocalStateError, NotDrained)
    return next((kind for kind in kinds if kind.exit_code == exit_code), StartupError)(line)


def store_startup_error(exc: PhfsError, url: str, endpoint: str = "") -> StoreStartupError:
    """What the first request to the store found out, as one line with the remedy; the store's own code is at its end.
    `endpoint`: the URL that was tried, and where it came from."""
    at = f" at {endpoint}" if endpoint else ""
    code = f" ({exc.code})" if exc.code else ""
    words = exc.reason.removesuffix(exc.code).removesuffix(code)
    why = f": {words}" if words else ""
    match exc:
        case BucketNotFound():
            line = f"{url}: there is no such bucket{at}; --create-bucket makes it"
        case ClockOff():
            line = f"{url}: the clock of this machine is too far from the store's{at}; set it (NTP){code}"
        case WrongRegion():
            line = f"{url}: the bucket is in another region{at}; name it with --region{code}"
        case AccessDenied():
            line = f"{url}: access denied{at}{why}; check the credentials and their rights{code}"
        case StoreUnavailable():
            line = f"{url}: the store{at} does not answer{why}; check --endpoint-url and the network{code}"
        case _:
            line = f"{url}: {exc}"
    return StoreStartupError(line)

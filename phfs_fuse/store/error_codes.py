"""What cannot be asked of a store, and what its answers mean: S3 codes to `PhfsError`s. Pure; owns no state.

`reading` is the border for all that comes from a store: what cannot be read leaves it as `BadAnswer`.

Decided on codes and statuses alone. The store's message text is dropped: it may name credentials.
Source: S3 API reference, "List of error codes"; MinIO's `XMinio` codes; versitygw 1.8, `s3err`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Final
from xml.etree import ElementTree

from phfs_fuse.errors import (
    AccessDenied,
    BadAnswer,
    BucketNotFound,
    ClockOff,
    CredentialsRefused,
    IllegalName,
    InvalidArgument,
    IsADirectory,
    NameTooLong,
    NoSpace,
    NotADirectory,
    NotFound,
    NotSupported,
    PhfsError,
    QuotaExceeded,
    StoreTimeout,
    StoreUnavailable,
    TooLarge,
    VersionChanged,
    WrongRegion,
)
from phfs_fuse.store.base import Properties
from phfs_fuse.types import KEY_BYTES_MAX, SEGMENT_BYTES_SURE


class OutOfRange(BadAnswer):
    """The store has no such bytes (416): asking again is of no use."""


NO_SUCH_KEY: Final = "NoSuchKey"
NO_SUCH_UPLOAD: Final = "NoSuchUpload"

_TOKEN: Final = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")  # Source: RFC 9110, 5.6.2
_CODE: Final = re.compile(r"[A-Za-z0-9._-]{1,100}")
_FIELD: Final = re.compile(r"(?:[!-~](?:[ -~]*[!-~])?)?")  # no blanks at the ends: they would be lost

_BY_CODE: Final[Mapping[str, type[PhfsError]]] = {
    "AccessDenied": AccessDenied,
    "AuthorizationHeaderMalformed": WrongRegion,
    "PermanentRedirect": WrongRegion,
    "ExpiredToken": CredentialsRefused,
    "ExpiredTokenException": CredentialsRefused,
    "InvalidAccessKeyId": CredentialsRefused,
    "InvalidClientTokenId": CredentialsRefused,
    "InvalidToken": CredentialsRefused,
    "RequestExpired": CredentialsRefused,
    "RequestTimeTooSkewed": ClockOff,
    "SignatureDoesNotMatch": CredentialsRefused,
    "TokenRefreshRequired": CredentialsRefused,
    "UnrecognizedClientException": CredentialsRefused,
    "NoSuchBucket": BucketNotFound,
    NO_SUCH_KEY: NotFound,
    NO_SUCH_UPLOAD: NotFound,
    "ConditionalRequestConflict": VersionChanged,
    "PreconditionFailed": VersionChanged,
    "InvalidRange": OutOfRange,
    "BadDigest": BadAnswer,
    "IncompleteBody": BadAnswer,
    "XAmzContentSHA256Mismatch": BadAnswer,
    "InternalError": StoreUnavailable,
    "OperationAborted": StoreUnavailable,
    "PriorRequestNotComplete": StoreUnavailable,
    "RequestLimitExceeded": StoreUnavailable,
    "ServiceUnavailable": StoreUnavailable,
    "SlowDown": StoreUnavailable,
    "SlowDownRead": StoreUnavailable,
    "SlowDownWrite": StoreUnavailable,
    "Throttling": StoreUnavailable,
    "ThrottlingException": StoreUnavailable,
    "TooManyRequests": StoreUnavailable,
    "XMinioServerNotInitialized": StoreUnavailable,
    "RequestTimeout": StoreTimeout,
    "EntityTooLarge": TooLarge,
    "MetadataTooLarge": TooLarge,
    "KeyTooLong": NameTooLong,
    "KeyTooLongError": NameTooLong,
    "InvalidURI": IllegalName,
    "XMinioInvalidObjectName": IllegalName,  # or too long: see `error_of`
    "XMinioInvalidResourceName": IllegalName,
    "XMinioObjectExistsAsDirectory": IsADirectory,
    "XMinioParentIsObject": NotADirectory,
    "XMinioStorageFull": NoSpace,
    "ExistingObjectIsDirectory": IsADirectory,  # versitygw and SeaweedFS, whose objects are files of a file system
    "ObjectParentIsFile": NotADirectory,
    "InsufficientStorage": NoSpace,
    "XMinioAdminBucketQuotaExceeded": QuotaExceeded,
    "QuotaExceeded": QuotaExceeded,
    "InvalidObjectState": NotSupported,  # archived
    "MethodNotAllowed": NotSupported,
    "NotImplemented": NotSupported,
}

_BY_STATUS: Final[Mapping[int, type[PhfsError]]] = {
    301: WrongRegion,
    403: AccessDenied,
    404: NotFound,
    405: NotSupported,
    408: StoreTimeout,
    409: StoreUnavailable,
    412: VersionChanged,
    416: OutOfRange,
    429: StoreUnavailable,
    501: NotSupported,
    504: StoreTimeout,
}

UNEXPLAINED: Final = (401, 403)  # statuses that need a code to tell what is refused

_REMEDY: Final[Mapping[str, str]] = {
    "ExpiredToken": "the session token has expired",
    "InvalidAccessKeyId": "the store does not know this access key",
    "RequestTimeTooSkewed": "the clock of this machine is off",
    "SignatureDoesNotMatch": "the secret key is not that of the access key",
}


@contextmanager
def reading(op: str, subject: str) -> Iterator[None]:
    """The border for an answer of the store: whatever is wrong with it leaves the block as `BadAnswer`. Other
    `PhfsError`s, and errors of the local disk, are not about the answer and pass."""
    try:
        yield
    except (PhfsError, OSError):
        raise
    except Exception as exc:  # of any parser: ParseError, ValueError, OverflowError, LookupError, RecursionError, ...
        raise BadAnswer(op, subject, f"cannot be read: {type(exc).__name__}") from exc


def error_code(body: bytes) -> str:
    """The code in an error's body; "" where there is none, as with HEAD, or none that can be read."""
    try:
        code = ElementTree.fromstring(body).findtext("{*}Code") or ""
    except Exception:  # see `reading`; the status of the answer says enough
        return ""
    return code if _CODE.fullmatch(code) else ""


def error_of(op: str, subject: str, code: str, status: int) -> PhfsError:
    """The error for an answer. `code` is "" or the status again where it had no body, as with HEAD."""
    if code == str(status):
        code = ""
    if status in UNEXPLAINED and code in ("", "Forbidden", "Unauthorized"):  # rights, or credentials
        return CredentialsRefused(op, subject, f"HTTP {status}")
    kind = _BY_CODE.get(code) or _BY_STATUS.get(status)
    if kind is None:
        kind = StoreUnavailable if status >= 500 else InvalidArgument
    if code == "XMinioInvalidObjectName" and _has_long_segment(subject):
        kind = NameTooLong
    reason = f"{_REMEDY[code]} ({code})" if code in _REMEDY else code or f"HTTP {status}"
    error = kind(op, subject, reason)
    error.code = code
    return error


def _has_long_segment(key: str) -> bool:
    return any(len(segment.encode()) > SEGMENT_BYTES_SURE for segment in key.split("/"))


def check_text(op: str, key: str) -> bytes:
    """`key` as it is sent. Raises: IllegalName for half surrogates."""
    try:
        return key.encode()
    except UnicodeEncodeError as exc:
        raise IllegalName(op, ascii(key), "not Unicode") from exc


def check_metadata(op: str, key: str, metadata: Mapping[str, str], properties: Properties | None = None) -> None:
    """Refuse what a header cannot carry as it is, but for what came in one. Raises: InvalidArgument."""
    came = properties.metadata if properties else {}
    for name, value in metadata.items():
        if came.get(name) == value:
            continue
        if not _TOKEN.fullmatch(name) or not _FIELD.fullmatch(value):
            raise InvalidArgument(op, key, f"metadata {name!r} is not one line of printable ASCII")


def check_key(op: str, key: str) -> None:
    """Refuse keys that cannot reach the store as they are. Raises: IllegalName, NameTooLong.

    HTTP clients and servers resolve `.` and `..` in a path: such a request would touch another object.
    """
    length = len(check_text(op, key))
    if not key or "\0" in key or any(part in (".", "..") for part in key.split("/")):
        raise IllegalName(op, key, "empty, or with NUL, '.' or '..' in it")
    if length > KEY_BYTES_MAX:
        raise NameTooLong(op, key, f"{length} bytes, {KEY_BYTES_MAX} at most")

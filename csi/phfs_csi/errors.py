"""Answers that are errors, each with its gRPC code, and those of `phfs_fuse` as such. Owns no state."""

from __future__ import annotations

from typing import ClassVar

from grpc import StatusCode

from phfs_fuse import errors


class CsiError(Exception):
    """One line for whoever reads the events of a pod: the thing, the reason, the remedy. Never a secret."""

    code: ClassVar[StatusCode] = StatusCode.INTERNAL


class InvalidArgument(CsiError):
    code = StatusCode.INVALID_ARGUMENT


class NotFound(CsiError):
    code = StatusCode.NOT_FOUND


class AlreadyExists(CsiError):
    """The same name or path, asked for otherwise."""

    code = StatusCode.ALREADY_EXISTS


class Aborted(CsiError):
    """Another call for this volume is at work; the same call may be made again."""

    code = StatusCode.ABORTED


class FailedPrecondition(CsiError):
    code = StatusCode.FAILED_PRECONDITION


class OutOfRange(CsiError):
    code = StatusCode.OUT_OF_RANGE


class ResourceExhausted(CsiError):
    code = StatusCode.RESOURCE_EXHAUSTED


class PermissionDenied(CsiError):
    code = StatusCode.PERMISSION_DENIED


class Unavailable(CsiError):
    """May succeed later."""

    code = StatusCode.UNAVAILABLE


class DeadlineExceeded(CsiError):
    code = StatusCode.DEADLINE_EXCEEDED


class Internal(CsiError):
    code = StatusCode.INTERNAL


_OF_PHFS: tuple[tuple[type[Exception], type[CsiError]], ...] = (  # the first that fits
    (errors.UsageError, InvalidArgument),
    (errors.StoreStartupError, FailedPrecondition),
    (errors.LocalStateError, FailedPrecondition),
    (errors.StartupError, Internal),
    (errors.InvalidArgument, InvalidArgument),  # of the store's settings
    (errors.BucketNotFound, FailedPrecondition),
    (errors.AccessDenied, PermissionDenied),
    (errors.StoreTimeout, DeadlineExceeded),
    (errors.StoreUnavailable, Unavailable),
    (errors.PhfsError, Internal),
)


def of_phfs(exc: Exception) -> CsiError | None:
    """An error of `phfs_fuse` as an answer; None: it is a bug."""
    return next((ours(str(exc)) for theirs, ours in _OF_PHFS if isinstance(exc, theirs)), None)

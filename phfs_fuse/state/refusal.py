"""A change that the store refuses for good: which errors say so, and what is kept of one. Pure; owns no state.

An error is judged by its type alone. Credentials that are not accepted settle nothing: others may do.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from enum import Enum
from typing import Final

from phfs_fuse.errors import (
    AccessDenied,
    CredentialsRefused,
    IllegalName,
    InvalidArgument,
    IsADirectory,
    NameTooLong,
    NoSpace,
    NotADirectory,
    NotSupported,
    PhfsError,
    QuotaExceeded,
    TooLarge,
)
from phfs_fuse.host.logs import printable
from phfs_fuse.types import ObjectKey

_FINAL: Final = (
    AccessDenied,
    IllegalName,
    InvalidArgument,
    NameTooLong,
    NoSpace,
    NotSupported,
    QuotaExceeded,
    TooLarge,
)
# An object in the way of a folder, or the other way round: perhaps one that is about to be deleted here.
_IN_THE_WAY: Final = (IsADirectory, NotADirectory)
IN_THE_WAY_TRIES: Final = 5


def is_final(exc: object, tries: int = 1) -> bool:
    """Whether the same request, of which `tries` have failed in a row, is of no use before something else changes."""
    if isinstance(exc, _IN_THE_WAY):
        return tries >= IN_THE_WAY_TRIES
    return isinstance(exc, _FINAL) and not isinstance(exc, CredentialsRefused)


class Operation(Enum):
    UPLOAD = "upload"  # of bytes
    ATTRIBUTES = "attributes"
    MKDIR = "mkdir"
    DELETE = "delete"
    RENAME = "rename"

    @property
    def is_over(self) -> bool:
        """Whether it was undone in the tree; else it stays, and is tried again now and then."""
        return self in (Operation.DELETE, Operation.RENAME)


_OUTCOMES: Final = {
    Operation.DELETE: "it is there again",
    Operation.RENAME: "it has its old name again",
}


@dataclass(frozen=True, slots=True)
class Refusal:
    """`path` is below the mount point; `key` is what the store was asked to write or delete."""

    operation: Operation
    key: ObjectKey
    path: bytes
    reason: str
    errno: int
    at_ns: int

    @classmethod
    def of(cls, operation: Operation, key: ObjectKey, path: bytes, exc: PhfsError) -> Refusal:
        return cls(operation, key, path, str(exc), exc.errno, time.time_ns())

    @property
    def line(self) -> str:
        """One line for people."""
        outcome = _OUTCOMES.get(self.operation, "it waits here and is tried again")
        path = self.path.decode(errors="replace")
        return printable(f"{path}: {self.operation.value} refused: {self.reason}; {outcome}")


def summary(count: int) -> str:
    return f"the store refused {count} change{'s' * (count > 1)} for good"

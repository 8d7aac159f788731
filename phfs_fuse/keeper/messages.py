"""What keeper and worker say to each other: one JSON object per packet of a SOCK_SEQPACKET socket pair.

Start: worker CHECKED (or FAILED), keeper DESCRIPTOR with the open connection as SCM_RIGHTS, worker READY (or
FAILED).
End: keeper DRAIN (once more with `now` when it is in a hurry), worker UNMOUNT, keeper UNMOUNTED or BUSY.
A worker that resumes starts in the same way.
Upgrade: worker UPGRADE (or a signal to the keeper); a second worker of what is installed now looks at the state and
says STANDBY (or FAILED: the first one gets REFUSED), the first gets HANDOVER, answers what is in work and ends, the
second gets GO and resumes.
Any time: worker EXPIRE, keeper EXPIRED when the kernel was told, in the same order. Only a keeper whose DESCRIPTOR
says `expires` knows them, and only one that says EXPIRES_AND_DROPS what `drop` is.
End of file means that the other side is gone.
Owns no state. Standard library only: the keeper imports this.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import Enum
from typing import Final

from phfs_fuse.config import json_text

PACKET_BYTES_MAX: Final = 16384
EXPIRES_AND_DROPS: Final = 2  # of `expires`; older keepers say True
REASON_CHARS_MAX: Final = 2000  # escaped as JSON at most 6 bytes each: always fits into one packet


class Kind(Enum):
    CHECKED = "checked"  # nothing stands against mounting
    FAILED = "failed"  # the worker cannot serve and ends: `reason`, `exit_code`
    READY = "ready"  # the worker serves
    STANDBY = "standby"  # can take over, and waits for GO
    UPGRADE = "upgrade"  # asks for another worker in its place
    UNMOUNT = "unmount"  # asks for the end of the mount: `lazy`
    EXPIRE = (
        "expire"  # the kernel has to look `names` up again (inode of the directory, name in hex), or to `drop` them
    )
    DESCRIPTOR = "descriptor"  # carries the /dev/fuse descriptor of the mount
    DRAIN = "drain"  # upload everything, then ask for UNMOUNT; `now`: wait for no upload
    UNMOUNTED = "unmounted"
    HANDOVER = "handover"  # answer what is in work, then end: another worker goes on
    REFUSED = "refused"  # no upgrade: `reason`, `exit_code`
    GO = "go"  # the worker before has ended
    BUSY = "busy"  # still mounted: `reason`
    EXPIRED = "expired"


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    kind: Kind
    reason: str = ""
    exit_code: int = 0
    lazy: bool = False
    now: bool = False
    expires: int = 0
    drop: bool = False
    names: Sequence[tuple[int, str]] = ()


def encode(message: Message) -> bytes:
    """Without what says nothing: the other side may be of a version that does not know it."""
    said = {field.name: getattr(message, field.name) for field in fields(message)}
    said |= {"kind": message.kind.value, "reason": message.reason[:REASON_CHARS_MAX]}
    return json.dumps({name: value for name, value in said.items() if value}).encode()


def decode(packet: bytes) -> Message:
    """Raises ValueError, TypeError or KeyError: not a message of this version."""
    said = json_text.parse(packet)
    return Message(**said | {"kind": Kind(said["kind"])})

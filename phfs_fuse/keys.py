"""Names <-> key segments, group names <-> prefixes, and which of them are legal. Pure; owns no state.

A name is the bytes that the kernel sends; a segment is the part of a key between two slashes. They are the same
text, but for bytes that are not UTF-8: each is written as U+201B and two upper-case hex digits (rclone's way).
"""

from __future__ import annotations

import re
from typing import Final

from phfs_fuse.errors import ConfigError, IllegalName, NameTooLong, ReadOnly
from phfs_fuse.types import KEY_BYTES_MAX, NAME_BYTES_MAX, ObjectKey

QUOTE: Final = "‛"  # noqa: RUF001
_ENCODE: Final = re.compile(QUOTE + "(?=" + QUOTE + "|[89A-F][0-9A-F])")
_DECODE: Final = re.compile(QUOTE + "(" + QUOTE + "|[89A-F][0-9A-F])")

RCLONE_LINK: Final = ".rclonelink"  # a symlink as rclone's --links stores it: the target is the body
MINIO_FOLDER: Final = "__XLDIR__"  # MinIO takes an object `x__XLDIR__` for the marker of the directory `x`
TRIAL: Final = ".phfs-probe-"  # begins the name of an object on which a mount tries out its store: never shown
OBJECT_BESIDE: Final = ".phfs-file"  # shows the object `x` where `x/y` makes `x` a directory
RECORDS: Final = ".phfs"  # records of the CSI plugin: a mount of the whole bucket neither lists nor changes them
BODY: Final = OBJECT_BESIDE.encode()  # shows in a directory the bytes that its marker holds


def group_prefix(group: str) -> str:
    """The prefix of a group: `groups/` and the name in lower case with `_` as `-`, as PrimeHub forms it."""
    name = group.lower().replace("_", "-")
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", name) or ".." in name:
        raise ConfigError("group", group, "letters, digits, '-', '_' and '.', beginning with a letter or digit")
    return f"groups/{name}/"


def segment_of(name: bytes) -> str:
    """The key segment for `name`. Raises: NameTooLong, IllegalName (EINVAL)."""
    if len(name) > NAME_BYTES_MAX:
        raise NameTooLong("name", repr(name[:40]), f"longer than {NAME_BYTES_MAX} bytes")
    if name in (b"", b".", b"..") or b"/" in name or b"\0" in name:
        raise IllegalName("name", repr(name), "cannot be the name of an object")
    if name.startswith(TRIAL.encode()):
        raise IllegalName("name", repr(name), f"names that begin with {TRIAL} are for trials of the store")
    return _escaped(name)


def _escaped(name: bytes) -> str:
    try:
        text = name.decode()
        return _ENCODE.sub(QUOTE * 2, text) if QUOTE in text else text
    except UnicodeDecodeError:
        pass
    text = name.decode("utf-8", "surrogateescape")
    text = _ENCODE.sub(QUOTE * 2, text)
    return "".join(f"{QUOTE}{ord(c) - 0xDC00:02X}" if "\udc80" <= c <= "\udcff" else c for c in text)


def shortened(name: bytes, segment_bytes: int) -> bytes:
    """The longest beginning of `name` that has at most `segment_bytes` in a key. No character is cut in two."""
    text = name.decode("utf-8", "surrogateescape")
    while len(_escaped(name).encode()) > segment_bytes:
        text = text[:-1]
        name = text.encode("utf-8", "surrogateescape")
    return name


def new_segment(name: bytes) -> str:
    """The key segment for a name that is to be made. Raises: NameTooLong, IllegalName also for names that would
    show as something else at the next mount."""
    for suffix in (RCLONE_LINK, OBJECT_BESIDE, MINIO_FOLDER):
        if name.endswith(suffix.encode()):
            raise IllegalName("name", repr(name), f"the ending {suffix} has a meaning of its own, choose another")
    return segment_of(name)


def name_of(segment: str) -> bytes:
    """The name that shows a segment found in the store. Raises: IllegalName if there is none: the segment is
    empty, `.`, `..`, too long, that of a trial, or not what `segment_of` would make of that name."""
    if QUOTE in segment:
        name = _DECODE.sub(lambda m: m[1] if m[1] == QUOTE else chr(0xDC00 + int(m[1], 16)), segment).encode(
            "utf-8", "surrogateescape"
        )
    else:
        name = segment.encode("utf-8", "surrogatepass")
    try:
        legal = segment_of(name) == segment
    except (IllegalName, NameTooLong):
        legal = False
    if not legal:
        raise IllegalName("key", repr(segment), "is no legal file name")
    return name


def is_record(key: str) -> bool:
    """Whether `key` is that of the CSI plugin's records, or of something in it."""
    return key.partition("/")[0] == RECORDS


def require_no_record(key: str) -> None:
    """Before a change of `key`. Raises: ReadOnly."""
    if is_record(key):
        raise ReadOnly("change", key, "is a record of the CSI plugin")


def changed(parent: str, segment: str) -> ObjectKey:
    """As `join`, for a name that is to be made or removed. Raises: NameTooLong, ReadOnly."""
    key = join(parent, segment)
    require_no_record(key)
    return key


def join(parent: str, segment: str) -> ObjectKey:
    """`parent` ("" or ending in "/") and a segment. Raises: NameTooLong if the key has over 1024 bytes."""
    key = parent + segment
    if len(key) * 4 > KEY_BYTES_MAX and len(key.encode()) > KEY_BYTES_MAX:
        raise NameTooLong("key", key[:60] + "...", f"longer than {KEY_BYTES_MAX} bytes")
    return ObjectKey(key)

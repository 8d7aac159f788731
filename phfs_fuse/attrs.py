"""POSIX attributes <-> user metadata, in the form that rclone, s3fs and geesefs all parse. Pure; owns no state.

`mode` is zero-prefixed octal with the file type (`0100644`), `uid` and `gid` are decimal, `mtime` is seconds with a
fraction. Of other writers also read: s3fs's decimal `mode`, geesefs's `--symlink-target`.
"""

from __future__ import annotations

import stat
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote, unquote_to_bytes

from phfs_fuse.types import ID_MAX, decimal, time_ns

TYPES: Final = frozenset(
    (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK)
)
USER_XATTR: Final = b"user."  # begins the names of extended attributes that are kept
GEESEFS_TARGET: Final = "--symlink-target"
CHECKSUM: Final = "md5chksum"  # of the bytes, as rclone stores it with what it uploads in parts
STORED: Final = frozenset(("mode", "uid", "gid", "mtime"))  # names of `to_metadata` that no file goes without
XATTR: Final = (
    "xattr-"  # + the name of a user.* attribute in hex (metadata names have no case); the value in unpadded base64
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Attrs:
    """What is kept of a file beside its bytes. `mode` has the type; times in nanoseconds since the epoch; `link` is
    the target of a symbolic link that is kept here and not in the bytes (as geesefs does)."""

    mode: int
    uid: int
    gid: int
    mtime_ns: int
    rdev: int = 0
    xattrs: Mapping[bytes, bytes] | None = None
    link: bytes | None = None


def _b64(raw: bytes) -> str:
    return urlsafe_b64encode(raw).decode().rstrip("=")


def _unb64(text: str) -> bytes:
    return urlsafe_b64decode(text + "=" * (-len(text) % 4))


def to_metadata(attrs: Attrs) -> dict[str, str]:
    sign = "-" if attrs.mtime_ns < 0 else ""
    seconds, ns = divmod(abs(attrs.mtime_ns), 10**9)
    mtime = f"{sign}{seconds}.{ns:09d}"
    found = {"mode": f"0{attrs.mode:o}", "uid": str(attrs.uid), "gid": str(attrs.gid), "mtime": mtime}
    if attrs.rdev:
        found["rdev"] = str(attrs.rdev)
    if attrs.link is not None:
        found[GEESEFS_TARGET] = quote(attrs.link)
    for name, value in (attrs.xattrs or {}).items():
        found[XATTR + name.hex()] = _b64(value)
    return found


def others(metadata: Mapping[str, str], *, same_bytes: bool) -> dict[str, str]:
    """User metadata that is no attribute of ours. A checksum goes with the bytes that it was of."""
    ours = STORED | {"rdev", GEESEFS_TARGET} | (set() if same_bytes else {CHECKSUM})
    return {name: value for name, value in metadata.items() if name not in ours and _xattr_name(name) is None}


def parse_mode(text: str) -> int | None:
    """Mode with or without type bits, or None. Octal where it begins with 0 or only so has a type that exists."""
    if not text.isascii() or not text.isdigit() or len(text) > 12:
        return None
    octal = int(text, 8) if not set(text) & {"8", "9"} else -1
    if text.startswith("0"):
        return octal if 0 <= octal <= 0o177777 else None
    decimal = int(text)
    for mode in (decimal, octal):
        if 0 < mode <= 0o177777 and stat.S_IFMT(mode) in TYPES:
            return mode
    return octal if 0 <= octal <= 0o7777 else None


def parse_seconds(text: str) -> int | None:
    """Nanoseconds of `[-]seconds[.fraction]`, or None; no float in between, so no digit is lost. A time out of
    range, as most of the years 1 to 9999 are, is clamped."""
    whole, _, fraction = text.partition(".")
    sign = -1 if whole.startswith("-") else 1
    digits = whole.removeprefix("-")
    if not digits.isascii() or not digits.isdigit() or len(digits) > 12:
        return None
    if fraction and not (fraction.isascii() and fraction.isdigit()):
        return None
    return time_ns(sign * (int(digits) * 10**9 + int((fraction + "0" * 9)[:9])))


def _parse_id(text: str | None, default: int) -> int:
    number = decimal(text or "", ID_MAX)
    return default if number is None else number


def _xattr_name(name: str) -> bytes | None:
    """Of the user.* attribute that the metadata `name` holds; None: it holds none. Others (security.*, trusted.*) are
    never shown: whoever may write the object would choose what the kernel takes them for."""
    if not name.startswith(XATTR):
        return None
    try:
        found = bytes.fromhex(name.removeprefix(XATTR))
    except ValueError:
        return None
    return found if found.startswith(USER_XATTR) and b"\0" not in found else None


def _parse_xattrs(metadata: Mapping[str, str]) -> dict[bytes, bytes] | None:
    found: dict[bytes, bytes] = {}
    for name, value in metadata.items():
        if (shown := _xattr_name(name)) is not None:
            try:
                found[shown] = _unb64(value)
            except ValueError:
                continue  # not ours
    return found or None


def from_metadata(metadata: Mapping[str, str], modified_ns: int, default: Attrs) -> Attrs:
    """Attributes of an object; what it lacks, or has in a form that cannot be read, is taken from `default`
    (the times from `modified_ns`)."""
    mode = parse_mode(metadata.get("mode", ""))
    if mode is None:
        mode = default.mode
    elif not stat.S_IFMT(mode):
        mode |= stat.S_IFMT(default.mode)
    link = metadata.get(GEESEFS_TARGET)
    if link is not None and stat.S_ISREG(default.mode):
        mode = stat.S_IFLNK | 0o777
    if stat.S_ISDIR(mode) != stat.S_ISDIR(default.mode) or stat.S_IFMT(mode) not in TYPES:
        mode = default.mode  # a directory is what its key says
    mtime_ns = parse_seconds(metadata.get("mtime", ""))
    return Attrs(
        mode=mode,
        uid=_parse_id(metadata.get("uid"), default.uid),
        gid=_parse_id(metadata.get("gid"), default.gid),
        mtime_ns=modified_ns if mtime_ns is None else mtime_ns,
        rdev=_parse_id(metadata.get("rdev"), 0),
        xattrs=_parse_xattrs(metadata),
        link=unquote_to_bytes(link) if link is not None and stat.S_ISLNK(mode) else None,
    )

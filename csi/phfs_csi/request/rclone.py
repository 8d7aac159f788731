"""csi-rclone's volume attributes -> ours, so that its volumes move over as they are. Owns no state.

csi-rclone takes `remote`, `remotePath`, `remotePathSuffix`, `configData` (an rclone.conf), and hands every other
key to rclone as a flag. Source: rclone documentation of `rclone mount` and of the S3 backend.
"""

from __future__ import annotations

import configparser
import difflib
import logging
import re
from collections.abc import Callable, Mapping
from typing import Final

from phfs_csi.errors import InvalidArgument
from phfs_fuse.config import values

log = logging.getLogger(__name__)

PATH: Final = ("remote", "remotePath", "remotePathSuffix")
TEXTS: Final = frozenset({"configData"})  # of several lines
CREDENTIALS: Final = frozenset({"s3-access-key-id", "s3-secret-access-key", "s3-session-token"})
_OUR_PLACE: Final = ("bucket", "prefix", "group", "endpoint")
UMASK: Final = "000"  # rclone's mounts ask nobody for permission, and what it has stored names no owner and no mode
_TYPO: Final = 0.92  # likeness from which a flag is taken for a mistake rather than for another flag

# Met in any case.
_GIVEN_ANYWAY: Final = frozenset(
    {"s3-provider", "s3-env-auth", "s3-no-check-bucket", "allow-other", "allow-non-empty", "links", "vfs-links"}
)
_ONE_WORDS: Final = """
transfers checkers retries timeout contimeout daemon links metadata verbose quiet bwlimit umask uid gid
bind exclude include filter header immutable inplace checksum tpslimit
"""
_ONE_WORD: Final = frozenset(_ONE_WORDS.split())


def _same(text: str) -> str:
    return text


def _endpoint(text: str) -> str:
    return text if re.match(r"https?://", text) else f"https://{text}"


def _duration(text: str) -> str:
    """`1h30m` in seconds; the units are rclone's."""
    units = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800, "M": 2592000, "y": 31536000, "": 1}
    parts = re.findall(r"([0-9]+(?:\.[0-9]+)?)(ms|[smhdwMy]|)", text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise ValueError("a time such as 5s or 1h30m")
    total = f"{sum(float(number) * units[unit] for number, unit in parts):.3f}s"
    values.seconds(total)
    return total


def _size(text: str) -> str:
    """Without a unit rclone means KiB; `off` is no limit of the volume's own."""
    if text.lower() == "off":
        return ""
    return f"{text}K" if re.fullmatch(r"\d+(\.\d+)?", text) else text


_EQUAL: Final[Mapping[str, tuple[str, Callable[[str], str]]]] = {
    "s3-endpoint": ("endpoint", _endpoint),
    "s3-region": ("region", _same),
    "s3-force-path-style": ("pathStyle", _same),
    "umask": ("umask", _same),
    "uid": ("uid", _same),
    "gid": ("gid", _same),
    "file-perms": ("fileMode", _same),
    "dir-perms": ("dirMode", _same),
    "read-only": ("readOnly", _same),
    "dir-cache-time": ("attrTtl", _duration),
    "vfs-write-back": ("writeBackDelay", _duration),
    "vfs-cache-max-size": ("cacheSize", _size),
}
_SWITCHES: Final = frozenset({"read-only", "s3-force-path-style"})  # true where the flag has no value


def is_meant(words: Mapping[str, str]) -> bool:
    """Whether the volume is named in csi-rclone's way."""
    return any(name in words for name in (*PATH, "configData"))


def is_known(name: str) -> bool:
    """Whether csi-rclone would take `name`: a word of its own, or a flag of rclone; not a mistyped one of ours."""
    if name in (*PATH, *TEXTS, *_EQUAL, *_GIVEN_ANYWAY, *_ONE_WORD):
        return True
    is_flag = re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)+", name) is not None
    return is_flag and not difflib.get_close_matches(name, [*_EQUAL, *CREDENTIALS], 1, _TYPO)


def translated(words: Mapping[str, str], volume_id: str) -> dict[str, str]:
    """Our attributes for csi-rclone's; flags without an equal are named in the log, credentials left out.

    Raises: InvalidArgument.
    """
    remote = words.get("remote", "")
    if not remote or not words.get("remotePath"):
        raise InvalidArgument("csi-rclone's volume attributes 'remote' and 'remotePath' are needed together")
    if both := sorted(set(words) & set(_OUR_PLACE)):
        raise InvalidArgument(f"volume attribute {both[0]!r} cannot be used together with csi-rclone's 'remote'")
    config = config_flags(words.get("configData", ""), remote)
    if not config and remote != "s3":
        raise InvalidArgument(f"csi-rclone's remote {remote[:80]!r}: neither 's3' nor in 'configData'")
    flags = {name: text for name, text in {**config, **words}.items() if name not in (*PATH, *TEXTS, *CREDENTIALS)}
    _name_ignored(flags, volume_id)
    ours = {name: text for name, text in flags.items() if name not in _EQUAL and not _is_flag(name)}
    return {"umask": UMASK, **_path(words), **_equals(flags), **ours}


def _equals(flags: Mapping[str, str]) -> dict[str, str]:
    found = {}
    for flag, (name, convert) in _EQUAL.items():
        if text := flags.get(flag, "") or ("true" if flag in _SWITCHES and flag in flags else ""):
            try:
                found[name] = convert(text)
            except ValueError as exc:
                raise InvalidArgument(f"csi-rclone's {flag}: {text[:80]!r} is not valid, expected {exc}") from None
    return {name: text for name, text in found.items() if text}


def _path(words: Mapping[str, str]) -> dict[str, str]:
    """rclone takes slashes that are too many for one."""
    path = words["remotePath"] + words.get("remotePathSuffix", "")
    bucket, _, prefix = re.sub("/+", "/", path).strip("/").partition("/")
    return {"bucket": bucket, "prefix": prefix} if prefix else {"bucket": bucket}


def _is_flag(name: str) -> bool:
    return "-" in name or name in _ONE_WORD


def _name_ignored(flags: Mapping[str, str], volume_id: str) -> None:
    ignored = [name for name in sorted(flags) if _is_flag(name) and name not in (*_EQUAL, *_GIVEN_ANYWAY)]
    if ignored:
        log.warning("volume %s: no equal here for rclone's %s: ignored", ascii(volume_id), ", ".join(ignored))


def config_flags(text: str, remote: str) -> dict[str, str]:
    """The section `remote` of an rclone.conf as flags of the S3 backend; {}: there is none of that name.

    Raises: InvalidArgument when the text is no such file, or the remote no S3 store; it never repeats the text.
    """
    parser = configparser.ConfigParser(interpolation=None, strict=False, default_section="\0")
    try:
        parser.read_string(text)
    except configparser.Error:
        raise InvalidArgument("csi-rclone's configData is no rclone.conf, or an encrypted one") from None
    if not remote or not parser.has_section(remote):
        return {}
    section = {name: text for name, text in parser.items(remote) if text}
    if (kind := section.pop("type", "")) != "s3":
        raise InvalidArgument(f"csi-rclone's remote {remote[:80]!r} is of type {kind[:80]!r}, only s3 can be mounted")
    return {f"s3-{name.replace('_', '-')}": text.strip() for name, text in section.items()}

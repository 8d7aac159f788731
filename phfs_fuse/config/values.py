"""What people write in flags, variables and files -> typed values. Owns no state.

Each function takes the raw value (a str, or what TOML gives) and raises `ValueError` with the wanted form.
"""

from __future__ import annotations

import grp
import os
import pwd
import re
from collections.abc import Callable, Iterable
from enum import Enum
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from phfs_fuse.types import GIB, KIB, MIB, NAME_BYTES_MAX, SIZE_BYTES_MAX, decimal

Raw = str | int | float | bool
Parser = Callable[[Raw], object]

_UNITS: Final = {"": 1, "k": KIB, "m": MIB, "g": GIB, "t": 1 << 40}
_SECONDS: Final = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
COUNT_MAX: Final = (1 << 63) - 1
SECONDS_MAX: Final = 36_500 * 86_400.0
QUOTA_BYTES_MAX: Final = SIZE_BYTES_MAX  # what statfs can tell in blocks, with much to spare
_TRUE: Final = ("true", "yes", "on", "1")
_FALSE: Final = ("false", "no", "off", "0")


def text(raw: Raw) -> str:
    if not isinstance(raw, str) or not raw.strip() or "\0" in raw:
        raise ValueError("a text that is not empty")
    return raw.strip()


def size(raw: Raw) -> int:
    """Bytes: `512`, `128K`, `1.5G`, `10GiB`, `10Gi`; powers of 1024."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*(?:([kmgt])(?:ib?|b)?|b?)", _word(raw))
    if found is None:
        raise ValueError("a size such as 128K, 512M or 10G")
    return int(_limited(float(found[1]) * _UNITS[found[2] or ""], SIZE_BYTES_MAX, "a size of at most 1048576T"))


def seconds(raw: Raw) -> float:
    """`5`, `0.5`, `500ms`, `5s`, `1m`, `2h`, `1d`."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*(ms|[smhd]?)", _word(raw))
    if found is None:
        raise ValueError("a time such as 5, 500ms, 5s or 1m")
    return _limited(float(found[1]) * _SECONDS[found[2]], SECONDS_MAX, "a time of at most 36500d")


def _limited(number: float, most: float, wanted: str) -> float:
    """Of hundreds of digits a float is infinite."""
    if number > most:
        raise ValueError(wanted)
    return number


def count(raw: Raw) -> int:
    if (number := decimal(_word(raw), COUNT_MAX)) is None:
        raise ValueError("a whole number")
    return number


def mode(raw: Raw) -> int:
    """Octal digits, in TOML as a string: of a TOML integer nobody can tell whether it was meant octal."""
    if not isinstance(raw, str) or not re.fullmatch(r"(?:0o)?[0-7]{1,5}", raw.strip()):
        raise ValueError("an octal mode as a string, such as '0644'")
    return int(raw, 8)


def boolean(raw: Raw) -> bool:
    word = _word(raw, booleans=True)
    if word not in _TRUE + _FALSE:
        raise ValueError("true or false")
    return word in _TRUE


def choice(*names: str) -> Parser:
    def parse(raw: Raw) -> str:
        if (word := _word(raw)) not in names:
            raise ValueError(" or ".join((", ".join(names[:-1]), names[-1])))
        return word

    return parse


def one_of(kind: type[Enum]) -> Parser:
    """The value of an enumeration, as the enumeration."""
    parse = choice(*(str(member.value) for member in kind))
    return lambda raw: kind(parse(raw))


def path(raw: Raw) -> Path:
    """Absolute; `~` is the caller's home, relative to the working directory."""
    try:
        return Path(text(raw)).expanduser().absolute()
    except RuntimeError as exc:  # ~nobody-of-this-name
        raise ValueError("a path") from exc


def quotas(raw: Raw) -> dict[str, int]:
    """`10G` for the whole mount, `a/b=5G` for a folder of it, several with `;` or a line each; `#` begins a comment.
    Bytes by path, "" for the mount."""
    found: dict[str, int] = {}
    for line in str(raw).splitlines() if not isinstance(raw, bool) else ["?"]:
        for item in filter(None, map(str.strip, line.partition("#")[0].split(";"))):
            path, _, limit = item.rpartition("=")
            found[folder(path)] = quota_size(limit)
    return found


def quota_size(raw: Raw) -> int:
    try:
        limit = size(raw)
    except ValueError:
        limit = 0
    if not 0 < limit <= QUOTA_BYTES_MAX:
        raise ValueError("SIZE or PATH=SIZE with a size such as 512M or 10G")
    return limit


def folder(path: str) -> str:
    """A path below the mount point, in one form: `a/b`."""
    parts = [part for part in path.strip().split("/") if part]
    if any(part in (".", "..") or "\0" in part or len(os.fsencode(part)) > NAME_BYTES_MAX for part in parts):
        raise ValueError("a path below the mount point without '.' and '..'")
    return "/".join(parts)


def user(raw: Raw) -> int:
    return _id(raw, lambda name: pwd.getpwnam(name).pw_uid, "a user id or name")


def group(raw: Raw) -> int:
    return _id(raw, lambda name: grp.getgrnam(name).gr_gid, "a group id or name")


def bucket(raw: Raw) -> str:
    """Source: S3 user guide, bucket naming rules, with the letters that old buckets and MinIO allow."""
    if not isinstance(raw, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{2,62}", raw):
        raise ValueError("the name of a bucket (3 to 63 letters, digits, '.', '-')")
    return raw


def endpoint(raw: Raw) -> str:
    """`http(s)://host[:port][/path]`, without a slash at the end."""
    url = text(raw).rstrip("/")
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1)
    except ValueError:
        valid = False
    if not valid or parts.query or parts.fragment:
        raise ValueError("a URL such as http://minio:9000")
    if parts.username is not None or parts.password is not None:
        raise ValueError("a URL without credentials in it")
    return url


def group_prefix(raw: Raw) -> str:
    """The prefix of a PrimeHub group: its name in lower case, `_` as `-`."""
    name = text(raw).lower().replace("_", "-")
    if "/" in name or name in (".", ".."):
        raise ValueError("the name of a group")
    return f"groups/{name}/"


def volume(url: str) -> tuple[str, str]:
    """`s3://BUCKET[/PREFIX]` -> (bucket, prefix); the prefix is "" or ends in `/`."""
    found = re.fullmatch(r"s3://([^/]*)(?:/(.*))?", url, re.DOTALL)
    if found is None:
        raise ValueError("s3://BUCKET or s3://BUCKET/PREFIX")
    prefix = found[2] or ""
    return bucket(found[1]), prefix if not prefix or prefix.endswith("/") else prefix + "/"


def nearest(word: str, known: Iterable[str]) -> str:
    """`, did you mean 'x'?` or nothing."""
    import difflib  # only for mistakes

    found = difflib.get_close_matches(word, list(known), 1, 0.6)
    return f", did you mean {found[0]!r}?" if found else ""


def _word(raw: Raw, *, booleans: bool = False) -> str:
    """A scalar as a lower-case word. A TOML `true` is no number, though Python thinks so."""
    if isinstance(raw, bool) and not booleans:
        return "?"
    return str(raw).strip().lower()


def _id(raw: Raw, look_up: Callable[[str], int], wanted: str) -> int:
    try:
        return count(raw)
    except ValueError:
        pass
    try:
        return look_up(str(raw))
    except KeyError:
        raise ValueError(wanted) from None

"""Volume attributes, secrets and mount options -> `VolumeParams`. Owns no state.

The words are our own in camelCase, or csi-rclone's (`phfs_csi.request.rclone` turns those into ours). What is asked
for wins over the secret, the secret over the plugin's defaults; for credentials the secret comes first.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Final

from phfs_csi.errors import InvalidArgument
from phfs_csi.request import rclone
from phfs_csi.request.params import DRAIN_SECONDS, Credentials, VolumeParams
from phfs_fuse.config import values
from phfs_fuse.config.model import StoreConfig
from phfs_fuse.config.options import BY_NAME, DEFAULT_BUCKET, DIR, FILE, GROUP_ID, USER
from phfs_fuse.config.resolve import from_options
from phfs_fuse.errors import UsageError
from phfs_fuse.keys import is_record

VALUE_CHARS_MAX: Final = 64 << 10
PREFIX_BYTES_MAX: Final = 512  # leaves half of a key to the paths below

LOCATION: Final = ("bucket", "prefix", "group", "endpoint")
SETTINGS: Final[Mapping[str, str]] = {  # attribute -> setting of `phfs mount`
    "endpoint": "endpoint-url",
    "region": "region",
    "pathStyle": "path-style",
    "createBucket": "create-bucket",
    "cacheSize": "cache-size",
    "attrTtl": "attr-ttl",
    "writeThrough": "write-through",
    "writeBackDelay": "write-back-delay",
    "onConflict": "on-conflict",
    "drainTimeout": "drain-timeout",
    "quota": "quota",
    "events": "events",
    "uid": "uid",
    "gid": "gid",
    "umask": "umask",
    "fileMode": "file-mode",
    "dirMode": "dir-mode",
    "readOnly": "read-only",
}
ATTRIBUTES: Final = frozenset({*LOCATION, *SETTINGS})
_OF_THE_CLUSTER: Final = ("csi.storage.k8s.io/", "storage.kubernetes.io/")  # what its components add

# A credential is known by letters and digits alone: accessKey, access-key-id, AWS_ACCESS_KEY_ID, s3-access-key-id.
_CREDENTIALS: Final[Mapping[str, str]] = {
    **dict.fromkeys(("accesskey", "accesskeyid", "awsaccesskeyid", "s3accesskeyid"), "access_key"),
    **dict.fromkeys(("secretkey", "secretaccesskey", "awssecretaccesskey", "s3secretaccesskey"), "secret_key"),
    **dict.fromkeys(("sessiontoken", "awssessiontoken", "s3sessiontoken"), "session_token"),
    **dict.fromkeys(("cabundle", "cacrt", "awscabundle"), "ca_bundle"),
}

# Of `-o` these belong to the node or to the volume's attributes; those that name files go by their kind.
_REFUSED_OPTIONS: Final = frozenset({"bucket", "group", "endpoint-url", "profile", "fs-name"})
_GIVEN_ANYWAY: Final = frozenset({"allow-other"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """What a call brings for one volume. Never shown as a whole: it holds secrets."""

    attributes: Mapping[str, str] = field(default_factory=dict, repr=False)
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)
    mount_flags: Sequence[str] = ()
    defaults: Mapping[str, str] = field(default_factory=dict, repr=False)  # of the plugin


def parse_volume(volume_id: str, given: Given, *, drain_seconds: float = DRAIN_SECONDS) -> VolumeParams:
    """Raises: InvalidArgument, which names the key and never repeats a secret."""
    words = merge_words(given)
    attributes = rclone.translated(words, volume_id) if rclone.is_meant(words) else words
    refuse_unknown("volume attribute", attributes, ATTRIBUTES)
    settings = {**_settings(attributes), **flag_settings(given.mount_flags)}
    cache, drain = settings.pop("cache-size", None), settings.pop("drain-timeout", None)
    bucket, prefix = location(attributes)
    return VolumeParams(
        volume_id=volume_id,
        source=f"s3://{bucket}/{prefix}",
        settings=settings,
        credentials=_credentials(given, words.get("remote", "")),
        cache_bytes_max=None if cache is None else values.size(cache),
        drain_seconds=drain_seconds if drain is None else values.seconds(drain),
    )


# --- words


def merge_words(given: Given) -> dict[str, str]:
    """Everything that is no credential, from all three sources. Raises: InvalidArgument.

    The first source that says where the volume is decides whether our words count for that, or csi-rclone's.
    """
    asked = {name: text for name, text in given.attributes.items() if not name.startswith(_OF_THE_CLUSTER)}
    for name in asked:
        if _credential(name) and name not in rclone.CREDENTIALS:
            raise InvalidArgument(f"volume attribute {name!r}: credentials belong into the volume's secret")
    merged: dict[str, str] = {}
    for kind, source in (("volume attribute", asked), ("secret", given.secrets), ("default secret", given.defaults)):
        words = _checked(kind, source)
        if set(merged) & set(LOCATION):
            words = {name: text for name, text in words.items() if name in ATTRIBUTES}
        elif rclone.is_meant(merged):
            words = {name: text for name, text in words.items() if name not in LOCATION}
        merged = {**words, **merged}
    return merged


def _checked(kind: str, source: Mapping[str, str]) -> dict[str, str]:
    """Without its credentials. Raises: InvalidArgument for a name that nobody knows, or a value that smuggles."""
    found = {name: text for name, text in source.items() if not _credential(name)}
    refuse_unknown(kind, [name for name in found if not rclone.is_known(name)], ATTRIBUTES)
    for name, text in found.items():
        if len(text) > VALUE_CHARS_MAX or (name not in rclone.TEXTS and has_controls(text)):
            raise InvalidArgument(f"{kind} {name!r}: control characters, or too long")
    return {name: text.strip() for name, text in found.items()}


def refuse_unknown(kind: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Raises: InvalidArgument that names the first one, with the nearest known one."""
    known = sorted(known)
    for name in sorted(names):
        if name not in known:
            shown = name if name.isprintable() and len(name) < 80 else ascii(name[:80])
            raise InvalidArgument(f"{kind} {shown!r} is not known{values.nearest(name, known)}")


def has_controls(text: str) -> bool:
    """Whether `text` has characters that could end a line, an option or a C string."""
    return re.search(r"[\x00-\x1f\x7f\x85\u2028\u2029]", text) is not None


def location(attributes: Mapping[str, str]) -> tuple[str, str]:
    """Bucket and prefix; the prefix is "" or ends in "/". Raises: InvalidArgument."""
    if "prefix" in attributes and "group" in attributes:
        raise InvalidArgument("volume attributes 'prefix' and 'group' exclude each other")
    bucket = attributes.get("bucket", DEFAULT_BUCKET if "group" in attributes else "")
    if not bucket:
        raise InvalidArgument("volume attribute 'bucket' is missing")
    prefix = attributes.get("prefix", "")
    if "group" in attributes:
        prefix = group_prefix(attributes["group"])
    elif prefix and not prefix.endswith("/"):
        prefix += "/"
    _valid("bucket", values.bucket, bucket)
    if is_record(prefix):
        raise InvalidArgument("volume attribute 'prefix': holds the plugin's own records")
    return bucket, checked_prefix(bucket, prefix)


def group_prefix(group: str) -> str:
    """`groups/<name>/` as PrimeHub forms it. Raises: InvalidArgument."""
    if has_controls(group):
        raise InvalidArgument("volume attribute 'group': control characters")
    return str(_valid("group", values.group_prefix, group))


def checked_prefix(bucket: str, prefix: str) -> str:
    """`prefix` as it is. Raises: InvalidArgument for one that leaves its place, or is no prefix."""
    if has_controls(prefix) or len(prefix.encode("utf-8", "replace")) > PREFIX_BYTES_MAX:
        raise InvalidArgument("volume attribute 'prefix': control characters, or too long")
    try:
        StoreConfig(bucket=bucket, prefix=prefix)
    except UsageError as exc:
        raise InvalidArgument(f"volume attribute {exc}") from exc
    return prefix


def _settings(attributes: Mapping[str, str]) -> dict[str, str]:
    """Of `phfs mount`, by name."""
    named = {name: attributes[name] for name in SETTINGS if attributes.get(name)}
    for name, text in named.items():
        check_setting(f"volume attribute {name!r}", SETTINGS[name], text)
    return {SETTINGS[name]: text for name, text in named.items()}


def check_setting(where: str, setting: str, text: str) -> None:
    """Raises: InvalidArgument; the value is repeated only where it cannot hold a secret."""
    kind = BY_NAME[setting].kind
    parse = values.count if kind in (USER, GROUP_ID) else kind.parse
    if "," in text or has_controls(text):
        raise InvalidArgument(f"{where}: a comma, or a control character")
    _valid(where, parse, text, shown=setting != "endpoint-url")


def _valid(where: str, parse: values.Parser, text: str, *, shown: bool = True) -> object:
    try:
        return parse(text)
    except ValueError as exc:
        what = f"{text[:80]!r} is not valid" if shown else "not valid"
        raise InvalidArgument(f"{where}: {what}, expected {exc}") from None


# --- mount options


def flag_settings(flags: Sequence[str]) -> dict[str, str]:
    """`mountOptions` as settings by name. Raises: InvalidArgument for what is no option of a volume."""
    for flag in flags:
        if "," in flag or has_controls(flag):
            raise InvalidArgument("mountOptions: one option each, without commas or control characters")
    try:
        layer = from_options(flags)
    except UsageError as exc:
        raise InvalidArgument(f"mountOptions: {exc}") from None
    for name in layer:
        if name in _REFUSED_OPTIONS or BY_NAME[name].kind in (FILE, DIR):
            raise InvalidArgument(f"mountOptions: {name} is not for volumes: it is the node's, or an attribute")
    words = {name: "true" if given.raw is True else str(given.raw) for name, given in layer.items()}
    for name, text in words.items():
        check_setting(f"mountOptions: {name}", name, text)
    return {name: text for name, text in words.items() if name not in _GIVEN_ANYWAY}


# --- credentials


def _credential(name: str) -> str | None:
    return _CREDENTIALS.get(re.sub(r"[^a-z0-9]", "", name.lower()))


def _credentials(given: Given, remote: str) -> Credentials:
    """The first source that has any: secret, attributes, defaults. Raises: InvalidArgument for half of a pair."""
    for kind, source in (
        ("secret", given.secrets),
        ("volume attributes", given.attributes),
        ("default secret", given.defaults),
    ):
        if found := _credentials_of(kind, source, remote):
            return found
    return Credentials()


def _credentials_of(kind: str, source: Mapping[str, str], remote: str) -> Credentials:
    found = {**rclone.config_flags(source.get("configData", ""), remote), **source}
    parts = {part: text.strip() for name, text in found.items() if (part := _credential(name)) and text.strip()}
    if ("access_key" in parts) != ("secret_key" in parts) or ("session_token" in parts and "access_key" not in parts):
        raise InvalidArgument(f"{kind}: access key and secret key come together")
    for item in fields(Credentials):
        if item.name != "ca_bundle" and has_controls(parts.get(item.name, "")):
            raise InvalidArgument(f"{kind}: control characters in a credential")
    if "ca_bundle" in parts and "-----BEGIN CERTIFICATE-----" not in parts["ca_bundle"]:
        raise InvalidArgument(f"{kind}: the CA bundle is no certificate in PEM form")
    return Credentials(**parts)

"""Flags, `-o` options, variables and a file -> one `MountConfig`, and its way to the worker. Owns no state.

The first of flags, options, variables, file and default that has a setting wins (docs/configuration.md).
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Final, TypeVar, cast, get_args, get_type_hints

from phfs_fuse.config import json_text, values
from phfs_fuse.config.dirs import cache_home, state_home
from phfs_fuse.config.model import (
    CacheConfig,
    KernelConfig,
    MountConfig,
    QuotaConfig,
    StoreConfig,
    TreeConfig,
    WritebackConfig,
)
from phfs_fuse.config.options import BY_KEY, BY_NAME, DEFAULT_BUCKET, SETTINGS, Setting
from phfs_fuse.config.values import Raw
from phfs_fuse.errors import ConfigError, UsageError

CONFIG_VERSION: Final = 1
SOCKET_PATH_BYTES_MAX: Final = 107  # Source: unix(7), sun_path with its NUL


@dataclass(frozen=True, slots=True)
class GivenValue:
    """A raw value and where it was written, as the user would find it again."""

    raw: Raw
    where: str


Layer = Mapping[str, GivenValue]


@dataclass(frozen=True, slots=True)
class Resolved:
    """`credentials_file` goes into the environment of the mount, never into the config."""

    config: MountConfig
    credentials_file: Path | None


# --- the sources


def from_flags(flags: Mapping[str, Raw | Sequence[Raw] | None]) -> Layer:
    """Values of the command line by name of the setting; None: not given."""
    return {name: GivenValue(_joined(raw), f"--{name}") for name, raw in flags.items() if raw is not None}


def _joined(raw: Raw | Sequence[Raw]) -> Raw:
    """The values of a setting that may be given several times, as one."""
    return raw if isinstance(raw, str | int | float) else ";".join(map(str, raw))


def from_environ(environ: Mapping[str, str]) -> Layer:
    """The `PHFS_*` variables that name a setting; an empty one counts as not set."""
    found = {setting.name: setting.variable for setting in SETTINGS if environ.get(setting.variable)}
    return {name: GivenValue(environ[variable], variable) for name, variable in found.items()}


def from_aws(environ: Mapping[str, str]) -> Layer:
    """The endpoint that boto3 would take: it is part of the volume's identity."""
    if environ.get("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "").lower() == "true":
        return {}
    for variable in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):
        if url := environ.get(variable):
            return {"endpoint-url": GivenValue(url, variable)}
    return {}


# What mount(8), fstab and systemd pass to every helper. Source: mount(8), systemd.mount(5)
_STANDARD_WORDS: Final = """
rw defaults auto noauto nofail user nouser users owner group _netdev exec dev nodev suid nosuid async
atime noatime diratime nodiratime relatime norelatime strictatime nostrictatime lazytime nolazytime
silent loud mand nomand iversion noiversion default-permissions
"""
_STANDARD: Final = frozenset(_STANDARD_WORDS.split())
_SHORT: Final = {"ro": "read-only", "noexec": "noexec", "sync": "write-through"}
_UNDO: Final = {"rw": "read-only", "exec": "noexec", "async": "write-through"}  # of the same list
_SECRET: Final = re.compile(r"secret|password|token|access-?key|credential(?!s-file)")


def from_options(lists: Iterable[str], *, sloppy: bool = False) -> Layer:
    """The `-o` options of mount(8): `name`, `name=value`, `_` for `-`; the last one of a name wins.

    Raises: UsageError for what is no setting, unless `sloppy`; its message never repeats a value.
    """
    found: dict[str, GivenValue] = {}
    for word in (word.strip() for text in lists for word in text.split(",") if word.strip()):
        name, has_value, value = word.partition("=")
        name = _name(name)
        if not has_value and name in _UNDO:
            found.pop(_UNDO[name], None)
        if not has_value and name in _SHORT:
            found[_SHORT[name]] = GivenValue(True, f"-o {name}")
        elif not (_is_standard(name, bool(has_value)) or (sloppy and name not in BY_NAME)):
            found[name] = _option(name, value if has_value else None, found.get(name))
    return found


def _is_standard(name: str, has_value: bool) -> bool:
    if name.startswith("x-") or name == "user":  # user=NAME comes from mount(8) for `users`
        return True
    return name == "comment" or (name in _STANDARD and not has_value)


def _option(name: str, value: str | None, before: GivenValue | None) -> GivenValue:
    if name not in BY_NAME:
        if _SECRET.search(name):
            raise UsageError(
                f"-o {name} is refused, credentials are not for options: use profile= or credentials-file="
            )
        raise UsageError(f"-o {name}: no such option{values.nearest(name, BY_NAME)}")
    if value is None and not BY_NAME[name].is_switch:
        raise UsageError(f"-o {name}: needs a value, as in {name}={BY_NAME[name].kind.metavar}")
    if before is not None and BY_NAME[name].is_list:
        value = f"{before.raw};{value}"
    return GivenValue(True if value is None else value, f"-o {name}")


def from_file(path: Path) -> Layer:
    """A TOML file of tables. Raises: UsageError when it cannot be read or has a key that is no setting."""
    import tomllib  # late: keeper and worker read no such file

    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise UsageError(f"{path}: cannot be read: {exc.strerror}") from exc
    except ValueError as exc:  # also UnicodeDecodeError
        raise UsageError(f"{path}: is not TOML: {exc}") from exc
    return dict(entry for table, keys in tables.items() for entry in _table(path, table, keys))


def _table(path: Path, table: str, keys: object) -> Iterator[tuple[str, GivenValue]]:
    known = {key.partition(".")[0] for key in BY_KEY}
    if table not in known or not isinstance(keys, dict):
        hint = values.nearest(table, known) or f", the tables are {', '.join(sorted(known))}"
        raise UsageError(f"{path}: no table [{table}]{hint}")
    for key, raw in keys.items():
        where = f"{path} [{table}] {key}"
        if (setting := BY_KEY.get(f"{table}.{_name(key)}")) is None:
            inside = [key.partition(".")[2] for key in BY_KEY if key.startswith(table + ".")]
            raise UsageError(f"{where}: no such key{values.nearest(_name(key), inside)}")
        if isinstance(raw, list) and setting.is_list and all(isinstance(item, str | int) for item in raw):
            raw = _joined(raw)
        if not isinstance(raw, str | int | float):
            raise ConfigError(where, raw, "a single value")
        yield setting.name, GivenValue(raw, where)


def _name(word: str) -> str:
    return word if word.startswith("_") else word.strip().replace("_", "-").lower()


# --- all of them together


def gather(flags: Layer, options: Layer, environ: Mapping[str, str] = os.environ) -> Layer:
    """Every setting that is given anywhere, by the source that wins."""
    upper = {**from_environ(environ), **options, **flags}
    file = from_file(_parse(BY_NAME["config"], upper["config"])) if "config" in upper else {}
    return {**from_aws(environ), **file, **upper}


def resolve(source: str | None, mountpoint: Path, given: Layer) -> Resolved:
    """One mount. `source` is `s3://BUCKET[/PREFIX]`, or None when a group names the prefix.

    Raises: UsageError, with the place where the wrong value was written.
    """
    parsed = {name: _parse(BY_NAME[name], item) for name, item in given.items()}
    bucket, prefix = _volume(source, given, parsed)
    try:
        config = _build(bucket, prefix, mountpoint, parsed, given)
    except ConfigError as exc:
        raise _located(exc, given) from exc
    if len(os.fsencode(config.control_socket)) > SOCKET_PATH_BYTES_MAX:
        raise ConfigError("--state-dir", str(config.writeback.directory.parent), "a shorter path")
    if config.store.ca_bundle is not None and not config.store.ca_bundle.is_file():
        raise UsageError(f"{given['ca-bundle'].where}: {config.store.ca_bundle}: no such file")
    return Resolved(config, _credentials_file(given, parsed))


def _parse(setting: Setting, item: GivenValue) -> Any:
    try:
        return setting.kind.parse(item.raw)
    except ValueError as exc:
        if setting.name == "endpoint-url":  # it may hold a password
            raise UsageError(f"{item.where}: not valid, expected {exc}") from None
        raise ConfigError(item.where, item.raw, str(exc)) from exc


def _volume(source: str | None, given: Layer, parsed: Mapping[str, Any]) -> tuple[str, str]:
    if source is None:
        if "group" not in parsed:
            raise UsageError("nothing to mount: name s3://BUCKET[/PREFIX] or --group NAME")
        return str(parsed.get("bucket", DEFAULT_BUCKET)), str(parsed["group"])
    for name in ("group", "bucket"):  # in a variable or file a default, on the same line a contradiction
        if name in given and given[name].where.startswith("-"):
            raise UsageError(f"{given[name].where} cannot be used together with {source}")
    try:
        return values.volume(source)
    except ValueError as exc:
        raise ConfigError("volume", source, str(exc)) from exc


def _build(bucket: str, prefix: str, mountpoint: Path, parsed: Mapping[str, Any], given: Layer) -> MountConfig:
    sections = ("store", "cache", "writeback", "tree", "kernel", "quota", "")
    fields: dict[str, dict[str, Any]] = {name: {} for name in sections}
    umask = parsed.get("umask", 0o022)
    fields["tree"] |= {"uid": os.getuid(), "gid": os.getgid()}
    fields["tree"] |= {"file_mode": 0o666 & ~umask, "dir_mode": 0o777 & ~umask}
    for name, value in parsed.items():
        section, _, field = BY_NAME[name].field.rpartition(".")
        if field:
            fields[section][field] = value
    cache_dir, state_dir = parsed.get("cache-dir", cache_home()), parsed.get("state-dir", state_home())
    if "endpoint-url" in given:
        fields["store"]["endpoint_from"] = given["endpoint-url"].where
    store = StoreConfig(bucket=bucket, prefix=prefix, **fields["store"])
    return MountConfig(
        store=store,
        cache=CacheConfig(directory=cache_dir / store.volume_id, **fields["cache"]),
        writeback=WritebackConfig(directory=state_dir / store.volume_id, **fields["writeback"]),
        tree=TreeConfig(**fields["tree"]),
        quota=QuotaConfig(**fields["quota"]),
        kernel=KernelConfig(mountpoint=mountpoint, **{"fs_name": store.url, **fields["kernel"]}),
        **fields[""],
    )


def _located(exc: ConfigError, given: Layer) -> ConfigError:
    """The same error, with the words of the user in place of the name of the field."""
    for setting in SETTINGS:
        if setting.name in given and setting.field.rpartition(".")[2] == exc.field.rpartition(".")[2]:
            return ConfigError(given[setting.name].where, given[setting.name].raw, exc.wanted)
    return exc


def _credentials_file(given: Layer, parsed: Mapping[str, Any]) -> Path | None:
    """Raises: UsageError when it is not there, or when others can read or change it."""
    if (path := parsed.get("credentials-file")) is None:
        return None
    where = given["credentials-file"].where
    try:
        status = path.stat()
    except OSError as exc:
        raise UsageError(f"{where}: {path}: {exc.strerror}") from exc
    if status.st_mode & 0o006:
        raise UsageError(f"{where}: {path} can be read by everybody: chmod 600 it")
    assert isinstance(path, Path)
    return path


# --- the way to the keeper and the worker


def dump_config(config: MountConfig) -> str:
    """JSON without secrets (a `MountConfig` has none)."""
    return json.dumps({"version": CONFIG_VERSION, **dataclasses.asdict(config)}, default=_plain, indent=1)


def load_config(text: str) -> MountConfig:
    """What `dump_config` was given; a key of an older version gets its default.

    Raises: UsageError when the text is of a newer version, or is none.
    """
    try:
        data = json_text.parse(text)
        if data["version"] > CONFIG_VERSION:
            raise UsageError("the config of the mount is of a newer version of phfs")
        return _restore(MountConfig, data)
    except (ValueError, TypeError, KeyError) as exc:
        raise UsageError(f"the config of the mount cannot be read: {exc}") from exc


def _plain(value: object) -> str:
    return str(value.value if isinstance(value, Enum) else value)


_T = TypeVar("_T")


def _restore(kind: type[_T], data: Mapping[str, Any]) -> _T:
    hints = get_type_hints(kind)
    return kind(**{name: _value(hints[name], data[name]) for name in hints if name in data})


def _value(kind: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(kind):
        return _restore(cast("type[Any]", kind), value)
    if isinstance(kind, type) and issubclass(kind, Enum | Path):
        return kind(value)
    if Path in get_args(kind) and value is not None:
        return Path(value)
    return value

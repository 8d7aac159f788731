"""Settings of a mount as frozen values with their limits checked. Owns no state; reads nothing."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from phfs_fuse.errors import ConfigError
from phfs_fuse.types import GIB, KIB, MIB, S3_PART_BYTES_MAX, S3_PART_BYTES_MIN

SLOWEST_BYTES_PER_SECOND = 16 * KIB  # of one request, with all others beside it
SLOWEST_COPY_BYTES_PER_SECOND = MIB  # of one copy within the store, likewise
COPY_SECONDS_MAX = 3600.0  # a store that says nothing for so long has lost the request


class PosixAttrs(Enum):
    STORE = "store"  # mode, owner and times are kept in object metadata
    IGNORE = "ignore"  # chmod and chown succeed and are forgotten


class OnConflict(Enum):
    KEEP_BOTH = "keep-both"
    OVERWRITE = "overwrite"
    FAIL = "fail"


class EventsMode(Enum):
    AUTO = "auto"  # hear of the changes of others, where the store tells them
    OFF = "off"


class ExclusiveCreate(Enum):
    LOCAL = "local"  # O_EXCL and RENAME_NOREPLACE hold within the mount
    STORE = "store"  # and between mounts: the name is in the store before the call is answered


def _at_least(name: str, value: float, low: float, wanted: str) -> None:
    if not value >= low:
        raise ConfigError(name, value, wanted)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreConfig:
    """Where the objects are. Credentials come from the usual boto3 chain and are never held here."""

    bucket: str
    prefix: str = ""  # "" or ends in "/"
    endpoint_url: str | None = None
    endpoint_from: str = ""  # the flag, variable or file that names it, for messages
    region: str | None = None
    profile: str | None = None
    ca_bundle: Path | None = None  # authorities that may have signed the store's certificate; None: those of boto3
    create_bucket: bool = False
    path_style: bool | None = None  # None: path style with an own endpoint, virtual hosts with AWS
    connect_seconds: float = 5.0
    read_seconds: float = 20.0  # without a byte
    attempts_max: int = 5  # per request
    reads_max: int = 32  # requests at a time
    writes_max: int = 16

    def __post_init__(self) -> None:
        if not self.bucket or "/" in self.bucket:
            raise ConfigError("bucket", self.bucket, "the name of a bucket")
        if self.prefix and (not self.prefix.endswith("/") or self.prefix.startswith("/") or "//" in self.prefix):
            raise ConfigError("prefix", self.prefix, "a prefix like groups/name/")
        if any(part in (".", "..") for part in self.prefix.split("/")) or "\0" in self.prefix:
            raise ConfigError("prefix", self.prefix, "no '.', '..' or NUL in it")
        _at_least("connect_seconds", self.connect_seconds, 0.1, ">= 0.1")
        _at_least("read_seconds", self.read_seconds, 0.1, ">= 0.1")
        for name in ("attempts_max", "reads_max", "writes_max"):
            _at_least(name, getattr(self, name), 1, ">= 1")

    @property
    def url(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}"

    def total_seconds(self, moved_bytes: int) -> float:
        """Deadline of one request, its answer included, however often a byte comes."""
        return 2 * self.read_seconds + moved_bytes / SLOWEST_BYTES_PER_SECOND

    def silent_seconds(self, copied_bytes: int = 0) -> float:
        """Longest time without a byte in an answer. A store may say nothing while it copies within itself."""
        return self.read_seconds + min(copied_bytes / SLOWEST_COPY_BYTES_PER_SECOND, COPY_SECONDS_MAX)

    @property
    def endpoint_text(self) -> str:
        """The endpoint and where it was named, for messages."""
        if self.endpoint_url is None:
            return "the endpoint of boto3 (AWS, unless a profile names another)"
        return f"{self.endpoint_url} (from {self.endpoint_from})" if self.endpoint_from else self.endpoint_url

    @property
    def volume_id(self) -> str:
        """Names the volume in file names: the same for the same endpoint, bucket and prefix."""
        text = "\n".join((self.endpoint_url or "aws", self.bucket, self.prefix))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """Clean blocks on disk."""

    directory: Path
    size_max: int = 10 * GIB
    block_bytes: int = 128 * KIB
    window_bytes_max: int = 96 * MIB  # read-ahead of one sequential stream
    requests_max: int = 3  # of one stream at a time

    def __post_init__(self) -> None:
        if self.block_bytes < 4 * KIB or self.block_bytes & (self.block_bytes - 1) or self.block_bytes > 64 * MIB:
            raise ConfigError("cache.block_bytes", self.block_bytes, "a power of two from 4K to 64M")
        _at_least("cache.size_max", self.size_max, 16 * MIB, ">= 16M")
        _at_least("cache.window_bytes_max", self.window_bytes_max, self.block_bytes, ">= the block size")
        _at_least("cache.requests_max", self.requests_max, 1, ">= 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class WritebackConfig:
    """Dirty bytes and their upload."""

    directory: Path  # of this volume: journal and staging files
    dirty_bytes_max: int = 10 * GIB  # above this write() waits
    saved_bytes_max: int = 10 * GIB  # of what can be stored nowhere; never more than dirty bytes
    full_seconds: float = 60.0  # how long it waits before ENOSPC
    part_bytes: int = 8 * MIB  # every part but the last
    multipart_bytes_min: int = 16 * MIB  # from this size in parts
    delay_seconds: float = 0.5  # quiet time since the last change of a closed file
    open_seconds: float = 2.5  # age at which a small file that stays open goes up
    uploads_max: int = 16  # requests at a time
    write_through: bool = False  # each close waits for the store
    on_conflict: OnConflict = OnConflict.KEEP_BOTH
    retry_seconds_max: float = 60.0
    refused_seconds: float = 180.0  # between two tries of an upload that the store refuses for good
    drain_seconds: float = 0.0  # at unmount; 0: as long as it takes
    fsync_seconds: float = 0.0  # 0: fsync waits until the store has the bytes; else ETIMEDOUT after this

    def __post_init__(self) -> None:
        if not S3_PART_BYTES_MIN <= self.part_bytes <= S3_PART_BYTES_MAX:
            raise ConfigError("writeback.part_bytes", self.part_bytes, "5M to 5G")
        _at_least("writeback.multipart_bytes_min", self.multipart_bytes_min, self.part_bytes, ">= part_bytes")
        _at_least("writeback.dirty_bytes_max", self.dirty_bytes_max, 16 * MIB, ">= 16M")
        _at_least("writeback.saved_bytes_max", self.saved_bytes_max, 0, ">= 0")
        _at_least("writeback.delay_seconds", self.delay_seconds, 0, ">= 0")
        _at_least("writeback.open_seconds", self.open_seconds, 0.1, ">= 0.1")
        _at_least("writeback.uploads_max", self.uploads_max, 1, ">= 1")

    @property
    def saved_max(self) -> int:
        return min(self.saved_bytes_max, self.dirty_bytes_max)


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeConfig:
    """How the tree looks and how long what is known of it stays true."""

    read_only: bool = False
    uid: int = 0
    gid: int = 0
    file_mode: int = 0o644
    dir_mode: int = 0o755
    attr_ttl_seconds: float = 5.0
    events: EventsMode = EventsMode.AUTO
    events_ttl_seconds: float = 300.0  # instead of attr_ttl, as long as the store's stream of changes is open
    exclusive_create: ExclusiveCreate = ExclusiveCreate.LOCAL
    posix_attrs: PosixAttrs = PosixAttrs.STORE
    xattrs: bool = False

    def __post_init__(self) -> None:
        for name in ("uid", "gid"):
            if not 0 <= getattr(self, name) < 2**32 - 1:
                raise ConfigError(name, getattr(self, name), "0 to 4294967294")
        for name in ("file_mode", "dir_mode"):
            if not 0 <= getattr(self, name) <= 0o7777:
                raise ConfigError(name, oct(getattr(self, name)), "an octal mode up to 7777")
        _at_least("attr_ttl_seconds", self.attr_ttl_seconds, 0, ">= 0")
        _at_least("events_ttl_seconds", self.events_ttl_seconds, 0, ">= 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class QuotaConfig:
    """How much may be stored."""

    limits: dict[str, int] = field(default_factory=dict)  # bytes, by path below the mount point; "": all of it
    file: Path | None = None  # with more of them
    recount_seconds: float = 600.0

    @property
    def has_folders(self) -> bool:
        """Whether a folder may have a quota of its own."""
        return self.file is not None or any(path.strip("/") for path in self.limits)

    def __post_init__(self) -> None:
        _at_least("quota.recount_seconds", self.recount_seconds, 1, ">= 1s")


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelConfig:
    """What is asked of the kernel for this mount."""

    mountpoint: Path  # absolute
    allow_other: bool = False
    noexec: bool = False  # nosuid and nodev are always asked for
    read_ahead_bytes: int = 1 * MIB  # needs root, else the kernel's default of 128 KiB stays
    fs_name: str = "phfs"


@dataclass(frozen=True, slots=True, kw_only=True)
class MountConfig:
    """All of one mount."""

    store: StoreConfig
    cache: CacheConfig
    writeback: WritebackConfig
    tree: TreeConfig
    kernel: KernelConfig
    quota: QuotaConfig = field(default_factory=QuotaConfig)
    log_level: str = "info"
    log_format: str = "text"  # or "json"
    log_name: str = ""  # names the mount in a log that several share

    @property
    def control_socket(self) -> Path:
        """Unix socket of the worker, in the volume's state directory."""
        return self.writeback.directory / "control.sock"

"""The table of settings: one name for flag, `-o` option, variable and key of the file. Owns no state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Final

from phfs_fuse.config import values
from phfs_fuse.config.model import EventsMode, ExclusiveCreate, OnConflict, PosixAttrs

DEFAULT_BUCKET: Final = "primehub"


@dataclass(frozen=True, slots=True)
class ValueKind:
    """How a value is read, and the word that stands for it in the help."""

    parse: values.Parser
    metavar: str = ""


SWITCH: Final = ValueKind(values.boolean)
SIZE: Final = ValueKind(values.size, "SIZE")
TIME: Final = ValueKind(values.seconds, "TIME")
COUNT: Final = ValueKind(values.count, "N")
MODE: Final = ValueKind(values.mode, "MODE")
NAME: Final = ValueKind(values.text, "NAME")
FILE: Final = ValueKind(values.path, "FILE")
DIR: Final = ValueKind(values.path, "DIR")
URL: Final = ValueKind(values.endpoint, "URL")
BUCKET: Final = ValueKind(values.bucket, "NAME")
QUOTAS: Final = ValueKind(values.quotas, "[PATH=]SIZE")
GROUP: Final = ValueKind(values.group_prefix, "NAME")
USER: Final = ValueKind(values.user, "ID")
GROUP_ID: Final = ValueKind(values.group, "ID")
POSIX_ATTRS: Final = ValueKind(values.one_of(PosixAttrs), "store|ignore")
ON_CONFLICT: Final = ValueKind(values.one_of(OnConflict), "keep-both|overwrite|fail")
EVENTS: Final = ValueKind(values.one_of(EventsMode), "auto|off")
EXCLUSIVE_CREATE: Final = ValueKind(values.one_of(ExclusiveCreate), "local|store")
LOG_LEVEL: Final = ValueKind(values.choice("debug", "info", "warning", "error"), "LEVEL")
LOG_FORMAT: Final = ValueKind(values.choice("text", "json"), "text|json")


@dataclass(frozen=True, slots=True)
class Setting:
    """`key` is `table.key` of the file, `field` what it sets in `MountConfig`, "" if that takes more."""

    name: str
    key: str
    field: str
    kind: ValueKind
    help: str
    default: str = ""  # for people
    flag: bool = True  # False: fine tuning, left to -o, variables and the file

    @property
    def variable(self) -> str:
        return "PHFS_" + self.name.replace("-", "_").upper()

    @property
    def is_switch(self) -> bool:
        return self.kind is SWITCH

    @property
    def is_list(self) -> bool:
        """May be given several times."""
        return self.kind is QUOTAS


_tuning = partial(Setting, flag=False)
SETTINGS: Final = (
    Setting("config", "", "", FILE, "Read settings from this TOML file."),
    Setting("group", "store.group", "", GROUP, "Mount the shared space of this group."),
    Setting("bucket", "store.bucket", "", BUCKET, "Bucket of the group.", DEFAULT_BUCKET),
    Setting(
        "endpoint-url",
        "store.endpoint-url",
        "store.endpoint_url",
        URL,
        "The store, when it is not AWS.",
        "AWS_ENDPOINT_URL",
    ),
    Setting("region", "store.region", "store.region", NAME, "Region of the bucket.", "that of boto3"),
    Setting("profile", "store.profile", "store.profile", NAME, "AWS profile with the credentials."),
    Setting(
        "credentials-file",
        "store.credentials-file",
        "",
        FILE,
        "AWS shared credentials file; others must not be able to read it.",
    ),
    Setting(
        "ca-bundle",
        "store.ca-bundle",
        "store.ca_bundle",
        FILE,
        "Authorities (PEM) that the store's certificate is checked against.",
        "AWS_CA_BUNDLE",
    ),
    Setting("create-bucket", "store.create-bucket", "store.create_bucket", SWITCH, "Make a missing bucket."),
    Setting("read-only", "tree.read-only", "tree.read_only", SWITCH, "Refuse every change."),
    Setting("allow-other", "kernel.allow-other", "kernel.allow_other", SWITCH, "Let other users in."),
    Setting("uid", "tree.uid", "tree.uid", USER, "Owner of what names none.", "yours"),
    Setting("gid", "tree.gid", "tree.gid", GROUP_ID, "Group of what names none.", "yours"),
    Setting("umask", "tree.umask", "", MODE, "Taken from 0666 and 0777 where no mode is named.", "022"),
    Setting("file-mode", "tree.file-mode", "tree.file_mode", MODE, "Mode of files that name none."),
    Setting("dir-mode", "tree.dir-mode", "tree.dir_mode", MODE, "Mode of directories that name none."),
    Setting("cache-dir", "cache.dir", "", DIR, "Holds clean blocks.", "~/.cache/phfs, /var/cache/phfs of root"),
    Setting("cache-size", "cache.size", "cache.size_max", SIZE, "Limit of the block cache.", "10G"),
    Setting(
        "state-dir",
        "writeback.state-dir",
        "",
        DIR,
        "Holds unsaved bytes.",
        "~/.local/state/phfs, /var/lib/phfs of root",
    ),
    Setting(
        "dirty-max",
        "writeback.dirty-max",
        "writeback.dirty_bytes_max",
        SIZE,
        "Unsaved bytes above which writes wait.",
        "10G",
    ),
    Setting("block-size", "cache.block-size", "cache.block_bytes", SIZE, "Unit of the cache.", "128K"),
    Setting(
        "attr-ttl",
        "tree.attr-ttl",
        "tree.attr_ttl_seconds",
        TIME,
        "How long attributes are believed; 0 asks the store at each open.",
        "5s",
    ),
    Setting(
        "events",
        "tree.events",
        "tree.events",
        EVENTS,
        "Hear of the changes of others at once, where the store is MinIO.",
        "auto",
    ),
    Setting(
        "exclusive-create",
        "tree.exclusive-create",
        "tree.exclusive_create",
        EXCLUSIVE_CREATE,
        "Where O_EXCL holds: within the mount, or between all mounts of the prefix.",
        "local",
    ),
    Setting(
        "write-through",
        "writeback.write-through",
        "writeback.write_through",
        SWITCH,
        "Let each close wait until the store has the file.",
    ),
    Setting(
        "write-back-delay",
        "writeback.delay",
        "writeback.delay_seconds",
        TIME,
        "Quiet time before the upload of a closed file.",
        "500ms",
    ),
    Setting(
        "quota",
        "quota.limit",
        "quota.limits",
        QUOTAS,
        "What the mount, or a folder of it, may hold; several times for several folders.",
    ),
    Setting("quota-file", "quota.file", "quota.file", FILE, "More quotas, one a line; read again when it changes."),
    Setting(
        "posix-attrs",
        "tree.posix-attrs",
        "tree.posix_attrs",
        POSIX_ATTRS,
        "Keep modes, owners and times in object metadata, or forget them.",
        "store",
    ),
    Setting("xattrs", "tree.xattrs", "tree.xattrs", SWITCH, "Extended attributes; slows small writes."),
    Setting(
        "on-conflict",
        "writeback.on-conflict",
        "writeback.on_conflict",
        ON_CONFLICT,
        "When the object changed under unsaved bytes.",
        "keep-both",
    ),
    Setting("log-level", "log.level", "log_level", LOG_LEVEL, "debug, info, warning or error.", "info"),
    Setting("log-format", "log.format", "log_format", LOG_FORMAT, "Form of the log.", "text"),
    _tuning(
        "path-style",
        "store.path-style",
        "store.path_style",
        SWITCH,
        "Bucket in the path of the URL, not in its host.",
        "with an endpoint of your own",
    ),
    _tuning(
        "connect-timeout",
        "store.connect-timeout",
        "store.connect_seconds",
        TIME,
        "Deadline of a connection to the store.",
        "5s",
    ),
    _tuning(
        "read-timeout",
        "store.read-timeout",
        "store.read_seconds",
        TIME,
        "Longest silence of the store within an answer.",
        "20s",
    ),
    _tuning("attempts", "store.attempts", "store.attempts_max", COUNT, "Tries of one request.", "5"),
    _tuning("reads", "store.reads", "store.reads_max", COUNT, "Reading requests at a time.", "32"),
    _tuning("writes", "store.writes", "store.writes_max", COUNT, "Writing requests at a time.", "16"),
    _tuning(
        "read-window",
        "cache.read-window",
        "cache.window_bytes_max",
        SIZE,
        "Largest read-ahead of one sequential reader.",
        "96M",
    ),
    _tuning(
        "read-requests",
        "cache.read-requests",
        "cache.requests_max",
        COUNT,
        "Requests of one reader at a time.",
        "3",
    ),
    _tuning(
        "events-ttl",
        "tree.events-ttl",
        "tree.events_ttl_seconds",
        TIME,
        "How long attributes are believed while changes of others are heard of.",
        "5m",
    ),
    _tuning(
        "saved-max",
        "writeback.saved-max",
        "writeback.saved_bytes_max",
        SIZE,
        "Limit of bytes that could be stored nowhere and lie in saved/; dirty-max, if that is less.",
        "10G",
    ),
    _tuning(
        "full-timeout",
        "writeback.full-timeout",
        "writeback.full_seconds",
        TIME,
        "How long a write waits at the limit of unsaved bytes before ENOSPC.",
        "1m",
    ),
    _tuning("part-size", "writeback.part-size", "writeback.part_bytes", SIZE, "Size of a part.", "8M"),
    _tuning(
        "multipart-min",
        "writeback.multipart-min",
        "writeback.multipart_bytes_min",
        SIZE,
        "Size from which a file goes up in parts.",
        "16M",
    ),
    _tuning(
        "open-delay",
        "writeback.open-delay",
        "writeback.open_seconds",
        TIME,
        "Age at which a small file that stays open goes up.",
        "2.5s",
    ),
    _tuning("uploads", "writeback.uploads", "writeback.uploads_max", COUNT, "Uploads at a time.", "16"),
    _tuning(
        "retry-max",
        "writeback.retry-max",
        "writeback.retry_seconds_max",
        TIME,
        "Longest pause between two tries of an upload.",
        "1m",
    ),
    _tuning(
        "refused-retry",
        "writeback.refused-retry",
        "writeback.refused_seconds",
        TIME,
        "Pause between two tries of an upload that the store refuses for good.",
        "3m",
    ),
    _tuning(
        "fsync-timeout",
        "writeback.fsync-timeout",
        "writeback.fsync_seconds",
        TIME,
        "Then fsync fails with ETIMEDOUT; 0 never.",
        "0",
    ),
    _tuning(
        "drain-timeout",
        "writeback.drain-timeout",
        "writeback.drain_seconds",
        TIME,
        "Longest wait for uploads at the end of the mount; 0: as long as it takes.",
        "0",
    ),
    _tuning(
        "quota-recount",
        "quota.recount",
        "quota.recount_seconds",
        TIME,
        "How often the use of quotas is counted anew.",
        "10m",
    ),
    _tuning(
        "read-ahead",
        "kernel.read-ahead",
        "kernel.read_ahead_bytes",
        SIZE,
        "Read-ahead of the kernel; root only.",
        "1M",
    ),
    _tuning("noexec", "kernel.noexec", "kernel.noexec", SWITCH, "Run no program from the mount.", "false"),
    _tuning("fs-name", "kernel.fs-name", "kernel.fs_name", NAME, "Source shown by mount(8).", "the volume"),
)
BY_NAME: Final[Mapping[str, Setting]] = {setting.name: setting for setting in SETTINGS}
BY_KEY: Final[Mapping[str, Setting]] = {setting.key: setting for setting in SETTINGS if setting.key}

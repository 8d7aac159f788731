"""Where a setting may be written, which place wins, and what is said about a wrong one."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from phfs_fuse.config.model import MountConfig, OnConflict, PosixAttrs, QuotaConfig
from phfs_fuse.config.options import COUNT, SETTINGS, SIZE, TIME, Setting
from phfs_fuse.config.resolve import (
    Resolved,
    dump_config,
    from_aws,
    from_environ,
    from_file,
    from_flags,
    from_options,
    gather,
    load_config,
    resolve,
)
from phfs_fuse.config.values import Raw
from phfs_fuse.errors import UsageError
from phfs_fuse.types import GIB, KIB, MIB

MOUNTPOINT = Path("/mnt/group")
DOCUMENT = Path(__file__).parents[3] / "docs" / "configuration.md"


def resolved(
    source: str | None = "s3://bucket/prefix",
    *,
    flags: Mapping[str, Raw | Sequence[Raw] | None] | None = None,
    options: str = "",
    environ: Mapping[str, str] | None = None,
) -> Resolved:
    given = gather(from_flags(flags or {}), from_options([options]), environ or {})
    return resolve(source, MOUNTPOINT, given)


def config_of(source: str | None = "s3://bucket/prefix", **sources: Any) -> MountConfig:
    return resolved(source, **sources).config


@pytest.mark.parametrize(
    ("source", "bucket", "prefix"),
    [
        ("s3://bucket", "bucket", ""),
        ("s3://bucket/", "bucket", ""),
        ("s3://bucket/a", "bucket", "a/"),
        ("s3://bucket/a/", "bucket", "a/"),
        ("s3://my.old_bucket/a b/é", "my.old_bucket", "a b/é/"),
    ],
)
def test_a_url_names_bucket_and_prefix(source: str, bucket: str, prefix: str) -> None:
    store = config_of(source).store
    assert (store.bucket, store.prefix) == (bucket, prefix)


@pytest.mark.parametrize(
    ("name", "prefix"),
    [("research", "groups/research/"), ("Data_Science", "groups/data-science/"), ("a_B-c", "groups/a-b-c/")],
)
def test_a_group_is_normalised_as_primehub_does(name: str, prefix: str) -> None:
    store = config_of(None, flags={"group": name}).store
    assert (store.bucket, store.prefix) == ("primehub", prefix)


def test_the_bucket_of_a_group() -> None:
    assert config_of(None, flags={"group": "g", "bucket": "other"}).store.bucket == "other"
    assert config_of(None, flags={"group": "g"}, environ={"PHFS_BUCKET": "other"}).store.bucket == "other"


def test_a_url_wins_over_a_group_that_is_only_a_default() -> None:
    store = config_of("s3://bucket/p", environ={"PHFS_GROUP": "g", "PHFS_BUCKET": "other"}).store
    assert (store.bucket, store.prefix) == ("bucket", "p/")


def test_flags_before_options_before_variables_before_file_before_defaults(tmp_path: Path) -> None:
    file = tmp_path / "phfs.toml"
    file.write_text("[cache]\nsize = '1G'\n")
    sources: dict[str, Any] = {}
    assert config_of(**sources).cache.size_max == 10 * GIB
    sources["environ"] = {"PHFS_CONFIG": str(file)}
    assert config_of(**sources).cache.size_max == GIB
    sources["environ"] = {"PHFS_CONFIG": str(file), "PHFS_CACHE_SIZE": "2G"}
    assert config_of(**sources).cache.size_max == 2 * GIB
    sources["options"] = "cache_size=3G"
    assert config_of(**sources).cache.size_max == 3 * GIB
    sources["flags"] = {"cache-size": "4G", "read-only": None}
    assert config_of(**sources).cache.size_max == 4 * GIB


def test_a_flag_can_take_back_what_a_lower_place_says() -> None:
    assert config_of(environ={"PHFS_READ_ONLY": "yes"}).tree.read_only
    assert not config_of(environ={"PHFS_READ_ONLY": "yes"}, flags={"read-only": False}).tree.read_only


def test_every_setting_reaches_its_field() -> None:
    config = config_of(
        options="endpoint-url=http://minio:9000/,region=eu-1,profile=p,create-bucket,ro,allow_other,uid=5,gid=6,"
        "file-mode=0600,dir-mode=0700,cache-dir=/c,cache-size=1G,state-dir=/s,dirty-max=2G,block-size=64K,attr-ttl=0,"
        "write-through,write-back-delay=1m,posix-attrs=ignore,xattrs,on-conflict=fail,log-level=debug,"
        "log-format=json,path-style=false,connect-timeout=1,read-timeout=2s,attempts=3,reads=4,writes=5,"
        "read-window=1M,read-requests=2,full-timeout=90,part-size=5M,multipart-min=6M,open-delay=500ms,uploads=7,"
        "retry-max=2m,fsync-timeout=8,drain-timeout=9,read-ahead=0,noexec,fs-name=name"
    )
    store, cache, writeback, tree = config.store, config.cache, config.writeback, config.tree
    assert (store.endpoint_url, store.region, store.profile) == ("http://minio:9000", "eu-1", "p")
    assert (store.create_bucket, store.path_style) == (True, False)
    assert (store.connect_seconds, store.read_seconds) == (1.0, 2.0)
    assert (store.attempts_max, store.reads_max, store.writes_max) == (3, 4, 5)
    assert cache.directory == Path("/c") / store.volume_id
    assert (cache.size_max, cache.block_bytes) == (GIB, 64 * KIB)
    assert (cache.window_bytes_max, cache.requests_max) == (MIB, 2)
    assert writeback.directory == Path("/s") / store.volume_id
    assert (writeback.dirty_bytes_max, writeback.full_seconds) == (2 * GIB, 90)
    assert (writeback.part_bytes, writeback.multipart_bytes_min) == (5 * MIB, 6 * MIB)
    assert (writeback.delay_seconds, writeback.open_seconds, writeback.uploads_max) == (60, 0.5, 7)
    assert (writeback.write_through, writeback.on_conflict) == (True, OnConflict.FAIL)
    assert (writeback.retry_seconds_max, writeback.fsync_seconds) == (120, 8)
    assert (tree.read_only, tree.uid, tree.gid) == (True, 5, 6)
    assert (tree.file_mode, tree.dir_mode, tree.attr_ttl_seconds) == (0o600, 0o700, 0)
    assert (tree.posix_attrs, tree.xattrs) == (PosixAttrs.IGNORE, True)
    assert (config.kernel.allow_other, config.kernel.noexec) == (True, True)
    assert (config.kernel.read_ahead_bytes, config.kernel.fs_name) == (0, "name")
    assert (config.log_level, config.log_format, writeback.drain_seconds) == ("debug", "json", 9)


def test_no_two_settings_set_the_same_field_and_each_field_exists() -> None:
    fields = [setting.field for setting in SETTINGS if setting.field]
    assert len(set(fields)) == len(fields)
    config = dataclasses.asdict(config_of())
    for field in fields:
        section, _, name = field.rpartition(".")
        assert name in (config[section] if section else config), field


@pytest.mark.parametrize(
    ("options", "file_mode", "dir_mode"),
    [
        ("", 0o644, 0o755),
        ("umask=002", 0o664, 0o775),
        ("umask=077,dir-mode=0711", 0o600, 0o711),
        ("file-mode=0o640", 0o640, 0o755),
    ],
)
def test_umask_counts_where_no_mode_is_named(options: str, file_mode: int, dir_mode: int) -> None:
    tree = config_of(options=options).tree
    assert (tree.file_mode, tree.dir_mode) == (file_mode, dir_mode)


def test_what_mount_and_fstab_pass_to_every_helper_is_accepted() -> None:
    standard = "rw,defaults,_netdev,noauto,nofail,user,user=joe,group,nodev,nosuid,noatime,comment=x"
    assert from_options([standard, "x-systemd.automount", ""]) == {}


@pytest.mark.parametrize(
    ("options", "read_only"), [("ro", True), ("ro,rw", False), ("rw,ro", True), ("ro,read-only=no", False)]
)
def test_the_last_of_two_options_counts(options: str, read_only: bool) -> None:
    assert config_of(options=options).tree.read_only is read_only


def test_rw_of_mount_does_not_undo_a_variable() -> None:
    assert config_of(options="rw", environ={"PHFS_READ_ONLY": "1"}).tree.read_only


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ("cash-size=1G", "-o cash-size: no such option, did you mean 'cache-size'?"),
        ("qqq", "-o qqq: no such option"),
        ("cache-size", "-o cache-size: needs a value, as in cache-size=SIZE"),
        ("cache-size=big", "-o cache-size: 'big' is not valid, expected a size such as 128K, 512M or 10G"),
        ("ro=maybe", "-o ro: no such option"),
        ("read-only=maybe", "-o read-only: 'maybe' is not valid, expected true or false"),
        ("block-size=5000", "-o block-size: '5000' is not valid, expected a power of two from 4K to 64M"),
        ("block-size=1K", "-o block-size: '1K' is not valid, expected a power of two from 4K to 64M"),
        ("cache-size=1M", "-o cache-size: '1M' is not valid, expected >= 16M"),
        ("attr-ttl=-1", "-o attr-ttl: '-1' is not valid, expected a time such as 5, 500ms, 5s or 1m"),
        ("uid=-1", "-o uid: '-1' is not valid, expected a user id or name"),
        ("gid=no-such-group", "-o gid: 'no-such-group' is not valid, expected a group id or name"),
        ("uid=4294967295", "-o uid: '4294967295' is not valid, expected 0 to 4294967294"),
        ("umask=9", "-o umask: '9' is not valid, expected an octal mode as a string, such as '0644'"),
        ("file-mode=77777", "-o file-mode: '77777' is not valid, expected an octal mode up to 7777"),
        ("posix-attrs=keep", "-o posix-attrs: 'keep' is not valid, expected store or ignore"),
        ("on-conflict=x", "-o on-conflict: 'x' is not valid, expected keep-both, overwrite or fail"),
        ("log-level=loud", "-o log-level: 'loud' is not valid, expected debug, info, warning or error"),
        ("part-size=1M", "-o part-size: '1M' is not valid, expected 5M to 5G"),
        ("attempts=0", "-o attempts: '0' is not valid, expected >= 1"),
        ("uploads=1.5", "-o uploads: '1.5' is not valid, expected a whole number"),
        ("endpoint-url=minio:9000", "-o endpoint-url: not valid, expected a URL such as http://minio:9000"),
        (
            "endpoint-url=http://h/path?x=1",
            "-o endpoint-url: not valid, expected a URL such as http://minio:9000",
        ),
        (
            "endpoint-url=http://h:99999",
            "-o endpoint-url: not valid, expected a URL such as http://minio:9000",
        ),
        ("group=g", "-o group cannot be used together with s3://bucket/prefix"),
        ("bucket=other", "-o bucket cannot be used together with s3://bucket/prefix"),
        ("state-dir=/" + "x" * 80, f"--state-dir: '/{'x' * 80}' is not valid, expected a shorter path"),
    ],
)
def test_one_line_about_a_wrong_option(options: str, line: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolved(options=options)
    assert str(caught.value) == line


@pytest.mark.parametrize(
    "options",
    ["secret-access-key=Hidden1", "aws_access_key_id=Hidden1", "session_token=Hidden1", "password=Hidden1"],
)
def test_credentials_are_refused_and_not_repeated(options: str) -> None:
    with pytest.raises(UsageError, match="credentials are not for options") as caught:
        from_options([options])
    assert "Hidden1" not in str(caught.value)


def test_a_password_in_the_endpoint_is_refused_and_not_repeated() -> None:
    with pytest.raises(UsageError, match="a URL without credentials in it") as caught:
        config_of(environ={"PHFS_ENDPOINT_URL": "http://user:Hidden1@host"})
    assert "Hidden1" not in str(caught.value)
    assert "Hidden1" not in str(caught.value.__cause__)


def test_sloppy_ignores_unknown_options_only() -> None:
    assert from_options(["unknown=1,ro"], sloppy=True).keys() == {"read-only"}
    with pytest.raises(UsageError):
        from_options(["cache-size"], sloppy=True)


@pytest.mark.parametrize(
    ("source", "line"),
    [
        (None, "nothing to mount: name s3://BUCKET[/PREFIX] or --group NAME"),
        ("bucket/p", "volume: 'bucket/p' is not valid, expected s3://BUCKET or s3://BUCKET/PREFIX"),
        (
            "s3://",
            "volume: 's3://' is not valid, expected the name of a bucket (3 to 63 letters, digits, '.', '-')",
        ),
        ("s3://bucket//a", "prefix: '/a/' is not valid, expected a prefix like groups/name/"),
        ("s3://bucket/a//b", "prefix: 'a//b/' is not valid, expected a prefix like groups/name/"),
        ("s3://bucket/a/../b", "prefix: 'a/../b/' is not valid, expected no '.', '..' or NUL in it"),
    ],
)
def test_one_line_about_a_wrong_volume(source: str | None, line: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolved(source)
    assert str(caught.value) == line


@pytest.mark.parametrize("name", ["a/b", "..", "", "  "])
def test_a_wrong_group(name: str) -> None:
    with pytest.raises(UsageError, match=r"--group: .* is not valid"):
        resolved(None, flags={"group": name})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[cash]\nsize = 1", r"no table \[cash\], did you mean 'cache'\?"),
        ("[q]\nsize = 1", r"no table \[q\], the tables are cache, kernel, log, quota, store, tree, writeback"),
        ("size = 1", r"no table \[size\]"),
        ("cache = 1", r"no table \[cache\]"),
        ("[cache]\nsizes = 1", r"\[cache\] sizes: no such key, did you mean 'size'\?"),
        ("[cache]\nsize = [1]", r"\[cache\] size: \[1\] is not valid, expected a single value"),
        ("[cache]\nsize = true", r"\[cache\] size: True is not valid, expected a size"),
        ("[cache]\nsize = 5", r"\[cache\] size: 5 is not valid, expected >= 16M"),
        ("[tree]\numask = 22", r"\[tree\] umask: 22 is not valid, expected an octal mode as a string"),
        ("[cache]\ndir = 5", r"\[cache\] dir: 5 is not valid, expected a text that is not empty"),
        ("[cache\n", "is not TOML"),
    ],
)
def test_one_line_about_a_wrong_file(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "phfs.toml"
    file.write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        config_of(flags={"config": str(file)})
    assert str(caught.value).startswith(str(file))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"missing\.toml: cannot be read: No such file"):
        config_of(options=f"config={tmp_path / 'missing.toml'}")


def test_a_file_takes_the_types_of_toml_and_underscores(tmp_path: Path) -> None:
    file = tmp_path / "phfs.toml"
    file.write_text(
        "[store]\ngroup = 'My_Group'\n[cache]\nsize = 1073741824\nblock_size = '64K'\n"
        "[writeback]\ndelay = 1.5\nwrite-through = true\n"
        "[tree]\nuid = 7\numask = '027'\n[log]\nlevel = 'error'\n"
    )
    config = config_of(None, flags={"config": str(file)})
    assert (config.store.prefix, config.cache.size_max, config.cache.block_bytes) == (
        "groups/my-group/",
        GIB,
        64 * KIB,
    )
    assert (config.writeback.delay_seconds, config.writeback.write_through) == (1.5, True)
    assert (config.tree.uid, config.tree.file_mode, config.log_level) == (7, 0o640, "error")


def test_every_setting_has_a_key_of_its_own_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "phfs.toml"
    keys = [setting for setting in SETTINGS if setting.key]
    file.write_text("".join(f"{setting.key} = 'x'\n" for setting in keys))  # dotted keys are tables too
    assert from_file(file).keys() == {setting.name for setting in keys}


def test_unknown_and_empty_variables_are_ignored() -> None:
    assert from_environ({"PHFS_UNKNOWN": "1", "PHFS_UID": "", "UID": "5"}) == {}


@pytest.mark.parametrize(
    ("environ", "url"),
    [
        ({"AWS_ENDPOINT_URL": "http://a"}, "http://a"),
        ({"AWS_ENDPOINT_URL": "http://a", "AWS_ENDPOINT_URL_S3": "http://b"}, "http://b"),
        ({"AWS_ENDPOINT_URL": "http://a", "PHFS_ENDPOINT_URL": "http://c"}, "http://c"),
        ({"AWS_ENDPOINT_URL": "http://a", "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "true"}, None),
        ({}, None),
    ],
)
def test_the_endpoint_of_boto3_counts_last(environ: Mapping[str, str], url: str | None) -> None:
    assert config_of(environ=environ).store.endpoint_url == url
    assert from_aws({}) == {}


def test_the_volume_is_the_same_however_its_url_is_spelled() -> None:
    spelled = ["s3://bucket/groups/a", "s3://bucket/groups/a/"]
    volumes = {config_of(source).store.volume_id for source in spelled}
    volumes |= {config_of(None, flags={"group": "A", "bucket": "bucket"}).store.volume_id}
    assert len(volumes) == 1
    assert config_of("s3://bucket/groups/ab").store.volume_id not in volumes


@pytest.mark.parametrize(("mode", "accepted"), [(0o600, True), (0o640, True), (0o644, False), (0o602, False)])
def test_a_credentials_file_must_not_be_open_to_all(tmp_path: Path, mode: int, accepted: bool) -> None:
    file = tmp_path / "credentials"
    file.write_text("[default]\n")
    file.chmod(mode)
    if accepted:
        assert resolved(options=f"credentials-file={file}").credentials_file == file
    else:
        with pytest.raises(UsageError, match="can be read by everybody: chmod 600 it"):
            resolved(options=f"credentials-file={file}")


def test_a_credentials_file_that_is_not_there() -> None:
    with pytest.raises(UsageError, match="-o credentials-file: /no/file: No such file"):
        resolved(options="credentials-file=/no/file")


@pytest.mark.parametrize(
    ("flags", "options", "limits"),
    [
        (["10G"], "", {"": 10 * GIB}),
        (["10G", "groups/a=5G", "/groups//b/ = 1024"], "", {"": 10 * GIB, "groups/a": 5 * GIB, "groups/b": 1024}),
        (["a=b=1K"], "", {"a=b": 1024}),
        (["a=1K", "a=2K"], "", {"a": 2048}),
        (["1K"], "quota=9G", {"": 1024}),
        ([], "ro,quota=1K,quota=a=2K", {"": 1024, "a": 2048}),
        ([], "", {}),
    ],
)
def test_quotas_may_be_given_several_times(flags: list[str], options: str, limits: Mapping[str, int]) -> None:
    config = config_of(flags={"quota": flags or None}, options=options)
    assert config.quota.limits == limits
    assert load_config(dump_config(config)) == config


@pytest.mark.parametrize("text", ["'1K; a=2K'", "['1K', 'a=2K']", "[1024, 'a=2K']"])
def test_quotas_in_the_file(tmp_path: Path, text: str) -> None:
    file = tmp_path / "phfs.toml"
    file.write_text(f"[quota]\nlimit = {text}\nfile = 'more'\nrecount = '1m'\n")
    config = config_of(flags={"config": str(file)})
    assert config.quota == QuotaConfig(limits={"": 1024, "a": 2048}, file=Path("more").absolute(), recount_seconds=60)
    assert load_config(dump_config(config)) == config


def test_quotas_in_a_variable() -> None:
    assert config_of(environ={"PHFS_QUOTA": "1K;a=2K"}).quota.limits == {"": 1024, "a": 2048}


@pytest.mark.parametrize(
    "raw",
    ["lots", "a=", "a=0", "0", "-1", "../a=1K", "a/./b=1K", f"{'x' * 256}=1K", "a=2000000T", "1K;b=x", "a=1K=b"],
)
def test_one_line_about_a_wrong_quota(raw: str) -> None:
    with pytest.raises(UsageError) as caught:
        config_of(flags={"quota": [raw]})
    assert str(caught.value).startswith(f"--quota: {raw!r} is not valid, expected ")
    assert "\n" not in str(caught.value)


def test_the_config_comes_back_from_json_as_it_was() -> None:
    config = config_of(options="ro,posix-attrs=ignore,on-conflict=fail,endpoint-url=http://h,noexec,attr-ttl=0")
    assert load_config(dump_config(config)) == config


def test_a_config_of_an_older_version_gets_defaults() -> None:
    text = dump_config(config_of()).replace('"noexec": false,', "")
    assert "noexec" not in text
    assert load_config(text) == config_of()


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"version": 1}', '{"version": 99}'])
def test_a_config_that_cannot_be_read(text: str) -> None:
    with pytest.raises(UsageError, match="the config of the mount"):
        load_config(text)


def test_every_setting_is_documented() -> None:
    rows = re.findall(r"^\| `([^`]+)` \| (?:`([^`]+)`)?.*? \| `([^`]+)` \|", DOCUMENT.read_text(), re.MULTILINE)
    documented = {(name, key, variable) for name, key, variable in rows}
    settings = {
        (f"{'--' if setting.flag else ''}{setting.name}", _spelled(setting.key), setting.variable)
        for setting in SETTINGS
    }
    assert documented == settings


def _spelled(key: str) -> str:
    table, _, name = key.partition(".")
    return f"[{table}] {name}" if key else ""


@pytest.mark.parametrize("setting", [s for s in SETTINGS if s.kind in (SIZE, TIME, COUNT) and s.field], ids=str)
def test_the_default_that_is_told_is_the_default(setting: Setting) -> None:
    value: Any = config_of()
    for name in setting.field.split("."):
        value = getattr(value, name)
    assert setting.kind.parse(setting.default) == value

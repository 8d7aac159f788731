"""What a volume may say about itself, in our words and in csi-rclone's, and what is refused."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phfs_csi.errors import InvalidArgument
from phfs_csi.request.attributes import ATTRIBUTES, Given, has_controls, parse_volume
from phfs_csi.request.params import VolumeParams
from phfs_fuse.config.options import BY_NAME
from phfs_fuse.config.resolve import from_options
from phfs_fuse.config.values import volume as split_volume
from phfs_fuse.errors import UsageError

SECRET = "s3cr3t-that-nobody-may-see"
CHART = {  # the volume attributes of PrimeHub's chart
    "remote": "s3",
    "remotePath": "primehub",
    "s3-provider": "Minio",
    "s3-endpoint": "http://primehub-minio.hub:9000",
    "s3-access-key-id": "AKIA",
    "s3-secret-access-key": SECRET,
}
CONF = f"""
[my-s3]
type = s3
provider = Minio
access_key_id = AKIA
secret_access_key = {SECRET}
endpoint = http://minio:9000
region = eu-west-1
acl = private
"""


def parse(
    attributes: Mapping[str, str],
    secrets: Mapping[str, str] | None = None,
    flags: Sequence[str] = (),
    defaults: Mapping[str, str] | None = None,
) -> VolumeParams:
    found = Given(attributes=attributes, secrets=secrets or {}, mount_flags=flags, defaults=defaults or {})
    return parse_volume("vol", found)


def test_all_of_our_own_attributes() -> None:
    volume = parse(
        {
            "bucket": "primehub",
            "group": "Data_Team",
            "endpoint": "http://minio:9000/",
            "region": "eu-west-1",
            "cacheSize": "2G",
            "attrTtl": "1m",
            "writeThrough": "true",
            "uid": "1000",
            "gid": "100",
            "umask": "002",
            "fileMode": "0640",
            "dirMode": "0750",
            "readOnly": "true",
            "onConflict": "fail",
            "drainTimeout": "2m",
            "createBucket": "true",
            "pathStyle": "false",
            "csi.storage.k8s.io/pod.name": "pod",
            "storage.kubernetes.io/csiProvisionerIdentity": "1-2-phfs",
        }
    )
    assert volume.source == "s3://primehub/groups/data-team/"
    assert volume.cache_bytes_max == 2 << 30
    assert volume.drain_seconds == 120
    assert volume.settings == {
        "endpoint-url": "http://minio:9000/",
        "region": "eu-west-1",
        "attr-ttl": "1m",
        "write-through": "true",
        "uid": "1000",
        "gid": "100",
        "umask": "002",
        "file-mode": "0640",
        "dir-mode": "0750",
        "read-only": "true",
        "on-conflict": "fail",
        "create-bucket": "true",
        "path-style": "false",
    }


@pytest.mark.parametrize(
    ("attributes", "source"),
    [
        ({"bucket": "b-1"}, "s3://b-1/"),
        ({"bucket": "b-1", "prefix": "logs"}, "s3://b-1/logs/"),
        ({"bucket": "b-1", "prefix": "a/b/"}, "s3://b-1/a/b/"),
        ({"group": "phusers"}, "s3://primehub/groups/phusers/"),
        ({"remote": "s3", "remotePath": "b-1"}, "s3://b-1/"),
        ({"remote": "s3", "remotePath": "/b-1//x/"}, "s3://b-1/x/"),
        ({"remote": "s3", "remotePath": "b-1/x", "remotePathSuffix": "/y z"}, "s3://b-1/x/y z/"),
    ],
)
def test_where_the_volume_is(attributes: dict[str, str], source: str) -> None:
    assert parse(attributes).source == source


def test_the_volume_of_primehubs_chart_works_as_it_is() -> None:
    volume = parse(CHART)
    assert volume.source == "s3://primehub/"
    assert volume.settings == {"endpoint-url": "http://primehub-minio.hub:9000", "umask": "000"}
    assert (volume.credentials.access_key, volume.credentials.secret_key) == ("AKIA", SECRET)
    assert SECRET not in repr(volume)


def test_the_default_secret_of_csi_rclone_serves_volumes_that_say_little() -> None:
    volume = parse({"remotePathSuffix": "/groups/a"}, defaults=CHART)
    assert volume.source == "s3://primehub/groups/a/"
    assert volume.credentials.secret_key == SECRET


def test_a_volume_in_our_words_takes_the_credentials_of_the_default_secret_alone() -> None:
    volume = parse({"bucket": "other"}, defaults=CHART)
    assert volume.source == "s3://other/"
    assert volume.settings == {}
    assert volume.credentials.access_key == "AKIA"


def test_a_volume_in_csi_rclones_words_takes_no_place_of_ours() -> None:
    defaults = {"endpoint": "http://other:9000", "bucket": "other", "umask": "002"}
    volume = parse(CHART, defaults=defaults)
    assert volume.source == "s3://primehub/"
    assert volume.settings == {"endpoint-url": "http://primehub-minio.hub:9000", "umask": "002"}


def test_a_volume_may_leave_the_endpoint_to_the_default_secret() -> None:
    defaults = {"endpoint": "http://minio:9000", "accessKey": "AKIA", "secretKey": SECRET}
    volume = parse({"bucket": "b-1"}, defaults=defaults)
    assert volume.settings == {"endpoint-url": "http://minio:9000"}
    assert volume.credentials.secret_key == SECRET


def test_an_rclone_conf_names_the_store(caplog: pytest.LogCaptureFixture) -> None:
    volume = parse({"remote": "my-s3", "remotePath": "b-1", "umask": "077"}, {"configData": CONF})
    assert volume.source == "s3://b-1/"
    assert volume.settings == {"endpoint-url": "http://minio:9000", "region": "eu-west-1", "umask": "077"}
    assert volume.credentials.secret_key == SECRET
    assert "s3-acl" in caplog.text
    assert SECRET not in caplog.text


def test_flags_of_rclone_with_an_equal_here_and_those_without(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        volume = parse(
            {
                **CHART,
                "dir-cache-time": "1m30s",
                "vfs-cache-max-size": "10G",
                "vfs-write-back": "5s",
                "read-only": "true",
                "file-perms": "0666",
                "vfs-cache-mode": "full",
                "transfers": "8",
                "cacheSize": "1G",
            }
        )
    assert volume.settings["attr-ttl"] == "90.000s"
    assert volume.settings["write-back-delay"] == "5.000s"
    assert volume.settings["read-only"] == "true"
    assert volume.settings["file-mode"] == "0666"
    assert volume.cache_bytes_max == 1 << 30  # our own word wins
    assert [record.getMessage().partition("rclone's ")[2] for record in caplog.records] == [
        "transfers, vfs-cache-mode: ignored"
    ]


def test_a_switch_of_rclone_needs_no_value() -> None:
    settings = parse({**CHART, "read-only": "", "s3-force-path-style": "", "s3-region": ""}).settings
    assert (settings["read-only"], settings["path-style"], "region" in settings) == ("true", "true", False)


@pytest.mark.parametrize(
    ("text", "size"), [("off", None), ("1048576", 1 << 30), ("2Gi", 2 << 30), ("512M", 512 << 20)]
)
def test_sizes_are_read_as_rclone_reads_them(text: str, size: int | None) -> None:
    assert parse({**CHART, "vfs-cache-max-size": text}).cache_bytes_max == size


@pytest.mark.parametrize(
    "names",
    [
        ("accessKey", "secretKey"),
        ("access-key-id", "secret-access-key"),
        ("accessKeyId", "secretAccessKey"),
        ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"),
        ("s3-access-key-id", "s3-secret-access-key"),
    ],
)
def test_names_of_credentials_in_a_secret(names: tuple[str, str]) -> None:
    found = parse({"bucket": "b-1"}, {names[0]: " AKIA\n", names[1]: SECRET, "sessionToken": "t"}).credentials
    assert (found.access_key, found.secret_key, found.session_token) == ("AKIA", SECRET, "t")


def test_the_secret_comes_before_the_attributes_and_the_defaults() -> None:
    defaults = {"accessKey": "default", "secretKey": "default"}
    assert parse({"bucket": "b-1"}, defaults=defaults).credentials.access_key == "default"
    assert parse(CHART, defaults=defaults).credentials.access_key == "AKIA"
    secrets = {"accessKey": "secret", "secretKey": "secret"}
    assert parse(CHART, secrets, defaults=defaults).credentials.access_key == "secret"


def test_mount_options_are_those_of_the_command_and_win() -> None:
    flags = ["ro", "umask=077", "allow_other", "cache-size=1G", "drain-timeout=5m", "x-systemd.automount"]
    volume = parse({"bucket": "b-1", "umask": "002"}, flags=flags)
    assert volume.settings == {"read-only": "true", "umask": "077"}
    assert volume.cache_bytes_max == 1 << 30
    assert volume.drain_seconds == 300


HOSTILE: Sequence[tuple[str, dict[str, str]]] = [
    ("bukcet", {"bukcet": "b-1"}),
    ("did you mean 'cacheSize'", {"bucket": "b-1", "cachesize": "1G"}),
    ("did you mean 'endpoint'", {"bucket": "b-1", "s3-endpoint": "http://x"}),
    ("s3-endpont", {**CHART, "s3-endpont": "http://x"}),
    ("bucket", {}),
    ("bucket", {"prefix": "a"}),
    ("bucket", {"bucket": "../x"}),
    ("bucket", {"bucket": "b-1?x"}),
    ("prefix", {"bucket": "b-1", "prefix": "../x"}),
    ("prefix", {"bucket": "b-1", "prefix": "a/../../x"}),
    ("prefix", {"bucket": "b-1", "prefix": "a/./x"}),
    ("prefix", {"bucket": "b-1", "prefix": "/etc"}),
    ("prefix", {"bucket": "b-1", "prefix": "a//b"}),
    ("prefix", {"bucket": "b-1", "prefix": "a\0b"}),
    ("prefix", {"bucket": "b-1", "prefix": "a\nb"}),
    ("prefix", {"bucket": "b-1", "prefix": "x" * 600}),
    ("exclude each other", {"bucket": "b-1", "prefix": "a", "group": "b"}),
    ("group", {"group": "a/b"}),
    ("group", {"group": ".."}),
    ("umask", {"bucket": "b-1", "umask": "022,allow_root"}),
    ("region", {"bucket": "b-1", "region": "eu,cache-dir=/etc"}),
    ("region", {"bucket": "b-1", "region": "eu\ncache-dir=/etc"}),
    ("uid", {"bucket": "b-1", "uid": "root"}),
    ("uid", {"bucket": "b-1", "uid": "-1"}),
    ("endpoint", {"bucket": "b-1", "endpoint": f"http://u:{SECRET}@minio:9000"}),
    ("endpoint", {"bucket": "b-1", "endpoint": "file:///etc/passwd"}),
    ("secret", {"bucket": "b-1", "secretKey": SECRET}),
    ("secret", {"bucket": "b-1", "accessKey": SECRET}),
    ("remotePath", {"remote": "s3"}),
    ("remote", {"remotePath": "b-1"}),
    ("configData", {"remote": "drive", "remotePath": "b-1"}),
    ("crypt", {"remote": "c", "remotePath": "b-1", "configData": f"[c]\ntype = crypt\npassword = {SECRET}\n"}),
    ("configData", {"remote": "c", "remotePath": "b-1", "configData": f"RCLONE_ENCRYPT_V0:\n{SECRET}"}),
    ("prefix", {**CHART, "remotePath": "primehub/../other"}),
    ("prefix", {**CHART, "remotePathSuffix": "/../other"}),
    ("cannot be used together", {**CHART, "bucket": "b-1", "remote": "s3"}),
    ("dir-cache-time", {**CHART, "dir-cache-time": "soon"}),
    ("come together", {"remote": "s3", "remotePath": "b-1", "s3-access-key-id": "AKIA"}),
    (
        "region",
        {"remote": "c", "remotePath": "b-1", "configData": "[c]\ntype = s3\nregion = eu\n  second-line\n"},
    ),
]


@pytest.mark.parametrize(("named", "attributes"), HOSTILE)
def test_what_is_refused_is_named_and_no_secret_repeated(named: str, attributes: dict[str, str]) -> None:
    with pytest.raises(InvalidArgument, match=named) as refusal:
        parse(attributes)
    assert SECRET not in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1


@pytest.mark.parametrize(
    "flags",
    [
        ["state-dir=/etc"],
        ["cache-dir=/etc"],
        ["credentials-file=/root/.aws/credentials"],
        ["profile=admin"],
        ["config=/etc/phfs.toml"],
        ["fs-name=x"],
        ["bucket=other"],
        ["endpoint-url=http://evil"],
        ["group=b"],
        ["ro,cache-dir=/etc"],
        ["umask=022\ncache-dir=/etc"],
        ["umask=022\0"],
        ["umask=rwx"],
        ["uid=root"],
        [f"secret-key={SECRET}"],
        ["no-such-option"],
    ],
)
def test_mount_options_that_are_refused(flags: list[str]) -> None:
    with pytest.raises(InvalidArgument, match="mountOptions") as refusal:
        parse({"bucket": "b-1"}, flags=flags)
    assert SECRET not in str(refusal.value)


@pytest.mark.parametrize(
    "secrets",
    [
        {"accessKey": "AKIA"},
        {"secretKey": SECRET},
        {"sessionToken": SECRET},
        {"accessKey": "AKIA", "secretKey": f"{SECRET}\nregion = x"},
        {"caBundle": SECRET},
        {"acessKey": "AKIA", "secretKey": SECRET},
    ],
)
def test_secrets_that_are_refused(secrets: dict[str, str]) -> None:
    with pytest.raises(InvalidArgument, match=r"secret") as refusal:
        parse({"bucket": "b-1"}, secrets)
    assert SECRET not in str(refusal.value)


NAMES = st.sampled_from(sorted(ATTRIBUTES | set(CHART) | {"remotePathSuffix", "configData"})) | st.text(max_size=20)
VALUES = st.text(max_size=30) | st.sampled_from(["..", "a/../b", "1G", "true", "5s", "http://h", "a,b", "\0", "0644"])


@given(attributes=st.dictionaries(NAMES, VALUES, max_size=8), flags=st.lists(st.text(max_size=30), max_size=3))
def test_whatever_is_given_stays_in_its_place(attributes: dict[str, str], flags: list[str]) -> None:
    try:
        volume = parse(attributes, flags=flags)
    except InvalidArgument:
        return
    _bucket, prefix = split_volume(volume.source)
    assert not {"..", "."} & set(prefix.split("/"))
    assert not has_controls(volume.source)
    options = [f"{name}={text}" for name, text in volume.settings.items()]
    try:
        again = from_options(options)
    except UsageError:
        pytest.fail("a setting that the command does not know")
    assert set(again) == set(volume.settings) <= set(BY_NAME)

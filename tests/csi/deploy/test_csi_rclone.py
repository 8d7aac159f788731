"""The volume of PrimeHub's chart, served as it is by a plugin that took csi-rclone's name. Real mount, real store."""

from __future__ import annotations

import subprocess
import sys
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from phfs_csi.proto import csi_pb2
from tests.csi.plugin import Plugin, Volume, a_plugin, sh
from tests.support.mounts import s3_client

pytestmark = pytest.mark.fuse

CONF = """
[primehub]
type = s3
provider = Minio
access_key_id = {access_key}
secret_access_key = {secret_key}
endpoint = {endpoint_url}
"""

NOTEBOOK = """
import os, sys
os.chdir(sys.argv[1])
os.setgroups([100])
os.setgid(100)
os.setuid(1000)
open("old.txt", "a").write("by a notebook")
os.makedirs("jobArtifacts/job-1")
"""


@pytest.fixture(scope="module")
def plugin() -> Iterator[Plugin]:
    with a_plugin("--driver-name=csi-rclone") as found:
        yield found


@pytest.fixture
def bucket(plugin: Plugin) -> str:
    name = f"primehub-{uuid.uuid4().hex[:8]}"
    s3 = s3_client(plugin.server)
    s3.create_bucket(Bucket=name)
    s3.put_object(Bucket=name, Key="groups/research/old.txt", Body=b"by rclone\n", Metadata={"mtime": "1600000000.5"})
    return name


def volume(plugin: Plugin, bucket: str, attributes: dict[str, str], secrets: dict[str, str]) -> Volume:
    found = Volume(plugin, bucket, name=f"data-{bucket[-8:]}", prefix="")
    found.attributes, found.secrets = attributes, secrets
    return found


def chart(plugin: Plugin, bucket: str) -> dict[str, str]:
    return {
        "remote": "s3",
        "remotePath": bucket,
        "s3-provider": "Minio",
        "s3-endpoint": plugin.server.endpoint_url,
        "s3-access-key-id": plugin.server.access_key,
        "s3-secret-access-key": plugin.server.secret_key,
    }


def use(pods: Volume) -> None:
    """As PrimeHub's notebooks do: a bind mount of the group's folder within the volume."""
    pods.stage()
    target = pods.publish("notebook")
    group = target / "groups" / "research"
    assert sh('stat -c %Y "$1"/old.txt; cat "$1"/old.txt', group) == "1600000000\nby rclone\n"
    sh('echo new > "$1"/new.txt; sync "$1"/new.txt', group)
    assert pods.object("groups/research/new.txt") == b"new\n"
    subprocess.run([sys.executable, "-c", NOTEBOOK, str(group)], check=True, timeout=60)
    pods.unpublish("notebook")
    pods.unstage()


def test_the_name_is_csi_rclones(plugin: Plugin) -> None:
    assert plugin.call("GetPluginInfo", csi_pb2.GetPluginInfoRequest()).name == "csi-rclone"


def test_the_volume_of_the_chart(plugin: Plugin, bucket: str) -> None:
    use(volume(plugin, bucket, chart(plugin, bucket), {}))
    assert plugin.server.secret_key not in plugin.log()


def test_its_secret_with_a_configuration_file(plugin: Plugin, bucket: str) -> None:
    server = plugin.server
    conf = CONF.format(access_key=server.access_key, secret_key=server.secret_key, endpoint_url=server.endpoint_url)
    use(volume(plugin, bucket, {"remote": "primehub", "remotePath": f"/{bucket}/"}, {"configData": conf}))
    assert server.secret_key not in plugin.log()


def test_a_suffix_and_flags_of_rclone(plugin: Plugin, bucket: str) -> None:
    attributes = {
        **chart(plugin, bucket),
        "remotePathSuffix": "/groups/research",
        "umask": "077",
        "read-only": "true",
    }
    attributes |= {"vfs-cache-mode": "full", "dir-cache-time": "1s", "uid": "1000", "gid": "100"}
    pods = volume(plugin, bucket, attributes, {})
    pods.stage()
    target = pods.publish()
    assert sh('stat -c "%a %u %g" "$1"/old.txt', target) == "600 1000 100\n"
    assert "Read-only" in sh('touch "$1"/x 2>&1 || true', target)
    pods.unpublish()
    pods.unstage()
    assert "vfs-cache-mode: ignored" in plugin.log()


@pytest.mark.parametrize("change", [{"s3-endpont": "x"}, {"remotePath": "../x"}, {"s3-secret-access-key": ""}])
def test_what_is_wrong_is_refused(plugin: Plugin, bucket: str, change: dict[str, Any]) -> None:
    pods = volume(plugin, bucket, {**chart(plugin, bucket), **change}, {})
    assert plugin.code("NodeStageVolume", pods.stage_request()) == "INVALID_ARGUMENT"

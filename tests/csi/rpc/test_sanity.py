"""csi-sanity, the conformance tests of the CSI project: all of Identity, Controller and Node on real mounts of MinIO.

It skips by itself what a plugin says it does not do. Each of these is explained in `SKIPPED`, and nothing else may be
skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.csi.plugin import Plugin, a_plugin, mounts_below
from tests.support.mounts import s3_client, shared_server

pytestmark = [pytest.mark.fuse, pytest.mark.minio, pytest.mark.slow]

SECONDS = 1200
SKIPPED = {
    "Controller Publish, UnpublishVolume not supported": "a bucket is attached to no node: attachRequired is false",
    "ControllerPublishVolume not supported": "the same",
    "ControllerUnpublishVolume not supported": "the same",
    "ListVolumes not supported": "records lie in the buckets of the volumes, and the plugin knows no list of buckets",
    "GetCapacity not supported": "a bucket has no size",
    "Snapshot not supported": "the store has no snapshot of a prefix; versions of objects are the bucket's setting",
    "CreateSnapshot not supported": "the same",
    "DeleteSnapshot not supported": "the same",
    "GetSnapshot not supported": "the same",
    "ListSnapshots not supported": "the same",
    "GroupControllerService not supported": "snapshots of groups of volumes: the same",
    "Volume Cloning not supported": "a copy of a prefix takes as long as its objects are many: no call waits for it",
    "ControllerModifyVolume not supported": "attributes are those of the StorageClass; the size has a call",
    "Modify Volume not supported": "the same",
    "Modify volume not supported": "the same",
    "ControllerGetVolumeHealth not supported": "alpha in CSI 1.12 and unknown to kubelets; stats tell the condition",
    "ControllerListVolumeHealth not supported": "the same",
    "NodeGetStorageHealth not supported": "the same",
    "NodeGetVolumeHealth not supported": "the same",
}
PENDING = "pagination should detect volumes added between pages"  # switched off by csi-sanity itself


def binary() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = Path(os.environ.get("PHFS_TEST_CSI_SANITY") or cache / "phfs-tests" / "bin" / "csi-sanity")
    if not os.access(path, os.X_OK):
        pytest.skip("no csi-sanity: set PHFS_TEST_CSI_SANITY or run ./dev test, which builds one")
    return path


@pytest.fixture
def plugin() -> Iterator[Plugin]:
    with a_plugin("--controller", "--any-target") as found:
        yield found


def secrets(plugin: Plugin) -> str:
    calls = "CreateVolume DeleteVolume ControllerValidateVolumeCapabilities ControllerExpandVolume NodeStageVolume"
    lines = f"  accessKey: {plugin.server.access_key}\n  secretKey: {plugin.server.secret_key}\n"
    return "".join(f"{call}Secret:\n{lines}" for call in [*calls.split(), "NodePublishVolume"])


def test_csi_sanity(plugin: Plugin, tmp_path: Path) -> None:
    bucket = f"sanity-{uuid.uuid4().hex[:12]}"
    s3_client(shared_server()).create_bucket(Bucket=bucket)
    (tmp_path / "secrets").write_text(secrets(plugin))
    parameters = {
        "bucket": bucket,
        "endpoint": plugin.server.endpoint_url,
        "region": "us-east-1",
        "onDelete": "delete",
    }
    (tmp_path / "parameters").write_text("".join(f"{name}: {value}\n" for name, value in parameters.items()))
    for name in ("pods", "plugins"):
        (plugin.kubelet / name).mkdir()
    done = subprocess.run(
        [
            binary(),
            f"--csi.endpoint=unix://{plugin.socket}",
            f"--csi.mountdir={plugin.kubelet}/pods/mount",
            f"--csi.stagingdir={plugin.kubelet}/plugins/staging",
            f"--csi.secrets={tmp_path}/secrets",
            f"--csi.testvolumeparameters={tmp_path}/parameters",
            f"--csi.testvolumeexpandsize={20 << 30}",
            f"--ginkgo.json-report={tmp_path}/report",
            "--ginkgo.no-color",
        ],
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stdout[-8000:] + plugin.log()
    (report,) = json.loads((tmp_path / "report").read_text())
    specs = report["SpecReports"]
    reasons = {spec["Failure"]["Message"].strip() for spec in specs if spec["State"] == "skipped"}
    assert reasons <= SKIPPED.keys()
    assert all(PENDING in spec["LeafNodeText"] for spec in specs if spec["State"] == "pending")
    assert sum(spec["State"] == "passed" for spec in specs) >= 45
    assert mounts_below(plugin.root) == []
    assert plugin.keepers() == []

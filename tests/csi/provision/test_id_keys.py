"""The file with the keys of volume ids."""

from __future__ import annotations

from pathlib import Path

import pytest

from phfs_csi.errors import FailedPrecondition
from phfs_csi.provision.id_keys import IdKeysFile
from phfs_csi.request.volume_id import VolumeId, parse_volume_id

ID = VolumeId(bucket="store", name="pvc-1")


def test_the_first_key_signs_and_all_are_accepted(tmp_path: Path) -> None:
    old, new = "a" * 32, "b" * 32
    path = tmp_path / "keys"
    path.write_text(f"{old}\n")
    file = IdKeysFile(path)
    signed = file.read().signed(ID, "groups/a/", "delete")
    assert parse_volume_id(str(signed)) == signed
    path.write_text(f"{new}\n{old}\n")
    assert file.read().has_signed(signed, "groups/a/", "delete")
    assert file.read().signed(ID, "groups/a/", "delete").mac != signed.mac
    path.write_text(f"{new}\n")
    assert not file.read().has_signed(signed, "groups/a/", "delete")


@pytest.mark.parametrize(
    ("volume_id", "prefix", "policy"),
    [
        (ID, "groups/b/", "delete"),
        (ID, "groups/a/", "retain"),
        (VolumeId(bucket="store", name="pvc-2"), "groups/a/", "delete"),
        (VolumeId(bucket="other", name="pvc-1"), "groups/a/", "delete"),
        (VolumeId(bucket="store", name="pvc-1", endpoint="http://elsewhere:9000"), "groups/a/", "delete"),
    ],
)
def test_a_mac_is_of_one_volume_prefix_and_policy(
    tmp_path: Path, volume_id: VolumeId, prefix: str, policy: str
) -> None:
    (tmp_path / "keys").write_text("a" * 32)
    keys = IdKeysFile(tmp_path / "keys").read()
    assert keys.signed(volume_id, prefix, policy).mac != keys.signed(ID, "groups/a/", "delete").mac


def test_no_file_no_keys_and_nothing_is_signed(tmp_path: Path) -> None:
    for file in (IdKeysFile(None), IdKeysFile(tmp_path / "missing")):
        assert file.read().signed(ID, "a/", "delete") == ID
        assert not file.read().has_signed(ID, "a/", "delete")


def test_a_file_that_is_made(tmp_path: Path) -> None:
    file = IdKeysFile(tmp_path / "state" / "keys", make=True)
    assert file.read() == file.read() != IdKeysFile(None).read()
    assert (tmp_path / "state" / "keys").stat().st_mode & 0o777 == 0o600
    assert "".join(file.read().keys) not in repr(file.read())


def test_short_keys_are_refused(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("a" * 32 + "\nshort\n")
    with pytest.raises(FailedPrecondition, match="characters"):
        IdKeysFile(tmp_path / "keys").read()

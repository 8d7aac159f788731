from __future__ import annotations

import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phfs_fuse.attrs import Attrs, from_metadata, others, parse_mode, parse_seconds, to_metadata

FILE = Attrs(mode=0o100644, uid=1, gid=2, mtime_ns=7)
FOLDER = Attrs(mode=0o040755, uid=1, gid=2, mtime_ns=7)

USER_NAMES = st.binary(min_size=1, max_size=9).filter(lambda name: 0 not in name).map(lambda name: b"user." + name)


@pytest.mark.parametrize(
    "name", [b"security.capability", b"trusted.x", b"system.posix_acl_access", b"user.a\0b", b""]
)
def test_only_user_attributes_are_shown_and_others_stay_as_they_are(name: bytes) -> None:
    metadata = {f"xattr-{name.hex()}": "AAAA", f"xattr-{b'user.a'.hex()}": "AAAA"}
    assert from_metadata(metadata, 99, FILE).xattrs == {b"user.a": b"\0\0\0"}
    assert others(metadata, same_bytes=True) == {f"xattr-{name.hex()}": "AAAA"}


@given(
    st.builds(
        Attrs,
        mode=st.integers(0, 0o7777).map(lambda m: m | stat.S_IFREG),
        uid=st.integers(0, 2**32 - 2),
        gid=st.integers(0, 2**32 - 2),
        mtime_ns=st.integers(-(10**18), 4 * 10**18),
        rdev=st.integers(0, 2**31),
        xattrs=st.one_of(st.none(), st.dictionaries(USER_NAMES, st.binary(max_size=9), min_size=1)),
    )
)
def test_attributes_come_back(attrs: Attrs) -> None:
    metadata = to_metadata(attrs)
    assert all(text.isascii() for pair in metadata.items() for text in pair)
    assert from_metadata(metadata, 99, FILE) == attrs


def test_the_form_that_others_read() -> None:
    attrs = Attrs(mode=0o100755, uid=1000, gid=100, mtime_ns=1_700_000_000_123_456_789)
    assert to_metadata(attrs) == {"mode": "0100755", "uid": "1000", "gid": "100", "mtime": "1700000000.123456789"}


@pytest.mark.parametrize(
    ("text", "mode"),
    [
        ("0100644", 0o100644),  # rclone, geesefs
        ("100644", 0o100644),
        ("33188", 0o100644),  # s3fs: decimal
        ("16877", 0o040755),
        ("0755", 0o755),
        ("755", 0o755),
        ("", None),
        ("rw-r--r--", None),
        ("99999999999999", None),
        ("-1", None),
        ("0999", None),
        ("²", None),
    ],
)
def test_modes(text: str, mode: int | None) -> None:
    assert parse_mode(text) == mode


@pytest.mark.parametrize(
    ("text", "ns"),
    [
        ("1700000000", 1_700_000_000 * 10**9),
        ("1700000000.5", 1_700_000_000_500_000_000),
        ("1.1234567899", 1_123_456_789),
        ("-1.5", -1_500_000_000),
        ("", None),
        ("x", None),
        ("1.x", None),
        ("9" * 30, None),
        ("nan", None),
    ],
)
def test_seconds(text: str, ns: int | None) -> None:
    assert parse_seconds(text) == ns


@pytest.mark.parametrize(
    "metadata",
    [{}, {"mode": "junk", "uid": "-4", "gid": "4294967295", "mtime": "soon"}, {"mode": "040755"}],
)
def test_what_cannot_be_read_is_the_default(metadata: dict[str, str]) -> None:
    found = from_metadata(metadata, 5, FILE)
    assert (found.mode, found.uid, found.gid, found.mtime_ns) == (0o100644, 1, 2, 5)


def test_a_directory_is_what_its_key_says() -> None:
    assert from_metadata({"mode": "0100600"}, 5, FOLDER).mode == 0o040755
    assert from_metadata({"mode": "0700"}, 5, FOLDER).mode == 0o040700


def test_geesefs_symlink() -> None:
    found = from_metadata({"--symlink-target": "a%20b"}, 5, FILE)
    assert found.link == b"a b"
    assert stat.S_ISLNK(found.mode)
    assert from_metadata(to_metadata(found), 5, FILE) == found
    assert from_metadata({"--symlink-target": "x"}, 5, FOLDER).link is None
    assert from_metadata({}, 5, FILE).link is None

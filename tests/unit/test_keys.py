from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phfs_fuse import keys
from phfs_fuse.errors import ConfigError, IllegalName, NameTooLong

NAMES = st.binary(min_size=1, max_size=40).filter(lambda n: n not in (b".", b"..") and not set(n) & {0, 0x2F})


@given(NAMES)
def test_a_name_comes_back(name: bytes) -> None:
    segment = keys.segment_of(name)
    segment.encode()  # no lone surrogate
    assert keys.name_of(segment) == name


@given(st.text(min_size=1, max_size=20))
def test_a_foreign_segment_is_shown_or_refused_but_never_as_another(segment: str) -> None:
    try:
        name = keys.name_of(segment)
    except IllegalName:
        return
    assert keys.segment_of(name) == segment


@pytest.mark.parametrize(
    ("name", "segment"),
    [
        (b"plain.txt", "plain.txt"),
        ("\u00e9".encode(), "\u00e9"),  # NFC and NFD are two names
        ("e\u0301".encode(), "e\u0301"),
        (b"\xff\xfe", "\u201bFF\u201bFE"),
        ("\u201b".encode(), "\u201b"),
        ("\u201bFF".encode(), "\u201b\u201bFF"),
        (b"a\nb%2F+ ", "a\nb%2F+ "),
    ],
)
def test_segments(name: bytes, segment: str) -> None:
    assert keys.segment_of(name) == segment
    assert keys.name_of(segment) == name


@pytest.mark.parametrize("segment", ["", ".", "..", "a\0b", "x" * 256, ".phfs-probe-0f369c1b999c36a7"])
def test_illegal_segments(segment: str) -> None:
    with pytest.raises(IllegalName):
        keys.name_of(segment)


def test_limits() -> None:
    assert keys.segment_of(b"x" * 255)
    with pytest.raises(NameTooLong):
        keys.segment_of(b"x" * 256)
    assert keys.join("p/", "x" * 1022)
    with pytest.raises(NameTooLong):
        keys.join("p/", "x" * 1023)
    with pytest.raises(NameTooLong):
        keys.join("p/", "é" * 512)


@pytest.mark.parametrize(
    ("group", "prefix"),
    [("research", "groups/research/"), ("Data_Science", "groups/data-science/"), ("a.b-1", "groups/a.b-1/")],
)
def test_group_prefix(group: str, prefix: str) -> None:
    assert keys.group_prefix(group) == prefix


@pytest.mark.parametrize("group", ["", "..", "a/b", "a..b", "a\nb", "-x", "é"])
def test_group_names_that_are_refused(group: str) -> None:
    with pytest.raises(ConfigError):
        keys.group_prefix(group)

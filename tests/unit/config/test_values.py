"""Values as people write them, and as anybody may: numbers are in range, and nothing but ValueError is raised."""

from __future__ import annotations

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from phfs_fuse.config import values
from phfs_fuse.config.values import COUNT_MAX, SECONDS_MAX, size
from phfs_fuse.types import SIZE_BYTES_MAX


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("512", 512),
        ("512b", 512),
        ("128K", 128 << 10),
        ("128kb", 128 << 10),
        ("10Gi", 10 << 30),
        ("10GiB", 10 << 30),
        ("1.5G", 3 << 29),
    ],
)
def test_sizes(text: str, count: int) -> None:
    assert size(text) == count


@pytest.mark.parametrize("text", ["", "K", "5i", "5ib", "-1", "5 KK", "1e3", "10P"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="a size such as"):
        size(text)


MANY = "9" * 400
TEXTS = st.one_of(
    st.text(max_size=20),
    st.tuples(st.integers(0).map(str), st.sampled_from(["", "K", "T", "TiB", "ms", "d", ".5G"])).map("".join),
)


@given(TEXTS)
@example(MANY)
@example(MANY + "T")
@example(MANY + "d")
@example("9" * 5000)
@example("77777")
@example("007777")
@example("a=" + MANY)
def test_numbers_are_in_range(text: str) -> None:
    limits = {
        values.size: SIZE_BYTES_MAX,
        values.seconds: SECONDS_MAX,
        values.count: COUNT_MAX,
        values.mode: 0o77777,  # the config has limits of its own
        values.quota_size: SIZE_BYTES_MAX,
        values.user: COUNT_MAX,
        values.group: COUNT_MAX,
    }
    for parse, most in limits.items():
        try:
            number = parse(text)
        except ValueError:
            continue
        assert math.isfinite(number)
        assert 0 <= number <= most
    for read in (values.quotas, values.endpoint, values.bucket, values.volume, values.boolean, values.path):
        try:
            read(text)
        except ValueError:
            continue

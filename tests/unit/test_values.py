"""Sizes as people write them."""

from __future__ import annotations

import pytest

from phfs_fuse.values import size


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

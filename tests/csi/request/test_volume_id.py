"""Ids that come back are those that went out, or none."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from phfs_csi.errors import InvalidArgument
from phfs_csi.request.volume_id import VolumeId, parse_volume_id

BUCKETS = st.from_regex(r"[a-z0-9][a-z0-9.-]{2,20}", fullmatch=True)
NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=30)


@given(bucket=BUCKETS, name=NAMES, region=st.sampled_from(["", "eu-west-1", "a b&c=d"]))
def test_what_goes_out_comes_back(bucket: str, name: str, region: str) -> None:
    made = VolumeId(bucket=bucket, name=name, region=region, endpoint="http://minio:9000", path_style="true")
    assert parse_volume_id(str(made)) == made


@given(text=st.text(max_size=60) | st.text(max_size=60).map(lambda tail: f"phfs://{tail}"))
def test_what_comes_back_is_spelled_as_we_spell_it(text: str) -> None:
    try:
        found = parse_volume_id(text)
    except InvalidArgument:
        return
    assert found is None or str(found) == text

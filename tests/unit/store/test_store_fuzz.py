"""Fuzzing of the border to the store: whatever an answer holds, nothing but `BadAnswer` leaves its parser, and what
comes out is in range."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from phfs_fuse.attrs import Attrs, from_metadata, to_metadata
from phfs_fuse.config.model import StoreConfig
from phfs_fuse.errors import BadAnswer, PhfsError
from phfs_fuse.store.base import Listing, ObjectInfo
from phfs_fuse.store.bodies import Receiver
from phfs_fuse.store.boto import BotoTransport
from phfs_fuse.store.error_codes import error_code, error_of
from phfs_fuse.store.headers import http_date_ns, info_of, stored_info
from phfs_fuse.store.listing_xml import is_xml, parse_listing
from phfs_fuse.store.notifications import parse_events
from phfs_fuse.types import ID_MAX, SIZE_BYTES_MAX, TIME_NS_MAX, TIME_NS_MIN, ETag, ObjectKey

KEY = ObjectKey("g/a")
LATER = "Mon, 99999999999999999999999999 Jan 2024 00:00:00 GMT"
NUMBERS = st.one_of(
    st.integers().map(str),
    st.integers(0, 2**70).map(str),
    st.sampled_from(["9" * 5000, "-1", "1e400", "Infinity", "nan", "0x10", "1_0", "٣", "²", "", str(1 << 63)]),
)
DATES = st.one_of(
    st.datetimes().map(lambda at: at.isoformat() + "Z"),
    st.datetimes().map(lambda at: at.strftime("%a, %d %b %Y %H:%M:%S GMT")),
    st.sampled_from([LATER, "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00", "Thu, 1 Jan 1 00:00:00 GMT"]),
)
VALUES = st.one_of(NUMBERS, DATES, st.text(max_size=40), st.just('"0123456789abcdef0123456789abcdef"'))
HEADERS = st.dictionaries(
    st.one_of(
        st.sampled_from(["etag", "content-length", "last-modified", "date", "content-range", "x-amz-meta-mtime"]),
        st.text(max_size=20),
    ),
    st.one_of(VALUES, st.tuples(NUMBERS, NUMBERS, NUMBERS).map(lambda n: f"bytes {n[0]}-{n[1]}/{n[2]}")),
)


def answer(parse: Callable[[], object]) -> object:
    try:
        return parse()
    except BadAnswer:
        return None


def assert_in_range(info: ObjectInfo) -> None:
    assert 0 <= info.size <= SIZE_BYTES_MAX
    assert TIME_NS_MIN <= info.modified_ns <= TIME_NS_MAX


@given(HEADERS)
@example({"etag": '"e"', "content-length": "1", "last-modified": LATER, "date": LATER})
def test_headers(headers: dict[str, str]) -> None:
    for parse in (lambda: info_of(KEY, headers), lambda: stored_info(KEY, 3, headers, headers)):
        if isinstance(info := answer(parse), ObjectInfo):
            assert_in_range(info)
    with suppress(PhfsError):
        Receiver(KEY, 0, 3, None, lambda _at, _chunk: None).begin(headers)


@given(DATES)
@example("Thu, 1 Jan 1 00:00:00 +1400")
@example("Fri, 31 Dec 9999 23:59:59 -2359")
def test_dates(text: str) -> None:
    assert TIME_NS_MIN <= http_date_ns(text) <= TIME_NS_MAX


def element(tag: str, inner: str) -> str:
    return f"<{tag}>{inner}</{tag}>"


TEXTS = VALUES.map(lambda text: text.replace("&", "&amp;").replace("<", "&lt;"))
FIELDS = st.tuples(
    st.sampled_from(["Key", "Size", "LastModified", "ETag", "UserMetadata", "Internal", "Other"]), TEXTS
).map(lambda pair: element(*pair))
WHOLE = st.tuples(TEXTS, DATES, NUMBERS).map(
    lambda v: element("Key", v[0]) + element("LastModified", v[1]) + element("Size", v[2])
)
ENTRIES = st.one_of(
    WHOLE.map(lambda inner: element("Contents", inner)),
    st.lists(FIELDS, max_size=5).map(lambda inner: element("Contents", "".join(inner))),
    TEXTS.map(lambda inner: element("CommonPrefixes", element("Prefix", inner))),
    st.sampled_from(["<EncodingType>url</EncodingType>", "<IsTruncated>true</IsTruncated>", "<CommonPrefixes/>"]),
)
ENCODINGS = st.sampled_from(["", *(f'<?xml version="1.0" encoding="{name}"?>' for name in ("rot13", "hex", "idna"))])
PAGES = st.one_of(
    st.binary(),
    st.tuples(ENCODINGS, st.lists(ENTRIES, max_size=4)).map(
        lambda page: (page[0] + element("ListBucketResult", "".join(page[1]))).encode("utf-8", "replace")
    ),
)
ODD_XML = (
    b'<?xml version="1.0" encoding="rot13"?><ListBucketResult/>',
    b'<?xml version="1.0" encoding="utf-7"?><ListBucketResult/>',
    b'<?xml version="1.0" encoding="utf-32"?><ListBucketResult/>',
    b'<!DOCTYPE a [<!ENTITY b "b"><!ENTITY c "&b;&b;">]><ListBucketResult>&c;</ListBucketResult>',
    b"<a>" * 20_000,
)


@given(PAGES)
def test_pages(body: bytes) -> None:
    page = answer(lambda: parse_listing("p/", body))
    if isinstance(page, Listing):
        for info in page.objects:
            assert_in_range(info)
    is_xml(body)


@given(PAGES)
def test_error_bodies(body: bytes) -> None:
    code = error_code(body)
    assert len(code) <= 100
    assert isinstance(error_of("put", KEY, code, 500), PhfsError)


@pytest.mark.parametrize("body", ODD_XML, ids=range(len(ODD_XML)))
def test_xml_that_the_parser_chokes_on(body: bytes) -> None:
    answer(lambda: parse_listing("p/", body))
    assert error_code(body) == ""
    is_xml(body)


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=9)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=9), inner, max_size=3)),
)
OBJECTS = st.fixed_dictionaries(
    {"key": st.one_of(st.text(), JSON)}, optional={"size": JSON, "eTag": JSON, "userMetadata": JSON}
)
RECORDS = st.fixed_dictionaries(
    {
        "eventName": st.one_of(st.just("s3:ObjectCreated:Put"), JSON),
        "s3": st.one_of(OBJECTS.map(lambda o: {"object": o}), JSON),
    }
)
LINES = st.one_of(
    st.binary(), st.lists(RECORDS, max_size=3).map(lambda found: json.dumps({"Records": found}).encode())
)


@given(LINES)
@example(b'{"Records":[{"eventName":"s3:ObjectCreated:Put","s3":{"object":{"key":"p/a","size":Infinity}}}]}')
@example(b'{"Records":[{"eventName":"s3:ObjectCreated:Put","s3":{"object":{"key":"\\ud800","size":1}}}]}')
@example(b'{"Records":' + b"9" * 5000 + b"}")
@example(b"[" * 100_000)
def test_lines_of_events(line: bytes) -> None:
    for event in answer(lambda: parse_events(line)) or ():  # type: ignore[attr-defined]
        assert 0 <= event.size <= SIZE_BYTES_MAX
        event.key.encode()


@given(
    st.dictionaries(
        st.one_of(st.sampled_from(["mode", "uid", "gid", "rdev", "mtime", "--symlink-target"]), st.text(max_size=9)),
        st.one_of(VALUES, st.integers(-70_000_000_000, 300_000_000_000).map(lambda at: f"{at}.5")),
    )
)
@example({"uid": "9" * 5000, "gid": "9" * 5000, "rdev": "9" * 5000, "mode": "9" * 5000, "mtime": "9" * 5000})
def test_attributes(metadata: dict[str, str]) -> None:
    found = from_metadata(metadata, 7, Attrs(mode=0o100644, uid=1, gid=2, mtime_ns=7))
    assert TIME_NS_MIN <= found.mtime_ns <= TIME_NS_MAX
    assert max(found.uid, found.gid, found.rdev) <= ID_MAX
    assert 0 <= found.mode <= 0o177777
    to_metadata(found)


@pytest.mark.parametrize("failure", [OverflowError, LookupError, RecursionError, KeyError, RuntimeError])
async def test_what_botocore_makes_of_an_answer(failure: type[Exception]) -> None:
    calls = BotoTransport(StoreConfig(bucket="b"))

    def call() -> None:
        raise failure("x")

    with pytest.raises(BadAnswer):
        await calls._run("head", KEY, call, None)  # type: ignore[arg-type]


def test_an_etag_that_no_header_can_carry() -> None:
    with pytest.raises(BadAnswer):
        info_of(KEY, {"etag": "a\r\nb: c", "content-length": "1"})
    assert info_of(KEY, {"etag": '"a-2"', "content-length": "1"}).etag == ETag("a-2")

"""Codes, statuses, headers and pages, as a table each."""

from __future__ import annotations

import time

import pytest

from phfs_fuse.errors import (
    AccessDenied,
    BadAnswer,
    BucketNotFound,
    ClockOff,
    CredentialsRefused,
    IllegalName,
    InvalidArgument,
    NameTooLong,
    NotADirectory,
    NotFound,
    NotSupported,
    PhfsError,
    QuotaExceeded,
    StoreTimeout,
    StoreUnavailable,
    TooLarge,
    VersionChanged,
    WrongRegion,
)
from phfs_fuse.store.base import content_type
from phfs_fuse.store.error_codes import OutOfRange, check_key, check_metadata, error_of
from phfs_fuse.store.headers import etag_of, http_date_ns, info_of, user_metadata
from phfs_fuse.store.listing_xml import parse_listing
from phfs_fuse.types import ETag, ObjectKey


@pytest.mark.parametrize(
    ("code", "status", "error"),
    [
        ("NoSuchKey", 404, NotFound),
        ("404", 404, NotFound),
        ("", 404, NotFound),
        ("NoSuchBucket", 404, BucketNotFound),
        ("NoSuchUpload", 404, NotFound),
        ("AccessDenied", 403, AccessDenied),
        ("403", 403, CredentialsRefused),
        ("", 401, CredentialsRefused),
        ("SomethingNew", 403, AccessDenied),
        ("InvalidAccessKeyId", 403, CredentialsRefused),
        ("SignatureDoesNotMatch", 403, CredentialsRefused),
        ("ExpiredToken", 400, CredentialsRefused),
        ("InvalidRequest", 400, InvalidArgument),
        ("MethodNotAllowed", 405, NotSupported),
        ("", 405, NotSupported),
        ("ThrottlingException", 400, StoreUnavailable),
        ("RequestTimeTooSkewed", 403, ClockOff),
        ("PreconditionFailed", 412, VersionChanged),
        ("ConditionalRequestConflict", 409, VersionChanged),
        ("OperationAborted", 409, StoreUnavailable),
        ("InvalidRange", 416, OutOfRange),
        ("SlowDown", 503, StoreUnavailable),
        ("InternalError", 500, StoreUnavailable),
        ("RequestTimeout", 400, StoreTimeout),
        ("", 504, StoreTimeout),
        ("", 429, StoreUnavailable),
        ("BadDigest", 400, BadAnswer),
        ("KeyTooLongError", 400, NameTooLong),
        ("EntityTooLarge", 400, TooLarge),
        ("NotImplemented", 501, NotSupported),
        ("XMinioInvalidObjectName", 400, IllegalName),
        ("XMinioParentIsObject", 400, NotADirectory),
        ("XMinioAdminBucketQuotaExceeded", 400, QuotaExceeded),
        ("InvalidPart", 400, InvalidArgument),
        ("PermanentRedirect", 301, WrongRegion),
    ],
)
def test_errors(code: str, status: int, error: type[PhfsError]) -> None:
    found = error_of("head", "key", code, status)
    assert type(found) is error
    assert str(found).startswith("head key: ")
    assert code in found.reason


@pytest.mark.parametrize(
    ("key", "error"),
    [
        ("", IllegalName),
        (".", IllegalName),
        ("a/..", IllegalName),
        ("a/./b", IllegalName),
        ("a\0b", IllegalName),
        ("\ud800", IllegalName),
        ("é" * 513, NameTooLong),
    ],
)
def test_keys_that_cannot_be_sent(key: str, error: type[PhfsError]) -> None:
    with pytest.raises(error):
        check_key("put", key)


@pytest.mark.parametrize("key", ["a", "a//b", "...", "a/..b", "é" * 512, " ", "\n", "/"])
def test_keys_that_can(key: str) -> None:
    check_key("put", key)


def test_metadata_that_a_header_carries() -> None:
    check_metadata("put", "key", {"mode": "0100644", "empty": "", "user.x": "a b\"'=;"})


@pytest.mark.parametrize(
    ("name", "value"), [("", "x"), ("a b", "x"), ("é", "x"), ("a:", "x"), ("a", "x\r\nb: c"), ("a", "x ")]
)
def test_metadata_that_it_does_not(name: str, value: str) -> None:
    with pytest.raises(InvalidArgument):
        check_metadata("put", "key", {name: value})


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("dir/", "application/x-directory"),
        ("a.txt", "text/plain"),
        ("a.PNG", "image/png"),
        ("http://example/a.json", "application/json"),
        ("data:text/html,x", "application/octet-stream"),
        ("a", "application/octet-stream"),
    ],
)
def test_content_type(key: str, expected: str) -> None:
    assert content_type(key) == expected


def test_etags_lose_their_quotes() -> None:
    assert etag_of('"abc-2"', "head", "key") == etag_of('W/"abc-2"', "head", "key") == "abc-2"
    with pytest.raises(BadAnswer):
        etag_of(None, "head", "key")


def test_dates() -> None:
    assert http_date_ns("Thu, 01 Jan 1970 00:01:00 GMT") == 60 * 10**9
    assert http_date_ns("rubbish") > 10**18
    assert http_date_ns(None) % 10**9 == 0


def test_user_metadata_among_headers() -> None:
    headers = {"X-Amz-Meta-Mode": "0100644", "content-type": "a/b", "x-amz-meta-": "", "x-amz-meta-N": "Ã©"}
    assert user_metadata(headers) == {"mode": "0100644", "": "", "n": "é"}


@pytest.mark.parametrize("headers", [{}, {"etag": '"e"'}, {"etag": '"e"', "content-length": "many"}])
def test_a_head_without_what_it_must_have(headers: dict[str, str]) -> None:
    with pytest.raises(BadAnswer):
        info_of(ObjectKey("key"), headers)


def page(inner: str) -> bytes:
    return f'<ListBucketResult xmlns="http://any/">{inner}</ListBucketResult>'.encode()


CONTENTS = """<Contents><Key>a%2Bb+c%01</Key><LastModified>1970-01-01T00:01:00.987Z</LastModified>
<ETag>&#34;e&#34;</ETag><Size>7</Size>{}</Contents>"""


def test_a_page_with_encoded_keys() -> None:
    prefix = "<CommonPrefixes><Prefix>p%2F+q/</Prefix></CommonPrefixes>"
    listing = parse_listing("", page("<EncodingType>url</EncodingType>" + CONTENTS.format("") + prefix))
    (info,) = listing.objects
    assert (info.key, info.etag, info.size) == (ObjectKey("a+b c\x01"), ETag("e"), 7)
    assert info.modified_ns == 60 * 10**9  # whole seconds, as HEAD
    assert info.metadata is None
    assert list(listing.prefixes) == ["p/ q/"]
    assert listing.next_token is None


def test_a_page_with_plain_keys() -> None:
    (info,) = parse_listing("", page(CONTENTS.format(""))).objects
    assert info.key == "a%2Bb+c%01"


@pytest.mark.parametrize(
    ("extra", "metadata"),
    [
        ("", None),
        ("<Internal><K>1</K></Internal>", {}),
        ("<UserMetadata><content-type>a/b</content-type></UserMetadata>", {}),
        ("<UserMetadata><X-Amz-Meta-Mode>0100644</X-Amz-Meta-Mode></UserMetadata>", {"mode": "0100644"}),
        ("<UserMetadata><X-Amz-Meta-N>é</X-Amz-Meta-N></UserMetadata>", {"n": "é"}),
    ],
)
def test_metadata_in_a_page(extra: str, metadata: dict[str, str] | None) -> None:
    (info,) = parse_listing("", page(CONTENTS.format(extra))).objects
    assert info.metadata == metadata


def test_a_page_that_is_not_the_last() -> None:
    more = "<IsTruncated>true</IsTruncated><NextContinuationToken>t+/=</NextContinuationToken>"
    assert parse_listing("", page(more)).next_token == "t+/="


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"no xml",
        b"<html/>",
        b"<ListBucketResult>",
        page("<IsTruncated>true</IsTruncated>"),
        page("<Contents><Size>1</Size></Contents>"),
        page("<CommonPrefixes/>"),
    ],
)
def test_pages_that_are_none(body: bytes) -> None:
    with pytest.raises(BadAnswer):
        parse_listing("p/", body)


@pytest.mark.parametrize("fields", ["<Size>x</Size>", "<Size>-1</Size>", "<Size>1</Size><ETag>&#10;</ETag>"])
def test_one_object_of_which_a_page_says_nonsense(fields: str) -> None:
    listing = parse_listing("", page(f"<Contents><Key>a</Key>{fields}</Contents>{CONTENTS.format('')}"))
    assert (list(listing.unreadable), len(listing.objects)) == (["a"], 1)


@pytest.mark.parametrize("text", ["now", "", "2024-13-01T00:00:00Z", "9999-12-31T23:59:59-23:59", "9" * 400])
def test_a_time_that_cannot_be_read_is_that_of_the_answer(text: str) -> None:
    """As with a HEAD; the entry stays, and shows no time out of range."""
    fields = f"<Key>a</Key><Size>1</Size><ETag>e</ETag><LastModified>{text}</LastModified>"
    listing = parse_listing("", page(f"<Contents>{fields}</Contents>{CONTENTS.format('')}"))
    odd, _ = listing.objects
    assert (odd.key, odd.size, odd.etag, listing.unreadable) == ("a", 1, "e", ())
    if text != "9999-12-31T23:59:59-23:59":  # a time, if a clamped one
        assert abs(odd.modified_ns - time.time_ns()) < 60 * 10**9


def test_an_entry_without_a_time() -> None:
    (odd,) = parse_listing("", page("<Contents><Key>a</Key><Size>1</Size></Contents>")).objects
    assert abs(odd.modified_ns - time.time_ns()) < 60 * 10**9


def test_an_object_that_needs_a_key_of_its_owner() -> None:
    """MinIO names the algorithm of SSE-C in its listings, AWS nothing of it."""
    told = "<X-Amz-Server-Side-Encryption-Customer-Algorithm>AES256</X-Amz-Server-Side-Encryption-Customer-Algorithm>"
    plain, sealed = parse_listing(
        "", page(CONTENTS.format("") + CONTENTS.format(f"<UserMetadata>{told}</UserMetadata>"))
    ).objects
    assert (plain.is_sealed, sealed.is_sealed) == (False, True)

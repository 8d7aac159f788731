"""The one line about a store that cannot be used: what was tried, where that came from, the cause, the remedy."""

from __future__ import annotations

import pytest

from phfs_fuse.config.model import StoreConfig
from phfs_fuse.errors import PhfsError, StoreUnavailable, store_startup_error
from phfs_fuse.store.error_codes import error_of

ENDPOINT = StoreConfig(bucket="b", endpoint_url="http://m:9000", endpoint_from="AWS_ENDPOINT_URL").endpoint_text
assert ENDPOINT == "http://m:9000 (from AWS_ENDPOINT_URL)"


@pytest.mark.parametrize(
    ("exc", "line"),
    [
        (
            error_of("list", "s3://b/", "InvalidAccessKeyId", 403),
            f"s3://b/: access denied at {ENDPOINT}: the store does not know this access key; "
            "check the credentials and their rights (InvalidAccessKeyId)",
        ),
        (
            error_of("list", "s3://b/", "AccessDenied", 403),
            f"s3://b/: access denied at {ENDPOINT}; check the credentials and their rights (AccessDenied)",
        ),
        (
            error_of("list", "s3://b/", "RequestTimeTooSkewed", 403),
            f"s3://b/: the clock of this machine is too far from the store's at {ENDPOINT}; "
            "set it (NTP) (RequestTimeTooSkewed)",
        ),
        (
            error_of("list", "s3://b/", "AuthorizationHeaderMalformed", 400),
            f"s3://b/: the bucket is in another region at {ENDPOINT}; name it with --region "
            "(AuthorizationHeaderMalformed)",
        ),
        (
            error_of("list", "s3://b/", "NoSuchBucket", 404),
            "s3://b/: there is no such bucket at http://m:9000 (from AWS_ENDPOINT_URL); --create-bucket makes it",
        ),
        (
            StoreUnavailable("connect", "s3://b/", "connection refused"),
            "s3://b/: the store at http://m:9000 (from AWS_ENDPOINT_URL) does not answer: connection refused; "
            "check --endpoint-url and the network",
        ),
        (
            error_of("list", "s3://b/", "", 503),
            "s3://b/: the store at http://m:9000 (from AWS_ENDPOINT_URL) does not answer: HTTP 503; "
            "check --endpoint-url and the network",
        ),
    ],
    ids=lambda value: value.code or value.reason if isinstance(value, PhfsError) else "",
)
def test_one_line(exc: PhfsError, line: str) -> None:
    assert str(store_startup_error(exc, "s3://b/", ENDPOINT)) == line


def test_an_endpoint_that_nobody_named() -> None:
    assert "boto3" in StoreConfig(bucket="b").endpoint_text

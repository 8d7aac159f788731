"""The form of log lines, and that no credential gets into one."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Iterator

import pytest

from phfs_fuse.host import logs


@pytest.fixture(autouse=True)
def _handlers_of_pytest_come_back(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    root.handlers = []  # else the set-up closes them
    yield
    root.handlers, root.level = before, level
    for name in ("boto3", "botocore", "s3transfer", "urllib3"):
        logging.getLogger(name).setLevel(logging.NOTSET)


def logged(level: str, form: str, message: str, *arguments: object, broken: bool = False) -> str:
    stream = io.StringIO()
    logs.setup(level, form, stream)
    try:
        if broken:
            raise ValueError("secret_key=Hidden1")
        logging.getLogger("phfs_fuse.test").info(message, *arguments)
    except ValueError:
        logging.getLogger("phfs_fuse.test").exception(message)
    return stream.getvalue()


def test_a_text_line() -> None:
    line = logged("info", "text", "uploaded key=%s bytes=%d", "a/b", 5)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:]{8}\.\d{3}Z INFO phfs_fuse\.test: uploaded key=a/b bytes=5\n", line)


def test_a_json_line() -> None:
    line = logged("info", "json", "key=%s", "é\n")
    fields = json.loads(line)
    assert line.count("\n") == 1
    assert (fields["level"], fields["logger"], fields["message"]) == ("info", "phfs_fuse.test", "key=é\n")
    assert re.fullmatch(r"[\d-]{10}T[\d:]{8}\.\d{3}Z", fields["time"])


def test_a_traceback_in_json_is_in_the_same_line_without_secrets() -> None:
    line = logged("info", "json", "failed", broken=True)
    assert line.count("\n") == 1
    assert "ValueError: secret_key=[redacted]" in json.loads(line)["traceback"]


def test_the_level_counts_and_the_last_set_up_too() -> None:
    assert logged("warning", "text", "quiet") == ""
    assert "loud" in logged("debug", "text", "loud")


def test_libraries_that_log_whole_requests_stay_quiet() -> None:
    logs.setup("debug", "text", io.StringIO())
    assert not logging.getLogger("botocore.auth").isEnabledFor(logging.INFO)
    assert logging.getLogger("botocore.auth").isEnabledFor(logging.WARNING)


@pytest.mark.parametrize(
    "text",
    [
        "aws_secret_access_key=Hidden1",
        "SECRET_KEY: 'Hidden1'",
        "{'aws_session_token': 'Hidden1'}",
        '{"secretAccessKey": "Hidden1", "x": 1}',
        "x-amz-security-token:Hidden1",
        "GET http://h/b?X-Amz-Signature=Hidden1&x=1",
        "GET http://h/b?X-Amz-Credential=Hidden1/2025/s3",
        "Authorization: AWS4-HMAC-SHA256 Credential=AK/x, SignedHeaders=a;b, Signature=Hidden1",
        "{'Authorization': 'AWS4-HMAC-SHA256 Credential=AK, Signature=Hidden1'}",
        "password=Hidden1",
        "http://user:Hidden1@host/",
    ],
)
def test_credentials_are_blanked(text: str) -> None:
    assert "Hidden1" not in logs.redacted(text)
    assert "[redacted]" in logs.redacted(text)


@pytest.mark.parametrize(
    "text", ["uploaded key=notes/token.txt", "http://host:9000/a@b", "signature of f(x)", "a secret key"]
)
def test_other_text_stays(text: str) -> None:
    assert logs.redacted(text) == text


STEERING = "a\n2026-11-29T00:00:00.000Z ERROR phfs_fuse.x: forged\r\x1b]0;t\x07\x9b2J\x7f\u2028\u202e\udcff"


def test_a_name_forges_no_text_line_and_steers_no_terminal() -> None:
    line = logged("info", "text", "uploaded key=%s", STEERING)
    assert line.count("\n") == 1
    assert line.removesuffix("\n").isprintable()
    assert r"a\n2026" in line


def test_a_name_in_an_exception_forges_no_text_line(caplog: pytest.LogCaptureFixture) -> None:
    stream = io.StringIO()
    logs.setup("info", "text", stream)
    try:
        raise ValueError(STEERING)
    except ValueError:
        logging.getLogger("phfs_fuse.test").exception("failed key=%s", STEERING)
    first, *below = stream.getvalue().splitlines()
    assert first.isprintable()
    assert all(line.isprintable() and line.startswith("  ") for line in below)


def test_a_json_line_steers_no_terminal_either() -> None:
    line = logged("info", "json", "key=%s", STEERING)
    assert line.removesuffix("\n").isprintable()
    assert json.loads(line)["message"] == f"key={STEERING}"

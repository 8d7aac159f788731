"""Log set-up: text or JSON lines on standard error, without secrets; and text that is safe for a terminal.

State: the handlers of the root logger.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from typing import Any, Final, TextIO

# Header, query and dict forms of credentials and signatures. Source: AWS Signature Version 4
_HEADER: Final = re.compile(r"(?i)(authorization['\"]?\s*[:=]\s*+['\"]?)[^'\"\n]+")
_PAIR: Final = re.compile(
    r"(?i)((?:secret[_-]?(?:access[_-]?)?key|(?:session|security)[_-]?token|password|x-amz-(?:signature|credential))"
    r"['\"]?\s*[:=]\s*['\"]?)[^\s'\"&,;]+"
)
_USERINFO: Final = re.compile(r"(\w+://)[^/\s@]+@")
_NOISY: Final = ("boto3", "botocore", "s3transfer", "urllib3")  # their debug lines hold whole requests


def setup(level: str, form: str, stream: TextIO | None = None, *, name: str = "") -> None:
    """Send records from `level` (debug, info, warning, error) on to `stream`, as `text` or `json` lines. `name` is
    that of the mount, where several write to one log.

    May be called again: the last call counts.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter(name) if form == "json" else TextFormatter(name))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for name in _NOISY:
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLogger().level))


def redacted(text: str) -> str:
    """`text` with what looks like a credential blanked."""
    text = _HEADER.sub(r"\1[redacted]", text)
    text = _PAIR.sub(r"\1[redacted]", text)
    return _USERINFO.sub(r"\1[redacted]@", text)


def printable(text: str) -> str:
    """`text` on one line, without characters that steer a terminal: names are chosen by other people. A newline
    becomes `\\n`, an escape character `\\x1b`, a byte that is no text `\\udcff`."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


class TextFormatter(logging.Formatter):
    """`2025-01-31T12:00:00.123Z INFO phfs_fuse.writeback.loop: message`, a traceback below, indented: nothing in a
    message or an exception can look like a line of the log. A name of the mount comes before the message, in
    brackets."""

    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03dZ"

    def __init__(self, name: str = "") -> None:
        self._name = name
        prefix = f"[{name}] ".replace("%", "%%") if name else ""
        super().__init__(f"%(asctime)s %(levelname)s %(name)s: {prefix}%(message)s")
        self.converter = time.gmtime

    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:
        return "\n".join(f"  {printable(line)}" for line in super().formatException(ei).splitlines())


class JsonFormatter(TextFormatter):
    """One object a line: `time`, `level`, `logger`, `message`, `pid`, with a name of the mount `mount`, and after an
    exception `traceback`."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, object] = {
            "time": self.formatTime(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": redacted(record.getMessage()),
            "pid": record.process,
        }
        if self._name:
            fields["mount"] = self._name
        if record.exc_info:
            fields["traceback"] = redacted(self.formatException(record.exc_info))
        line = json.dumps(fields, ensure_ascii=False)
        return line if line.isprintable() else json.dumps(fields)

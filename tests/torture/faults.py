"""Faults that the store of one mount shows in its answers. Owns the kinds of a round and the chance of each."""

from __future__ import annotations

import random
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from urllib.parse import parse_qs, urlsplit

from tests.support.proxy import Action, Answer, Forward, Raw, Request

DRIP_SECONDS = 1.0
ENDLESS = "phfs-endless-"  # begins the tokens of a listing without end
BANNERS = [
    b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n",
    b"220 mail.example.com ESMTP\r\n",
    b"\x15\x03\x01\x00\x02\x02\x46",  # an alert of TLS
    b"HTTP/1.1 abc\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 300 + b"\r\n\r\n",
]
NUMBERS = ["9" * 300, "-" + "9" * 30, str(2**64), "1e308", "nan", "0x10", "", "\u00b2"]
DATES = ["Fri, 31 Dec 99999 23:59:59 GMT", "Mon, 00 Foo 0000 99:99:99 GMT", "9" * 300]
LISTED = re.compile(rb"(<X-Amz-Meta-(?:Mtime|Uid|Gid|Rdev)>)[^<]*")
EVENT = b'{"Records":[{"eventName":"s3:ObjectCreated:Put","s3":{"object":{"key":"%s","size":%s,"eTag":"x"}}}]}\n'


@dataclass
class Faults:
    """`chance`: of a fault of one of `kinds` at each request; `away`: all are refused; `streams`: whether the
    store has events; `seen` is told of each request; `refused_key`: access key that is not valid any more."""

    random: random.Random
    seen: Callable[[Request], None] = lambda _: None
    chance: float = 0.0
    kinds: tuple[str, ...] = ("errors",)
    away: bool = False
    streams: bool = True
    refused_key: str = ""
    refused_deletes: str = ""  # keys that hold this text cannot be deleted
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def script(self, request: Request) -> Action:
        with self._lock:
            self.seen(request)
            return self._fault(request)

    def _fault(self, request: Request) -> Action:
        query = parse_qs(urlsplit(request.path).query)
        if self.away:
            return Answer(503)
        if self.refused_key and self.refused_key in request.headers.get("authorization", ""):
            return refused("InvalidAccessKeyId")
        if self.refused_deletes and (answer := self._refused_delete(request, query)):
            return answer
        if "events" in query and not self.streams:
            return Answer(503)
        if (token := query.get("continuation-token", [""])[0]).startswith(ENDLESS):
            return endless(token)
        if not self.chance or self.random.random() >= self.chance:
            return Forward()
        kinds = [kind for kind in self.kinds if kind != "pages" or query.get("list-type")]
        return KINDS[self.random.choice(kinds or ["errors"])](self.random, request)

    def _refused_delete(self, request: Request, query: dict[str, list[str]]) -> Answer | None:
        """Of many keys, those that are not refused are to be asked for again."""
        text = self.refused_deletes
        if request.method == "DELETE" and text in request.path and "uploadId" not in query:
            return refused("AccessDenied")
        keys = re.findall(rb"<Key>([^<]*)</Key>", request.body) if request.method == "POST" else []
        if not any(text.encode() in key for key in keys):
            return None
        rows = b"".join(
            b"<Error><Key>%b</Key><Code>%b</Code><Message>no</Message></Error>"
            % (key, b"AccessDenied" if text.encode() in key else b"SlowDown")
            for key in keys
        )
        return Answer(200, {"content-type": "application/xml"}, b"<DeleteResult>%b</DeleteResult>" % rows)


def refused(code: str) -> Answer:
    return Answer(403, {"content-type": "application/xml"}, f"<Error><Code>{code}</Code></Error>".encode())


def endless(token: str) -> Answer:
    """An empty page, with the next token, or with the same again."""
    number = token.removeprefix(ENDLESS)
    token = ENDLESS + (number if number.startswith("again") else str(int(number) + 1))
    rows = f"<IsTruncated>true</IsTruncated><NextContinuationToken>{token}</NextContinuationToken>"
    return Answer(200, {"content-type": "application/xml"}, f"<ListBucketResult>{rows}</ListBucketResult>".encode())


def errors(chance: random.Random, request: Request) -> Action:
    """As stores fail that have too much to do, and lines that break."""
    what = chance.random()
    if what < 0.5:
        return Answer(503 if what < 0.3 else 500)
    if what < 0.8 and request.method != "GET":
        return Forward(lost=True)
    return Forward(cut=chance.randrange(2000))


def closed(chance: random.Random, request: Request) -> Action:
    return Raw()


def banner(chance: random.Random, request: Request) -> Action:
    return Raw(chance.choice(BANNERS))


def drip(chance: random.Random, request: Request) -> Action:
    if chance.random() < 0.5:
        return Raw(b"HTTP/1.1 200 OK\r\n" + b"X-Padding: none\r\n" * 10_000, DRIP_SECONDS)
    return Forward(edit=lambda answer: replace(answer, drip=DRIP_SECONDS))


def pages(chance: random.Random, request: Request) -> Action:
    return endless(ENDLESS + chance.choice(["0", "again"]))


def numbers(chance: random.Random, request: Request) -> Action:
    number, date = chance.choice(NUMBERS), chance.choice(DATES)

    def edited(answer: Answer) -> Answer:
        headers = dict(answer.headers)
        if answer.status == 200 and request.method in ("GET", "HEAD"):
            names = [name for name in headers if name.lower() in ("last-modified", "content-range")]
            name = chance.choice([*names, "x-amz-meta-mtime", "x-amz-meta-uid", "x-amz-meta-gid", "x-amz-meta-rdev"])
            headers[name] = date if name.lower() == "last-modified" else number
            headers["Retry-After"] = number
        body = LISTED.sub(rb"\g<1>" + number.encode(), answer.body) if b"<ListBucketResult" in answer.body else None
        return replace(answer, headers=headers, body=answer.body if body is None else body)

    event = EVENT % (b"groups/test/none", number.encode() or b"null")
    return Forward(edit=edited, first=event)


Fault = Callable[[random.Random, Request], Action]
KINDS: dict[str, Fault] = {fault.__name__: fault for fault in (errors, closed, banner, drip, pages, numbers)}

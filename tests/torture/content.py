"""File contents of the torture run that tell whose they are, and names that tell who may change them.

A name ends with its owner (`00017-m0`): programs on mount 0 alone change it. Names of SHARED are changed by all.
"""

from __future__ import annotations

import hashlib
import random
import re

SHARED = "x"
CLIENT = "s"  # a plain S3 client
GUEST = "guest-"  # starts the names of files that the S3 client puts into folders of others
NAME = re.compile(r"[\w.]+-\w+|guest-[\w-]+")
HEAD = re.compile(rb"(\w+) (\d+) (\d+)\n")
FIRST_BYTES_MAX = 1500


def digest(data: bytes) -> str:
    """The ETag of an object with these bytes."""
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def written(owner: str, count: int, padding: int) -> bytes:
    """Different for each `owner` and `count`, so that no stale or mixed version can pass."""
    return b"%s %d %d\n" % (owner.encode(), count, padding) + random.Random(f"{owner}{count}").randbytes(padding)


def writer_of(data: bytes) -> str | None:
    """Who wrote the whole of these bytes; None: nobody did."""
    head = HEAD.match(data)
    if head is None or int(head[3]) != len(data) - head.end():
        return None
    owner = head[1].decode()
    return owner if data == written(owner, int(head[2]), int(head[3])) else None


def owner_of(path: str) -> str:
    return path.rpartition("-")[2]


def first_files(owners: list[str], count: int) -> dict[str, bytes]:
    """A folder of `count` files at the start: the names of all owners are mixed in the order of a listing."""
    found = {}
    for number in range(count):
        owner = owners[number % len(owners)]
        found[f"{number:05}-{owner}"] = written(owner, number, number * 7919 % FIRST_BYTES_MAX)
    return found

"""The keys that names stand for, whatever has moved since they were asked for last."""

from __future__ import annotations

import pytest

from phfs_fuse.attrs import Attrs
from phfs_fuse.errors import NameTooLong
from phfs_fuse.tree.inodes import Inodes
from phfs_fuse.tree.node import Node

FILE = Attrs(mode=0o100644, uid=0, gid=0, mtime_ns=0)
FOLDER = Attrs(mode=0o040755, uid=0, gid=0, mtime_ns=0)


@pytest.fixture
def inodes() -> Inodes:
    return Inodes("groups/a/", FOLDER, now_ns=0)


def add(inodes: Inodes, parent: Node, name: bytes, attrs: Attrs = FOLDER) -> Node:
    node = inodes.new(attrs, ctime_ns=0)
    inodes.attach(parent, name, node)
    return node


def test_the_key_follows_each_folder_above(inodes: Inodes) -> None:
    one = add(inodes, inodes.root, b"one")
    two = add(inodes, one, b"two")
    file = add(inodes, two, b"file", FILE)
    assert inodes.key(inodes.root) == "groups/a/"
    assert (inodes.key(two), inodes.key(file)) == ("groups/a/one/two/", "groups/a/one/two/file")
    inodes.move(one, inodes.root, b"uno")
    assert (inodes.key(two), inodes.key(file)) == ("groups/a/uno/two/", "groups/a/uno/two/file")
    inodes.move(two, inodes.root, b"two")
    assert (inodes.key(two), inodes.key(file), inodes.key(one)) == (
        "groups/a/two/",
        "groups/a/two/file",
        "groups/a/uno/",
    )
    inodes.move(file, one, b"f")
    assert inodes.key(file) == "groups/a/uno/f"


def test_what_has_lost_its_name_keeps_the_key_that_it_had(inodes: Inodes) -> None:
    folder = add(inodes, inodes.root, b"d")
    folder.opens = 1
    file = add(inodes, folder, b"f", FILE)
    file.opens = 1
    inodes.detach(file)
    inodes.detach(folder)
    again = add(inodes, inodes.root, b"d")
    assert (inodes.key(folder), inodes.key(file), inodes.key(again)) == ("groups/a/d/", "groups/a/d/f", "groups/a/d/")


def test_a_key_that_is_too_long_is_refused_each_time(inodes: Inodes) -> None:
    at = inodes.root
    for _ in range(4):
        at = add(inodes, at, b"n" * 250)
    file = add(inodes, at, b"n" * 100, FILE)
    for _ in range(2):
        with pytest.raises(NameTooLong):
            inodes.key(file)

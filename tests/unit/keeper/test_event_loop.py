"""The keeper's loop, and what it reads: nothing that one call or one packet brings about ends the mount."""

from __future__ import annotations

import logging
import socket

import pytest

from phfs_fuse.config import json_text
from phfs_fuse.keeper import messages
from phfs_fuse.keeper.event_loop import EventLoop

NEST = b"[" * 16_000


def test_a_call_that_fails_is_logged_and_due_again(caplog: pytest.LogCaptureFixture) -> None:
    loop, calls = EventLoop(), 0

    def call() -> None:
        nonlocal calls
        calls += 1
        if calls < 3:
            raise LookupError("nobody foresaw it")

    loop.call_later(0.0, call)
    while calls < 3:
        loop.step()
    assert [record.levelno for record in caplog.records] == [logging.ERROR] * 2
    assert not loop._due


def test_a_packet_that_fails_leaves_the_next_ones() -> None:
    loop, heard = EventLoop(), []
    ours, theirs = socket.socketpair()

    def read() -> None:
        data = ours.recv(1)
        if data == b"x":
            raise RecursionError
        heard.append(data)

    with ours, theirs:
        loop.watch(ours, read)
        theirs.send(b"xy")
        loop.step()
        loop.step()
    assert heard == [b"y"]


@pytest.mark.parametrize("text", [NEST, b"{" * 3, b"\xff\0", b"9" * 5000])
def test_json_that_is_none(text: bytes) -> None:
    for parse in (json_text.parse, messages.decode):
        with pytest.raises((ValueError, TypeError, KeyError)):
            parse(text)

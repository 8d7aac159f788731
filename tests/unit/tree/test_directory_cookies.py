"""Cookies of a directory: they rise with the names, stay the same while names come and go, and take little room."""

from __future__ import annotations

import random

import pytest

from phfs_fuse.tree import directory_cookies as module
from phfs_fuse.tree.directory_cookies import END, START, STEP, DirectoryCookies, restored

GONE = frozenset[bytes]()


def names(*numbers: int) -> list[bytes]:
    return [b"n%07d" % number for number in numbers]


def listed(places: DirectoryCookies, keys: list[bytes], *, at_once: int = 100) -> dict[bytes, int]:
    """A pass over the whole directory as it is now."""
    found: dict[bytes, int] = {}
    before = START
    for cut in range(0, len(keys), at_once):
        part = keys[cut : cut + at_once]
        found.update(zip(part, places.place(before, part, GONE.__contains__), strict=True))
        before = part[-1]
    places.ended(before)
    return found


def in_order(cookies: dict[bytes, int]) -> bool:
    values = list(cookies.values())
    return values == sorted(set(values)) and values[0] > 0


@pytest.mark.parametrize("seed", range(3))
def test_names_that_come_and_go_move_no_place(seed: int) -> None:
    chance = random.Random(seed)
    places = DirectoryCookies(0)
    there = set(names(*chance.sample(range(100_000), 2000)))
    given = listed(places, sorted(there))
    for _ in range(8):
        there -= set(chance.sample(sorted(there), len(there) // 4))
        there |= set(names(*chance.sample(range(100_000), 600)))
        now = listed(places, sorted(there), at_once=chance.choice((7, 100, 1000)))
        assert in_order(now)
        assert all(now[name] == given[name] for name in there & given.keys())
        for name in chance.sample(sorted(given), 20):
            behind = places.at(given[name])
            stayed = sorted(there & given.keys())
            assert [other for other in stayed if other > behind] == [other for other in stayed if other > name]
        given = {name: cookie for name, cookie in given.items() if name in there} | now


def test_a_place_is_remembered_without_its_name() -> None:
    places = DirectoryCookies(0)
    cookies = listed(places, names(*range(10)))
    listed(places, names(0, 1, 2, 7, 8, 9))
    assert places.at(cookies[b"n0000005"]) == b"n0000002"
    assert places.behind(b"n0000002") == names(7, 8, 9)
    assert places.behind(b"n0000009") == []
    assert places.at(STEP // 2) == START


@pytest.mark.parametrize("order", [1, -1])
def test_thousands_of_names_that_come_one_by_one_at_one_spot_have_places(order: int) -> None:
    places = DirectoryCookies(0)
    listed(places, names(0, 9_999_999))
    for number in range(5000):
        before = 5_000_000 + number - 1 if number and order > 0 else 0
        places.place(*(names(before)), names(5_000_000 + order * number), GONE.__contains__)
    there = sorted(names(0, *range(5_000_000, 5_000_000 + order * 5000, order), 9_999_999))
    assert in_order(listed(places, there))


def test_where_no_room_is_left_names_come_twice_and_never_too_seldom() -> None:
    places = DirectoryCookies(0)
    low, high = 0, 10**60
    numbers = [low, high]
    for turn in range(150):
        numbers.append((low + high) // 2)
        low, high = (numbers[-1], high) if turn % 2 else (low, numbers[-1])
        there = [b"%061d" % number for number in sorted(numbers)]
        cookies = dict(zip(there, places.place(START, there, GONE.__contains__), strict=True))
    assert list(cookies.values()) == sorted(cookies.values())
    assert len(set(cookies.values())) < len(cookies)
    assert all(START < places.at(cookie) <= name for name, cookie in cookies.items())


def test_what_is_not_known_is_not_said() -> None:
    places = DirectoryCookies(0)
    places.place(START, names(1, 2, 3), GONE.__contains__)
    assert places.behind(START) == names(1, 2, 3)
    assert places.behind(b"n0000003") is None
    places.place(b"n0000100", names(101), GONE.__contains__)  # a reader that began in the middle
    assert places.behind(b"n0000003") is None
    assert places.behind(b"n0000100") is None


def test_many_names_take_little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    places = DirectoryCookies(0)
    cookies = listed(places, names(*range(100_000)), at_once=500)
    assert places._packed_bytes < 15 * 100_000
    assert len(places._at_hand) <= module.CHUNKS_AT_HAND
    monkeypatch.setattr(module, "PACKED_BYTES_MAX", places._packed_bytes // 4)
    assert in_order(listed(places, names(*range(100_000)), at_once=500))
    assert sum(len(chunk.packed) for chunk in places._packed) <= module.PACKED_BYTES_MAX
    for name, cookie in random.Random(1).sample(sorted(cookies.items()), 200):
        assert places.at(cookie) <= name  # never too far
        known = places.behind(places.at(cookie))
        assert known is None or known[0] == names(int(places.at(cookie)[1:]) + 1)[0]


def test_places_outlive_their_process() -> None:
    places = DirectoryCookies(0)
    cookies = listed(places, names(*range(3000)))
    again = restored(places.told())
    assert all(again.at(cookie) == name for name, cookie in cookies.items())
    assert again.behind(b"n0000000") == names(*range(1, 512))
    assert again.behind(b"n0002999") is None  # whether more have come is asked for once
    assert listed(again, names(*range(3000))) == cookies


def test_a_newer_word_of_a_place_counts() -> None:
    old = module.Told(START, names(1, 2, 9), [100, 200, 900])
    new = module.Told(b"n0000001", names(5, 6), [150, 180])  # the second name had gone, its place was free
    places = restored([old, new])
    assert [places.at(cookie) for cookie in (100, 150, 180, 900)] == names(1, 5, 6, 9)
    middle = module.Told(END, names(50), [5000])
    assert restored([old, middle]).behind(b"n0000009") is None

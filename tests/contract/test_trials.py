"""Objects on which a store is tried out: whatever dies, none is left."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from phfs_fuse.config.model import StoreConfig
from phfs_fuse.errors import AccessDenied, StoreUnavailable
from phfs_fuse.store.boto import BotoTransport
from phfs_fuse.store.crt import CrtTransport
from phfs_fuse.store.limits import Segment
from phfs_fuse.store.s3 import S3Store
from phfs_fuse.types import ObjectKey
from tests.support.proxy import Proxy

CHANGES = ("put", "copy", "delete", "delete_many")


class Killed(BaseException):
    """The end of the process."""


class Process:
    """A store that dies at one step: before or after a change."""

    def __init__(self, calls: BotoTransport, notes: Path, *, dies_at: int = 0) -> None:
        self.steps, self._dies_at = 0, dies_at
        for name in CHANGES:
            setattr(calls, name, self._changing(getattr(calls, name)))
        self.store = S3Store(calls.config, calls, notes=notes)

    def _changing(self, call: Callable[..., Awaitable[object]]) -> Callable[..., Awaitable[object]]:
        async def changing(*args: object) -> object:
            self._step()
            found = await call(*args)
            self._step()
            return found

        return changing

    def _step(self) -> None:
        self.steps += 1
        if 0 < self._dies_at <= self.steps:
            raise Killed


async def conditions(store: S3Store) -> None:
    await store.prepare()


async def a_name(store: S3Store) -> None:
    trial = store._names._trial
    await trial.store(trial.key(Segment(40, False)))


def calls(config: StoreConfig, kind: type[S3Store]) -> BotoTransport:
    return BotoTransport(config) if kind is S3Store else CrtTransport(config)


@pytest.fixture
def config(front: Proxy) -> StoreConfig:
    return StoreConfig(bucket="trials", prefix="t/", endpoint_url=front.endpoint_url)


async def names(store: S3Store) -> list[str]:
    return [info.key for info in (await store.list("", delimiter=False)).objects]


@pytest.mark.parametrize("trial", [conditions, a_name])
async def test_a_death_at_each_step(
    kind: type[S3Store],
    config: StoreConfig,
    tmp_path: Path,
    trial: Callable[[S3Store], Awaitable[None]],
) -> None:
    notes = tmp_path / "trials.json"
    whole = Process(calls(config, kind), notes)
    await whole.store.check_bucket(create=True)
    await trial(whole.store)
    assert (await names(whole.store), notes.exists()) == ([], False)
    left = 0
    for step in range(1, whole.steps + 1):
        dying = Process(calls(config, kind), notes, dies_at=step)
        with pytest.raises(Killed):
            await trial(dying.store)
        left += len(await names(whole.store))
        after = Process(calls(config, kind), notes)
        await after.store.tidy()
        assert (await names(whole.store), notes.exists()) == ([], False)
        for process in (dying, after):
            await process.store.aclose()
    assert left
    await whole.store.aclose()


async def test_one_that_could_not_be_removed_goes_later(
    kind: type[S3Store], config: StoreConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = S3Store(config, requests := calls(config, kind), notes=tmp_path / "trials.json")
    await store.check_bucket(create=True)
    with monkeypatch.context() as patch:

        async def refused(key: ObjectKey, _: object) -> None:
            raise AccessDenied("delete", key)

        patch.setattr(requests, "delete", refused)
        await a_name(store)
        assert len(await names(store)) == 1
        with pytest.raises(AccessDenied):
            await store.tidy()
    await store.tidy()
    assert await names(store) == []
    with monkeypatch.context() as patch:

        async def away(key: ObjectKey, _: object) -> None:
            raise StoreUnavailable("delete", key)

        patch.setattr(requests, "delete", away)
        await store.tidy()  # costs no request
    await store.aclose()


@pytest.mark.parametrize("text", ["", "{", "7", '["t/file"]', '[7, "t/file"]', '{"t/file": 1}'])
async def test_notes_that_make_no_sense_remove_nothing(
    kind: type[S3Store], config: StoreConfig, tmp_path: Path, text: str
) -> None:
    notes = tmp_path / "trials.json"
    notes.write_text(text)
    store = S3Store(config, calls(config, kind), notes=notes)
    await store.check_bucket(create=True)
    await store.put(ObjectKey("t/file"), b"bytes", {}, expect=None)
    await store.tidy()
    assert await names(store) == ["t/file"]
    await store.delete(ObjectKey("t/file"))
    await a_name(store)
    assert not notes.exists()
    notes.write_text(json.dumps(["t/file"]))
    await store.aclose()

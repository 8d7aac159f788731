"""The end of a round compared: the store, each mount, a new mount with an empty cache, and what programs promise.

Owns nothing but its findings; the store must be at rest.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.mounts import TestMount
from tests.torture.content import GUEST, digest
from tests.torture.editor import names_within, parse

ABORTED_SECONDS = 30.0  # until a new worker has aborted what the last one was sending
LOOK_SECONDS = 1200  # on a machine that has much else to do
LOOK = """
import hashlib, json, os, sys
files, folders, root = {}, [], sys.argv[1]
def failed(exc): raise exc
for at, below, names in os.walk(root, onerror=failed):
    for name in sorted(names):
        path = os.path.join(at, name)
        with open(path, "rb") as file:
            files[os.path.relpath(path, root)] = hashlib.md5(file.read(), usedforsecurity=False).hexdigest()
    folders += [os.path.relpath(os.path.join(at, name), root) for name in below]
json.dump([files, folders], sys.stdout)
"""


@dataclass
class Round:
    """What has to be there of it."""

    files: dict[str, str] = field(default_factory=dict)  # path -> hash
    folders: set[str] = field(default_factory=set)
    roots: list[str] = field(default_factory=list)  # the folders that hold all this
    shared: str = ""  # folder of the editors
    committed: dict[str, str] = field(default_factory=dict)  # line there -> where and when it was written
    big: str = ""  # folder of the crowd
    versions: dict[str, set[str]] = field(default_factory=dict)  # of the files there that all change
    guests: dict[str, tuple[str, float]] = field(default_factory=dict)  # path there -> hash, and when it was begun
    removals: dict[str, float] = field(default_factory=dict)  # folder there that guests come to -> when it was gone
    undeletable: str = ""  # folder where deletions may be refused
    contents: dict[str, tuple[list[str], bool]] = field(default_factory=dict)  # there: names by hash, is it removed
    refused: int = 0


@dataclass
class Seen:
    """What one view shows."""

    files: dict[str, str]
    folders: set[str]


class Verdict:
    def __init__(
        self, mounts: Sequence[TestMount], data: Path, done: Counter[str], find: Callable[[str], None]
    ) -> None:
        self._mounts = mounts
        self._mount = mounts[0]  # any: for the store
        self._data = data  # of the store
        self._done = done
        self._find = find

    def compare(self, when: str, rounds: Sequence[Round], views: Mapping[str, Path]) -> None:
        """The last of the rounds gets the files that several may have changed, as they are."""
        now = rounds[-1]
        looks = {name: look(path) for name, path in views.items()}
        store, markers = self._store()
        self._check_crowd(when, now, store)
        self._check_edits(when, now, store)
        self._check_undeletable(when, now, store)
        files = {name: found for past in rounds for name, found in past.files.items()}
        folders = parents(files) | {name for past in rounds for name in past.folders}
        self._differences(f"{when}, objects say", store, Seen(files, folders))
        for marker in sorted(markers):
            below = [name for name in store.files if is_within(name, marker)]
            if below and marker != now.undeletable and not any(GUEST in name for name in below):
                self._find(f"{when}, marker beside files: {marker}")
        for name, process in looks.items():
            self._differences(f"{when}, {name} sees", seen_by(process), Seen(files, folders))
        self._check_parts(when)

    def _differences(self, where: str, found: Seen, wanted: Seen) -> None:
        for name in sorted(found.files.keys() | wanted.files.keys()):
            if found.files.get(name) != wanted.files.get(name):
                kind = (
                    "lost" if name not in found.files else "too much" if name not in wanted.files else "other bytes"
                )
                self._find(f"{where} {kind}: {name}")
        for name in sorted(found.folders ^ wanted.folders):
            self._find(f"{where} folder {'lost' if name in wanted.folders else 'too much'}: {name}")

    def _store(self) -> tuple[Seen, set[str]]:
        """And the folders that have a marker."""
        mount, files, markers = self._mount, {}, set()
        for page in mount.s3.get_paginator("list_objects_v2").paginate(Bucket=mount.bucket, Prefix=mount.prefix):
            for row in page.get("Contents", ()):
                name, etag = row["Key"].removeprefix(mount.prefix), row["ETag"].strip('"')
                if name.endswith("/") or not name:
                    markers.add(name[:-1])
                else:
                    files[name] = digest(self._get(name)) if "-" in etag else etag
        return Seen(files, (parents(files) | parents(markers) | markers) - {""}), markers - {""}

    def _get(self, name: str) -> bytes:
        body: bytes = self._mount.s3.get_object(Bucket=self._mount.bucket, Key=self._mount.prefix + name)[
            "Body"
        ].read()
        return body

    def _check_crowd(self, when: str, now: Round, store: Seen) -> None:
        """Files that all change are whole, guests are where they came to or where their folder was moved to."""
        hashes = {path.rpartition("/")[2]: found for path, (found, _) in now.guests.items()}
        places: dict[str, list[str]] = {}
        for name, found in store.files.items():
            if not is_within(name, now.big):
                continue
            path = name.removeprefix(f"{now.big}/")
            last, original = path.rpartition("/")[2], path.partition(".conflict-")[0]
            if last in hashes:
                places.setdefault(last, []).append(path)
            wanted = {hashes[last]} if last in hashes else now.versions.get(original, set())
            if found in wanted:
                now.files[name] = found
        for path, (_, begun) in now.guests.items():
            folder = first_name(path)
            there = [place for place in places.get(path.rpartition("/")[2], ()) if first_name(place) == folder]
            if not there and now.removals.get(folder, 0.0) < begun:
                self._find(f"{when}, lost guest: {path}")
            if len(there) > 1:
                self._find(f"{when}, guest in several places: {there}")
        self._done["guests"] += len(now.guests)

    def _check_edits(self, when: str, now: Round, store: Seen) -> None:
        """Every line whose close was answered is in an object, or in what was saved aside and reported."""
        there: set[str] = set()
        for name, found in store.files.items():
            if is_within(name, now.shared):
                now.files[name] = found
                data = self._get(name)
                content = parse(data)
                there |= set(content.names)
                if content.good_bytes < len(data) and not now.refused:
                    self._find(f"{when}, torn: {name} is good until {content.good_bytes} of {len(data)} bytes")
                self._done["conflict files"] += ".conflict-" in name
        missing = now.committed.keys() - there
        saved = lines_saved(self._mounts)
        self._done["edits saved aside"] += len(missing & saved)
        for line in sorted(missing - saved):
            self._find(f"{when}, lost edit: {line} {now.committed[line]}")

    def _check_undeletable(self, when: str, now: Round, store: Seen) -> None:
        """What was not removed is there, and nothing under a name that it never had."""
        there: dict[str, set[str]] = {}
        for name, found in store.files.items():
            if is_within(name, now.undeletable):
                there.setdefault(found, set()).add(name.rpartition("/")[2])
        for content, (names, is_removed) in now.contents.items():
            known = there.get(content, set()) & set(names)
            now.files |= {f"{now.undeletable}/{name}": content for name in known}
            if not known and not is_removed:
                self._find(f"{when}, lost where deletions are refused: {names}")

    def _check_parts(self, when: str) -> None:
        end = time.monotonic() + ABORTED_SECONDS
        while left := list(self._data.glob(".minio.sys/multipart/*/*/xl.meta")):
            if time.monotonic() > end:
                self._find(f"{when}, uploads in parts are left: {len(left)}")
                return
            time.sleep(0.5)


def first_name(path: str) -> str:
    """Of a folder of the crowd, before it was moved."""
    return path.partition("/")[0].partition("-")[0].partition(".")[0]


def is_within(name: str, folder: str) -> bool:
    return bool(folder) and name.startswith(f"{folder}/")


def parents(names: Iterable[str]) -> set[str]:
    found = set()
    for name in names:
        while name := name.rpartition("/")[0]:
            found.add(name)
    return found


def look(path: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", LOOK, str(path)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def seen_by(process: subprocess.Popen[str]) -> Seen:
    out, errors = process.communicate(timeout=LOOK_SECONDS)
    assert process.returncode == 0, errors
    found: Any = json.loads(out)
    return Seen(found[0], set(found[1]))


def lines_saved(mounts: Sequence[TestMount]) -> set[str]:
    """Lines of edits that could not be merged, and were put aside and reported."""
    paths = [path for mount in mounts for path in mount.state.glob("*/saved/*.data")]
    return {name for path in paths for name in names_within(path.read_bytes())}

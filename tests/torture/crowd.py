"""One process of the torture run: works in a big folder in which others work at the same time.

Run as `python -m tests.torture.crowd FOLDER SEED STOP_FILE OWNER FILES OWNERS`; ends when STOP_FILE exists, with its
model as JSON on standard output. The folder has FILES files at the start, mixed among OWNERS. This process alone
changes the names that end with OWNER, so each listing has to show exactly those, and each read their last bytes,
whatever others do in between. Folders of its own (`t17-m0`) may get guests: files that the S3 client puts there.
Files that are SHARED are written and removed by all: of those only whole versions are asked for.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime

from phfs_fuse.types import MIB
from tests.torture.content import GUEST, NAME, SHARED, digest, first_files, owner_of, writer_of, written
from tests.torture.writer import AWAY_SECONDS, PASSING, again, entries, get, moved

BURST_MAX = 150
TREE_FILES_MAX = 700
TREES_MAX = 4
FILES_MAX = 3000
BYTES_MAX = 4000
BIG_BYTES = 17 * MIB
COMMAND_SECONDS = 100
DEPTH = ("-maxdepth", "1")
FOREIGN = (errno.ENOENT, errno.ESTALE, errno.EEXIST)  # somebody else was quicker


class Crowd:
    def __init__(self, root: str, seed: int, owner: str, files: dict[str, bytes]) -> None:
        self.root = root
        self.random = random.Random(seed)
        self.owner = owner
        self.count = len(files)
        self.files = {name: data for name, data in files.items() if owner_of(name) == owner}
        self.trees: list[str] = []
        self.folders: set[str] = set()
        self.left: set[str] = set()  # former names of folders, where guests may still come
        self.removals: dict[str, float] = {}  # first name of a folder of ours -> when it was gone
        self.shared = {name: [digest(data)] for name, data in files.items() if owner_of(name) == SHARED}
        self.done = 0

    # ---- what it works on

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def data(self, owner: str) -> bytes:
        self.count += 1
        return written(owner, self.count, int(BYTES_MAX ** self.random.random()))

    def flat(self) -> list[str]:
        return sorted(name for name in self.files if "/" not in name)

    def burst(self, names: list[str]) -> list[str]:
        """Some of them: in a row, or from all over."""
        count = min(len(names), int(BURST_MAX ** self.random.random()))
        if self.random.random() < 0.5:
            return self.random.sample(names, count)
        at = self.random.randrange(len(names) - count + 1)
        return names[at : at + count]

    def new_name(self) -> str:
        self.count += 1
        return f"{self.random.randrange(7000):05}.{self.count}-{self.owner}"

    # ---- single files

    def put(self, name: str, flags: int, data: bytes) -> None:
        fd = again(os.open, self.path(name), os.O_WRONLY | flags, 0o644)
        try:
            os.write(fd, data)
            if self.random.random() < 0.01:
                os.fsync(fd)
        finally:
            os.close(fd)

    def rewrite(self) -> None:
        for name in self.burst(self.flat()):
            self.replace(name)

    def replace(self, name: str) -> None:
        data, beside = self.data(self.owner), f".beside.{self.count}-{self.owner}"
        self.put(beside, os.O_CREAT | os.O_EXCL, data)
        again(os.rename, self.path(beside), self.path(name))
        self.files[name] = data

    def overwrite(self) -> None:
        for name in self.burst(self.flat()):
            data = self.data(self.owner)
            self.put(name, os.O_TRUNC, data)
            self.files[name] = data

    def create(self) -> None:
        if len(self.files) < FILES_MAX:
            for _ in range(int(BURST_MAX ** self.random.random())):
                name, data = self.new_name(), self.data(self.owner)
                self.put(name, os.O_CREAT | os.O_EXCL, data)
                self.files[name] = data

    def create_big(self) -> None:
        """A file that is stored in parts."""
        self.count += 1
        name, data = f"big{self.count}-{self.owner}", written(self.owner, self.count, BIG_BYTES)
        self.put(name, os.O_CREAT | os.O_EXCL, data)
        self.files[name] = data

    def unlink(self) -> None:
        names = self.flat()
        if len(names) < 100:
            return
        for name in self.burst(names):
            again(os.unlink, self.path(name))
            del self.files[name]
            assert not again(os.path.lexists, self.path(name)), f"{name} is there after it was removed"

    def rename(self) -> None:
        for name in self.burst(self.flat()):
            new = self.new_name()
            again(os.rename, self.path(name), self.path(new))
            self.files[new] = self.files.pop(name)

    def read(self) -> None:
        self.check(set(self.burst(sorted(self.files))))

    def read_others(self) -> None:
        names = [entry.name for entry in again(entries, self.root) if entry.is_file()]
        for name in self.burst(names):
            with suppress(FileNotFoundError):
                found = self.unless_foreign(get, self.path(name))
                owner = writer_of(found) if found else None
                by_any = owner_of(name) == SHARED or ".conflict-" in name
                assert not found or (owner and (by_any or owner == owner_of(name))), f"{name}: {found[:24]!r}"

    def unless_foreign(self, call: Callable[[str], bytes], path: str) -> bytes:
        """Raises: FileNotFoundError where somebody else was quicker."""
        try:
            return again(call, path)
        except OSError as exc:
            if exc.errno in FOREIGN:
                raise FileNotFoundError from exc
            raise

    def change_shared(self) -> None:
        for name in self.burst(sorted(self.shared)):
            data = self.data(self.owner)
            self.shared[name].append(digest(data))
            try:
                if self.random.random() < 0.2:
                    again(os.unlink, self.path(name))
                elif self.random.random() < 0.5:
                    self.put(name, os.O_CREAT | os.O_TRUNC, data)
                else:
                    beside = f".beside.{self.count}-{self.owner}"
                    self.put(beside, os.O_CREAT | os.O_EXCL, data)
                    again(os.rename, self.path(beside), self.path(name))
            except OSError as exc:
                if exc.errno not in FOREIGN:
                    raise
                with suppress(FileNotFoundError):
                    again(os.unlink, self.path(f".beside.{self.count}-{self.owner}"))

    def sync(self) -> None:
        """Wait until all changes in the folder are stored."""
        fd = os.open(self.root, os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    # ---- listings

    def list_all(self) -> None:
        self.check_listing([entry.name for entry in again(entries, self.root)])

    def list_by_command(self) -> None:
        out = self.command(
            self.random.choice([["ls", "-A"], ["ls", "-lAU"], ["find", ".", "-mindepth", "1", *DEPTH]])
        )
        self.check_listing([line.split()[-1].removeprefix("./") for line in out.splitlines() if "total" not in line])

    def list_while_changing(self) -> None:
        """What changes in the middle of a listing, and is stored before its end, stays as it was made."""
        before = {name: self.files[name] for name in self.flat()}
        with again(os.scandir, self.root) as stream:
            names, until = [], self.random.randrange(len(before) + 1)
            while True:
                try:
                    entry = next(stream, None)
                except OSError as exc:  # it goes on where it was in a new listing at the earliest
                    if exc.errno not in PASSING:
                        raise
                    again(entries, self.root)
                    return self.list_while_changing()
                if entry is None:
                    break
                names.append(entry.name)
                if len(names) == until:
                    for _ in range(3):
                        self.random.choice([self.rewrite, self.overwrite, self.unlink, self.rename, self.create])()
                    if self.random.random() < 0.7:
                        again(self.sync)
        after = {name: self.files[name] for name in self.flat()}
        mine = [name for name in names if owner_of(name) == self.owner and name[0] not in ".t"]
        assert len(mine) == len(set(mine)), f"twice in a listing: {twice(mine)}"
        missing = before.keys() & after.keys() - set(mine)
        assert not missing, f"not in a listing: {sorted(missing)[:9]}"
        strange = set(mine) - before.keys() - after.keys()
        assert not strange, f"in a listing: {sorted(strange)[:9]}"
        self.check({name for name in before.keys() | after.keys() if before.get(name) != after.get(name)})

    def rewrite_all(self) -> None:
        """As a sync or a build does, and then its listings, while the uploads end."""
        names = self.flat()
        for name in names:
            self.replace(name)
        self.list_all()
        self.check(set(self.burst(names)))
        self.list_all()

    def check(self, names: set[str]) -> None:
        for name in sorted(names):
            if name in self.files:
                found = again(get, self.path(name))
                assert found == self.files[name], f"{name}: {found[:24]!r} for {self.files[name][:24]!r}"
            else:
                assert not again(os.path.lexists, self.path(name)), f"{name} is there after it was removed"

    def check_listing(self, names: list[str]) -> None:
        assert len(names) == len(set(names)), f"twice in a listing: {twice(names)}"
        strange = [name for name in names if not NAME.fullmatch(name.partition(".conflict-")[0])]
        assert not strange, f"in a listing: {strange[:9]}"
        mine = {name for name in names if owner_of(name) == self.owner} - self.left
        wanted = {*self.flat(), *self.trees}
        assert mine == wanted, f"listing: {sorted(mine ^ wanted)[:9]} of {len(mine ^ wanted)}"

    # ---- folders

    def command(self, command: list[str], fine: tuple[int, ...] = (0,)) -> str:
        """Its output, once the store is back."""
        end = time.monotonic() + AWAY_SECONDS
        while True:
            done = subprocess.run(command, cwd=self.root, capture_output=True, text=True, timeout=COMMAND_SECONDS)
            if done.returncode in fine:
                return done.stdout
            assert time.monotonic() < end, f"{command}: {done.stderr[:500]}"
            assert "No space" not in done.stderr, f"{command}: {done.stderr[:500]}"
            time.sleep(0.3)

    def tree_files(self, tree: str) -> dict[str, bytes]:
        return {name: data for name, data in self.files.items() if name.startswith(f"{tree}/")}

    def new_tree(self) -> str:
        self.count += 1
        return f"t{self.count}-{self.owner}"

    def make_tree(self) -> None:
        if len(self.trees) >= TREES_MAX:
            return
        tree = self.new_tree()
        again(os.mkdir, self.path(tree))
        self.trees.append(tree)
        for folder in (f"{tree}/a", f"{tree}/b"):
            again(os.mkdir, self.path(folder))
            self.folders.add(folder)
        for number in range(int(TREE_FILES_MAX ** self.random.uniform(0.3, 1))):
            name, data = (
                f"{tree}/{self.random.choice(['', 'a/', 'b/'])}{number:05}-{self.owner}",
                self.data(self.owner),
            )
            self.put(name, os.O_CREAT | os.O_EXCL, data)
            self.files[name] = data

    def move_tree(self) -> None:
        if self.trees:
            tree = self.random.choice(self.trees)
            self.count += 1
            new = f"{tree.partition('.')[0].partition('-')[0]}.{self.count}-{self.owner}"
            again(os.rename, self.path(tree), self.path(new))
            self.left.add(tree)
            self.files = {moved(name, tree, new): data for name, data in self.files.items()}
            self.folders = {moved(name, tree, new) for name in self.folders}
            self.trees = [new if name == tree else name for name in self.trees]

    def copy_tree(self) -> None:
        if not self.trees or len(self.trees) >= TREES_MAX:
            return
        tree, new = self.random.choice(self.trees), self.new_tree()
        if self.random.random() < 0.5:
            self.command(["cp", "-rT", tree, new])
        else:
            self.command(["rsync", "-rt", "--exclude", f"{GUEST}*", f"{tree}/", f"{new}/"])
        self.trees.append(new)
        self.files |= {moved(name, tree, new): data for name, data in self.tree_files(tree).items()}
        self.folders |= {moved(name, tree, new) for name in self.folders if name.startswith(f"{tree}/")}

    def remove_tree(self) -> None:
        if self.trees:
            tree = self.trees.pop(self.random.randrange(len(self.trees)))
            self.command(["rm", "-rf", tree]) if self.random.random() < 0.5 else self.remove_as_python(
                self.path(tree)
            )
            self.left.add(tree)
            self.removals[tree.partition(".")[0].partition("-")[0]] = time.time()
            self.files = {name: data for name, data in self.files.items() if not name.startswith(f"{tree}/")}
            self.folders = {name for name in self.folders if not name.startswith(f"{tree}/")}

    def remove_as_python(self, path: str) -> None:
        end = time.monotonic() + AWAY_SECONDS
        while True:
            try:
                return shutil.rmtree(path)
            except OSError as exc:
                if exc.errno == errno.ENOENT and exc.filename == path:
                    return
                if exc.errno not in (errno.ENOTEMPTY, errno.EIO, *FOREIGN) or time.monotonic() > end:
                    raise
                time.sleep(0.3)

    def list_tree(self) -> None:
        if self.trees:
            tree = self.random.choice(self.trees)
            out = self.command(["find", tree, "-type", "f"])
            names = [name for name in out.splitlines() if GUEST not in name]
            assert len(names) == len(set(names)), f"twice: {twice(names)}"
            wanted = set(self.tree_files(tree))
            assert set(names) == wanted, f"listing of {tree}: {sorted(set(names) ^ wanted)[:9]}"

    def run(self, stop: str) -> None:
        files = [self.rewrite, self.overwrite, self.create, self.unlink, self.rename, self.read, self.read_others]
        changing = [self.rewrite_all, *[self.list_while_changing] * 3]
        listings = [self.list_all, self.list_by_command, *changing, self.list_tree]
        trees = [self.make_tree, self.move_tree, self.copy_tree, self.remove_tree]
        operations = [*files, *files, *listings, *trees, self.change_shared]
        if self.random.random() < 0.5:
            operations.append(self.create_big)
        self.list_while_changing()  # while nothing is known of the folder
        self.make_tree()
        while not os.path.exists(stop):
            operation = self.random.choice(operations)
            try:
                operation()
            except Exception as exc:
                exc.add_note(f"{operation.__name__} number {self.done} at {datetime.now(UTC).isoformat()}")
                raise
            self.done += 1
            time.sleep(self.random.random() * 0.1)


def twice(names: list[str]) -> list[str]:
    return sorted({name for name in names if names.count(name) > 1})[:9]


def main() -> None:
    root, seed, stop, owner, count, *owners = sys.argv[1:]
    crowd = Crowd(root, int(seed), owner, first_files(owners, int(count)))
    crowd.run(stop)
    json.dump(
        {
            "operations": crowd.done,
            "files": {name: digest(data) for name, data in crowd.files.items()},
            "folders": sorted(crowd.folders | set(crowd.trees)),
            "removals": crowd.removals,
            "shared": crowd.shared,
        },
        sys.stdout,
    )


if __name__ == "__main__":
    main()

"""One process of the torture run: removes and renames files whose deletion the store may refuse.

Run as `python -m tests.torture.remover FOLDER SEED STOP_FILE OWNER`; ends when STOP_FILE exists, with what it did as
JSON on standard output: for each content the names that it had, and whether it was removed. A refused deletion
brings the name back: a removed file may be there or not, one that was not removed has to be there under one of
its names.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from contextlib import suppress

from tests.torture.content import digest, written
from tests.torture.writer import again

BYTES_MAX = 20_000


class Remover:
    def __init__(self, root: str, seed: int, owner: str) -> None:
        self.root = root
        self.random = random.Random(seed)
        self.owner = owner
        self.count = 0
        self.names: dict[str, list[str]] = {}  # by content, the last is where it is
        self.removed: set[str] = set()

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def any_content(self) -> str | None:
        left = sorted(self.names.keys() - self.removed)
        return self.random.choice(left) if left else None

    def new_name(self) -> str:
        self.count += 1
        return f"{self.count:05}-{self.owner}"

    def create(self) -> None:
        name = self.new_name()
        data = written(self.owner, self.count, int(BYTES_MAX ** self.random.random()))
        with again(open, self.path(name), "xb") as file:
            file.write(data)
        self.names[digest(data)] = [name]

    def rename(self) -> None:
        if content := self.any_content():
            name = self.new_name()
            self.names[content].append(name)
            with suppress(FileNotFoundError):  # an earlier rename was undone
                again(os.rename, self.path(self.names[content][-2]), self.path(name))

    def unlink(self) -> None:
        if content := self.any_content():
            self.removed.add(content)
            with suppress(FileNotFoundError):
                again(os.unlink, self.path(self.names[content][-1]))

    def run(self, stop: str) -> None:
        with suppress(FileExistsError):
            again(os.mkdir, self.root)
        operations = [*[self.create] * 3, self.rename, self.unlink]
        while not os.path.exists(stop):
            self.random.choice(operations)()
            time.sleep(self.random.random() * 0.3)


def main() -> None:
    root, seed, stop, owner = sys.argv[1:]
    remover = Remover(root, int(seed), owner)
    remover.run(stop)
    contents = {content: [names, content in remover.removed] for content, names in remover.names.items()}
    json.dump({"operations": remover.count, "contents": contents}, sys.stdout)


if __name__ == "__main__":
    main()

"""One process of the torture run: a plain S3 client that works in the big folder of programs on mounts.

Run as `python -m tests.torture.outsider BUCKET FOLDER_KEY SEED STOP_FILE FILES OWNERS` with ENDPOINT_URL and the
credentials in the environment; ends when STOP_FILE exists, with its model as JSON on standard output. This client
alone changes its own names; each guest that it puts into a folder of a program has a name that was never used.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import boto3
from botocore.config import Config

from tests.torture.content import CLIENT, GUEST, SHARED, digest, first_files, owner_of, written

BURST_MAX = 300
BYTES_MAX = 4000
THREADS = 4
KEYS_MAX = 1000  # of one DeleteObjects


class Outsider:
    def __init__(self, s3: Any, bucket: str, folder: str, seed: int, files: dict[str, bytes]) -> None:
        self.s3 = s3
        self.bucket = bucket
        self.folder = folder
        self.random = random.Random(seed)
        self.count = len(files)
        self.files = {name: digest(data) for name, data in files.items() if owner_of(name) == CLIENT}
        self.shared = {name: [digest(data)] for name, data in files.items() if owner_of(name) == SHARED}
        self.guests: dict[str, tuple[str, float]] = {}  # path below the folder -> hash, and when it was begun
        self.done = 0
        self.threads = ThreadPoolExecutor(THREADS)

    def put_all(self, files: dict[str, bytes]) -> None:
        list(self.threads.map(self.put, *zip(*files.items(), strict=True)))

    def put(self, name: str, data: bytes) -> str:
        self.s3.put_object(Bucket=self.bucket, Key=self.folder + name, Body=data)
        return digest(data)

    def delete(self, names: list[str]) -> None:
        for at in range(0, len(names), KEYS_MAX):
            keys = [{"Key": self.folder + name} for name in names[at : at + KEYS_MAX]]
            self.s3.delete_objects(Bucket=self.bucket, Delete={"Objects": keys, "Quiet": True})

    def data(self) -> bytes:
        self.count += 1
        return written(CLIENT, self.count, int(BYTES_MAX ** self.random.random()))

    def burst(self, names: list[str]) -> list[str]:
        count = min(len(names), int(BURST_MAX ** self.random.random()))
        at = self.random.randrange(len(names) - count + 1)
        return names[at : at + count] if self.random.random() < 0.5 else self.random.sample(names, count)

    def new_name(self) -> str:
        self.count += 1
        return f"{self.random.randrange(7000):05}.{self.count}-{CLIENT}"

    # ---- operations

    def rewrite(self) -> None:
        for name in self.burst(sorted(self.files)):
            self.files[name] = self.put(name, self.data())

    def create(self) -> None:
        for _ in range(int(BURST_MAX ** self.random.random()) // 3):
            name = self.new_name()
            self.files[name] = self.put(name, self.data())

    def remove(self) -> None:
        names = self.burst(sorted(self.files))
        if len(self.files) > 100:
            self.delete(names)
            for name in names:
                del self.files[name]

    def move(self) -> None:
        for name in self.burst(sorted(self.files))[:50]:
            new = self.new_name()
            source = {"Bucket": self.bucket, "Key": self.folder + name}
            self.s3.copy_object(Bucket=self.bucket, Key=self.folder + new, CopySource=source)
            self.s3.delete_object(Bucket=self.bucket, Key=self.folder + name)
            self.files[new] = self.files.pop(name)

    def change_shared(self) -> None:
        for name in self.burst(sorted(self.shared))[:30]:
            if self.random.random() < 0.3:
                self.delete([name])
            else:
                self.shared[name].append(self.put(name, self.data()))

    def visit(self) -> None:
        """Put guests into the folders of others, whether these are being moved or removed just now or not."""
        answer = self.s3.list_objects_v2(Bucket=self.bucket, Prefix=self.folder + "t", Delimiter="/")
        folders = [row["Prefix"].removeprefix(self.folder) for row in answer.get("CommonPrefixes", ())]
        if folders:
            folder = self.random.choice(folders)
            time.sleep(self.random.random() * 0.3)
            for _ in range(self.random.randrange(1, 4)):
                self.count += 1
                name = f"{folder}{self.random.choice(['', 'a/'])}{GUEST}{self.count}-{CLIENT}"
                begun = time.time()
                self.guests[name] = (self.put(name, self.data()), begun)

    def run(self, stop: str) -> None:
        operations = [self.rewrite, self.create, self.remove, self.move, self.change_shared, *[self.visit] * 3]
        while not os.path.exists(stop):
            self.random.choice(operations)()
            self.done += 1
            time.sleep(self.random.random() * 0.5)


def main() -> None:
    bucket, folder, seed, stop, count, *owners = sys.argv[1:]
    config = Config(s3={"addressing_style": "path"}, max_pool_connections=THREADS)
    s3 = boto3.client("s3", config=config, endpoint_url=os.environ["ENDPOINT_URL"])
    client = Outsider(s3, bucket, folder, int(seed), first_files(owners, int(count)))
    client.run(stop)
    json.dump(
        {"operations": client.done, "files": client.files, "guests": client.guests, "shared": client.shared},
        sys.stdout,
    )


if __name__ == "__main__":
    main()

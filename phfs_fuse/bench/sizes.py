"""How much of everything the workloads do. Owns the table of sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from phfs_fuse.bench.loads import MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Of everything that the workloads do."""

    big: int  # bytes
    middle: int
    quarter: int  # of four at once
    small_writes: int
    files: int
    listed: int
    folders: int
    randoms: int
    git: int
    modules: int

    def in_words(self) -> dict[str, str]:
        amounts = {name: getattr(self, name) for name in self.__slots__}
        return {
            name: f"{value // MIB} MiB" if value >= MIB else f"{value:,}".replace(",", " ")
            for name, value in amounts.items()
        }


SIZES: Final[Mapping[str, Sizes]] = {
    "full": Sizes(
        big=512 * MIB,
        middle=128 * MIB,
        quarter=256 * MIB,
        small_writes=128 * MIB,
        files=1000,
        listed=10_000,
        folders=50,
        randoms=200,
        git=400,
        modules=500,
    ),
    "small": Sizes(
        big=32 * MIB,
        middle=16 * MIB,
        quarter=16 * MIB,
        small_writes=4 * MIB,
        files=50,
        listed=200,
        folders=5,
        randoms=25,
        git=20,
        modules=20,
    ),
}

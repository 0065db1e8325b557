"""Block sizes of a kernel with a matrix product, and tables of them: by kernel, arithmetic and size of the problem."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """One configuration of a kernel with a matrix product: output tile m x n, step k, warps and pipeline stages."""

    m: int
    n: int
    k: int
    warps: int
    stages: int

    @classmethod
    def parse(cls, text: str) -> Tile:
        """From "m x n x k / warps / stages", without the spaces.

        Raises:
            ValueError: it is not of that form.
        """
        if not re.fullmatch(r"\d+x\d+x\d+/\d+/\d+", text):
            raise ValueError(f"a tile is written m x n x k/warps/stages without spaces, got {text!r}")
        return cls(*(int(number) for number in re.split("[x/]", text)))

    def __str__(self) -> str:
        return f"{self.m}x{self.n}x{self.k}/{self.warps}/{self.stages}"

    @property
    def meta(self) -> dict[str, int]:
        """The keyword arguments of a launch."""
        return {
            **{"BLOCK_M": self.m, "BLOCK_N": self.n, "BLOCK_K": self.k},
            **{"num_warps": self.warps, "num_stages": self.stages},
        }


Table = dict[tuple[str, str], tuple[Tile, ...]]


def table(text: str) -> Table:
    """Lines of a kernel, an arithmetic, and tiles, narrow ones first."""
    found: Table = {}
    for line in text.strip().splitlines():
        kernel, kind, *tiles = line.split()
        found[kernel, kind] = (*found.get((kernel, kind), ()), *map(Tile.parse, tiles))
    return found

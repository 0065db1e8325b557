"""What tuning measures: expert FFNs that together take every class of the tables, the most usual first."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from sparse_ffn.backends.triton import columns
from sparse_ffn.backends.triton.config import DEEP, MOST
from sparse_ffn.backends.triton.tile import Tile
from sparse_ffn.backends.triton.tuned import ROWS, WIDTHS, Key, size_class

Entry = tuple[str, str, Tile]  # kernel, arithmetic, tile

KERNELS = ("one", "two", "outer")
KINDS = {"bf16": "half", "fp16": "half", "tf32": "tf32", "fp32": "fp32"}
DTYPES = {"half": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32}


@dataclass(frozen=True)
class Problem:
    """A training step of an expert FFN.

    Attributes:
        kind: its arithmetic: "half", "tf32" or "fp32".
        rows: mean rows of an expert.
        E: experts.
        K: experts of a token.
        G: units of an expert.
        D: d_model, and the output's width.
        glu: whether it is a GLU.
    """

    kind: str
    rows: int
    E: int
    K: int
    G: int
    D: int
    glu: bool

    @property
    def T(self) -> int:
        """Tokens."""
        return max(self.rows * self.E // self.K, 1)

    def coordinates(self, m: int, cache: int) -> dict[Key, bool]:
        """What a step looks up at tiles of m rows, on a card whose second-level cache holds so many bytes.

        For the units, for the blocks of the output and of the input's gradient, for the matrices' gradients; and
        whether one of the products of a class may take the tiles of more than ``MOST`` numbers.
        """
        units, width, rows = (size_class(n, WIDTHS) for n in (self.G, self.D, self.rows))
        found = {("two" if self.glu else "one", self.kind, m, units, width): False}
        for depth in (self.G, 2 * self.G if self.glu else self.G):
            block = columns.fitting(cache, DTYPES[self.kind].itemsize, self.T * self.K, self.D, depth, columns.STEP)
            found["one", self.kind, m, size_class(block, WIDTHS), units] = self.G >= DEEP
        found.setdefault(("two", self.kind, m, units, width), False)
        found["outer", self.kind, units, width, rows] = True
        return found

    def __str__(self) -> str:
        form = "GLU" if self.glu else "ReLU-like"
        return f"{self.kind} {form}: {self.T} tokens of {self.D}, {self.K} of {self.E} experts of {self.G} units"


def problems(kinds: Iterable[str]) -> Iterator[Problem]:
    """Every class of rows and widths, in each arithmetic."""
    for kind in dict.fromkeys(kinds):
        for rows, E in ((2048, 64), (64, 256), (32, 256), (16, 256)):
            for G in (128, 256, 64, 1024) if rows == 2048 else (128, 256, 64):
                yield Problem(kind, rows, E, 8, G, 1024, glu=False)
                yield Problem(kind, rows, E, 8, G, 1024, glu=True)


def heights(entries: Iterable[Entry], problem: Problem) -> list[int]:
    """Rows of a tile to try: the fewest that hold an expert's rows, as in the tables, then the next fewer.

    Both kernels of an arithmetic must have them.
    """
    entries = list(entries)
    both = [{t.m for kernel, kind, t in entries if (kernel, kind) == (k, problem.kind)} for k in ("one", "two")]
    known = sorted(both[0] & both[1])
    usual = next((m for m in known if problem.rows <= m), known[-1])
    return [m for m in reversed(known) if m <= usual][:2]


def choices(entries: Iterable[Entry], coordinate: Key, large: bool) -> list[Tile]:
    """The tiles that a class may take: none wider than the class, where a narrower one is there.

    ``large``: also those of more than ``MOST`` numbers. A step would launch another in their place.
    """
    kernel, kind, rows, n_columns, _ = coordinate
    found = [t for k, c, t in entries if (k, c) == (kernel, kind)]
    if kernel == "outer":
        tall = max(rows, min(t.m for t in found))
        found = [t for t in found if t.m <= tall]
    else:
        found = [t for t in found if t.m == rows and (large or t.m * t.n <= MOST)]
    wide = max(n_columns, min((t.n for t in found), default=0))
    return list(dict.fromkeys(t for t in found if t.n <= wide))


def rows_class(problem: Problem) -> tuple[str, int]:
    """The key of Tuned.heights."""
    return problem.kind, size_class(problem.rows, ROWS)

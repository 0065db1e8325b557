"""Differences between layers, paired by seed, with a standard error that all layers of a size give together."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

ERRORS = 2
"""A difference within so many standard errors is called none."""
LEAST_FREEDOM = 4
"""Of fewer degrees of freedom an error is not told: with one, two of them miss the mean 3 times in 10."""

Bits = Mapping[str, Mapping[int, float]]
"""Per byte, by layer and seed."""


class Ranks(NamedTuple):
    """Those that a layer may have."""

    first: int
    last: int

    def __str__(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first} to {self.last}"

    def apart(self, other: Ranks) -> bool:
        """Whether no rank is in both."""
        return self.last < other.first or other.last < self.first


class Noise(NamedTuple):
    """What chance adds to one run: its standard deviation, and from how many degrees of freedom that is known."""

    deviation: float
    freedom: int


@dataclass(frozen=True)
class Difference:
    """The mean over seeds, its standard error (None of a single seed or of few runs), and how many seeds there are."""

    mean: float
    error: float | None
    n: int

    def __str__(self) -> str:
        return f"{self.mean:+.4f}" if self.error is None else f"{self.mean:+.4f} ± {self.error:.4f}"

    @property
    def interval(self) -> tuple[float, float]:
        """The differences that are called none from it."""
        width = ERRORS * (self.error or 0.0)
        return self.mean - width, self.mean + width

    @property
    def verdict(self) -> str:
        """In one word, or that it takes another seed or other runs."""
        if self.error is None:
            return "one seed" if self.n == 1 else "too few runs"
        low, high = self.interval
        return "lower" if high < 0 else "higher" if low > 0 else "none"


def noise(bits: Bits, least: int = LEAST_FREEDOM) -> Noise | None:
    """What the layers' and the seeds' shares leave of the bits of all runs, by least squares.

    None if the degrees of freedom are fewer than the least. A layer's own two or three differences would tell its
    error to a factor of two at best.
    """
    layers, seeds = list(bits), sorted({seed for of in bits.values() for seed in of})
    runs = [(layer, seed) for layer in layers for seed in bits[layer]]
    shares = torch.zeros(len(runs), len(layers) + len(seeds), dtype=torch.float64)
    for i, (layer, seed) in enumerate(runs):
        shares[i, layers.index(layer)] = shares[i, len(layers) + seeds.index(seed)] = 1
    freedom = len(runs) - int(torch.linalg.matrix_rank(shares)) if runs else 0
    if freedom < least:
        return None
    values = torch.tensor([bits[layer][seed] for layer, seed in runs], dtype=torch.float64)
    left = values - shares @ (torch.linalg.pinv(shares) @ values)
    return Noise(math.sqrt(left.square().sum().item() / freedom), freedom)


def once_in(freedom: int) -> int:
    """Of how many intervals of ERRORS standard errors to each side one misses the true mean, by Student's t."""
    angles = torch.linspace(0, math.pi / 2, 10_001, dtype=torch.float64)
    density = angles.cos() ** (freedom - 1)  # of t = sqrt(freedom) * tan(angle)
    outside = angles > math.atan(ERRORS / math.sqrt(freedom))
    return round((density.sum() / density[outside].sum()).item())


def paired(bits: Mapping[int, float], base: Mapping[int, float], noise: Noise | None) -> Difference | None:
    """Of the seeds that both have: what the same weights and the same text in the same order come to."""
    differences = [bits[seed] - base[seed] for seed in sorted(bits.keys() & base.keys())]
    if not differences:
        return None
    n = len(differences)
    error = noise.deviation * math.sqrt(2 / n) if noise and n > 1 else None
    return Difference(statistics.mean(differences), error, n)


def ranks(bits: Bits, noise: Noise | None) -> dict[str, Ranks]:
    """Of each layer, 1 the lowest: layers whose difference is not known to be one share theirs."""

    def lower(a: str, b: str) -> bool:
        found = paired(bits[a], bits[b], noise)
        return found is not None and found.verdict == "lower"

    return ranks_by(bits, lower)


def ranks_by(names: Collection[str], lower: Callable[[str, str], bool]) -> dict[str, Ranks]:
    """By what is known of each two."""
    n = len(names)
    return {
        name: Ranks(1 + sum(lower(other, name) for other in names), n - sum(lower(name, other) for other in names))
        for name in names
    }

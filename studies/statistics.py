"""Differences between layers, paired by seed, with their standard error."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

ERRORS = 2
"""A difference within so many standard errors is called none."""


@dataclass(frozen=True)
class Difference:
    """The mean over seeds, its standard error (None of a single seed), and how many seeds there are."""

    mean: float
    error: float | None
    n: int

    def __str__(self) -> str:
        return f"{self.mean:+.4f}" if self.error is None else f"{self.mean:+.4f} ± {self.error:.4f}"

    @property
    def verdict(self) -> str:
        """In one word, or that it takes another seed."""
        if self.error is None:
            return "one seed"
        if abs(self.mean) <= ERRORS * self.error:
            return "none"
        return "lower" if self.mean < 0 else "higher"


def paired(bits: Mapping[int, float], base: Mapping[int, float]) -> Difference | None:
    """Of the seeds that both have: what the same weights and the same text in the same order come to."""
    differences = [bits[seed] - base[seed] for seed in sorted(bits.keys() & base.keys())]
    if not differences:
        return None
    n = len(differences)
    error = statistics.stdev(differences) / math.sqrt(n) if n > 1 else None
    return Difference(statistics.mean(differences), error, n)

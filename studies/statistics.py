"""Differences between layers, paired by seed, with their standard error."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

ERRORS = 2
"""A difference within so many standard errors is called none."""


class Ranks(NamedTuple):
    """Those that a layer may have."""

    first: int
    last: int

    def __str__(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first} to {self.last}"

    def apart(self, other: Ranks) -> bool:
        """Whether no rank is in both."""
        return self.last < other.first or other.last < self.first


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


def ranks(bits: Mapping[str, Mapping[int, float]]) -> dict[str, Ranks]:
    """Of each layer, 1 the lowest: layers whose difference is not known to be one share theirs."""

    def lower(a: str, b: str) -> bool:
        found = paired(bits[a], bits[b])
        return found is not None and found.verdict == "lower"

    return _ranks(bits, lower)


def ranks_of_numbers(values: Mapping[str, float]) -> dict[str, Ranks]:
    """The same where all that is known of each is one number."""
    return _ranks(values, lambda a, b: values[a] < values[b])


def _ranks(names: Collection[str], lower: Callable[[str, str], bool]) -> dict[str, Ranks]:
    n = len(names)
    return {
        name: Ranks(1 + sum(lower(other, name) for other in names), n - sum(lower(name, other) for other in names))
        for name in names
    }


def paired(bits: Mapping[int, float], base: Mapping[int, float]) -> Difference | None:
    """Of the seeds that both have: what the same weights and the same text in the same order come to."""
    differences = [bits[seed] - base[seed] for seed in sorted(bits.keys() & base.keys())]
    if not differences:
        return None
    n = len(differences)
    error = statistics.stdev(differences) / math.sqrt(n) if n > 1 else None
    return Difference(statistics.mean(differences), error, n)

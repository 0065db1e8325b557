"""Which runs there are, in which order, which are left, and the learning rate that they share."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from examples.language_model.configs import Config

from . import results
from .sizes import SIZES
from .variants import DENSE, SIGMA, VARIANTS

LEARNING_RATES = (1e-3, 2e-3, 4e-3)
TUNED_AT = "S"


@dataclass(frozen=True)
class Run:
    """One training: a size, a layer, a seed. A trial of a learning rate belongs to no size's results."""

    size: str
    variant: str
    seed: int
    trial: float | None = None

    @property
    def name(self) -> str:
        """Its path below the results' folder, without the ending."""
        if self.trial is not None:
            return f"learning-rate/{self.variant}-{self.trial:g}"
        return f"{self.size}/{self.variant}-{self.seed}"

    def path(self, root: Path) -> Path:
        """Where its results are once it has finished."""
        return root / f"{self.name}.json"

    def config(self, learning_rate: float | None) -> Config:
        """With its own learning rate or the chosen one, in wider models as much less as they are wider.

        Steps of Adam add up over a unit's inputs (arXiv 2203.03466).
        """
        size = SIZES[self.size]
        rate = self.trial
        if rate is None and learning_rate is not None:
            rate = learning_rate * SIZES[TUNED_AT].config.d_model / size.config.d_model
        return replace(size.config, learning_rate=rate) if size.tune and rate is not None else size.config


def trials(rate: float) -> list[Run]:
    """Dense and SigmaMoE with this learning rate: runs of the study, if it is chosen."""
    return [Run(TUNED_AT, variant, 0, rate) for variant in (DENSE, SIGMA)]


def learning_rate(root: Path) -> float | None:
    """That of the lowest sum of dense's and SigmaMoE's bits per validation byte, None before all trials are made."""
    sums = {}
    for rate in LEARNING_RATES:
        records = results.load_all(run.path(root) for run in trials(rate))
        if len(records) < len(trials(rate)):
            return None
        sums[rate] = sum(math.inf if record["diverged"] else record["bits_per_byte"]["valid"] for record in records)
    return min(sums, key=lambda rate: sums[rate])


def adopt_trials(root: Path) -> None:
    """The trials of the chosen learning rate become runs of the study, which are never trained by themselves."""
    rate = learning_rate(root)
    for trial in trials(rate) if rate is not None else ():
        own = replace(trial, trial=None).path(root)
        if not own.exists() and (record := results.load(trial.path(root))):
            results.save(own, record)


def runs_of(size: str) -> list[Run]:
    """All runs that make a size complete."""
    return [run for run in _in_order() if run.size == size]


def queue(sizes: list[str], variants: list[str] | None = None, seeds: list[int] | None = None) -> list[Run]:
    """What is to be trained for these sizes, layers and seeds: the trials, then what says most, all seeds in turn."""
    found = [
        run
        for run in _in_order()
        if run.size in sizes and (variants is None or run.variant in variants) and (seeds is None or run.seed in seeds)
    ]
    tuned = any(SIZES[run.size].tune for run in found)
    tried = [run for rate in LEARNING_RATES for run in trials(rate)] if tuned else []
    adopted = {replace(run, trial=None) for run in tried}
    return [*tried, *(run for run in found if run not in adopted)]


def _in_order() -> Iterator[Run]:
    for name, ablations, seed in (
        ("S", False, 0),
        ("S", False, 1),
        ("S", True, 0),
        ("M", False, 0),
        ("S", False, 2),
        ("M", False, 1),
        ("S", True, 1),
        ("S", True, 2),
        ("L", False, 0),
    ):
        for variant in SIZES[name].variants:
            if VARIANTS[variant].ablation == ablations:
                yield Run(name, variant, seed)

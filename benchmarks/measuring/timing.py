"""Paired, interleaved timing: contenders take turns in rounds, and a ratio is taken inside a round.

Whatever slows the machine down for a while slows all contenders of that while, so that it leaves the ratios alone.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from sparse_ffn.tune.stopwatch import GPUStopwatch

SHORT = 2e-3
MOST_ROUNDS = 200


@dataclass(frozen=True)
class Stopwatch:
    """Takes the time of a call.

    Attributes:
        seconds_of: seconds that a call takes.
        overhead: seconds that taking it costs beside.
        short: a sample of a quicker call is the mean over several, about this many seconds in all.
    """

    seconds_of: Callable[[Callable[[], object]], float]
    overhead: float = 0.0
    short: float = SHORT


def wall_clock(clock: Callable[[], float] = time.perf_counter) -> Stopwatch:
    """By a clock of the host: for what has ended when the call returns."""

    def seconds_of(call: Callable[[], object]) -> float:
        begin = clock()
        call()
        return clock() - begin

    return Stopwatch(seconds_of)


def stopwatch(device: torch.device) -> Stopwatch:
    """By the host's clock on a CPU, by the device's own on a GPU."""
    return Stopwatch(GPUStopwatch(device), overhead=2.5e-3, short=0.0) if device.type == "cuda" else wall_clock()


class Run(NamedTuple):
    """One contender: ``call`` is timed, ``prepare`` is what comes before each call and is not."""

    prepare: Callable[[], None]
    call: Callable[[], object]


@dataclass(frozen=True)
class Quartiles:
    """Median and quartiles of the samples of some rounds."""

    low: float
    median: float
    high: float
    rounds: int

    @classmethod
    def of(cls, samples: Iterable[float]) -> Quartiles:
        """Of at least one sample."""
        ordered = sorted(samples)
        if len(ordered) == 1:
            return cls(ordered[0], ordered[0], ordered[0], 1)
        low, median, high = statistics.quantiles(ordered, n=4, method="inclusive")
        return cls(low, median, high, len(ordered))


class Samples:
    """Seconds of one call, for each contender and each round that it took part in."""

    def __init__(self, seconds: Mapping[str, Mapping[int, float]]) -> None:
        self.seconds = seconds

    def time(self, name: str) -> Quartiles:
        """Seconds of a call."""
        return Quartiles.of(self.seconds[name].values())

    def ratio(self, name: str, base: str) -> Quartiles:
        """Time of ``name`` over that of ``base``, both of one round, over the rounds in which both took part."""
        ours, theirs = self.seconds[name], self.seconds[base]
        return Quartiles.of(ours[i] / theirs[i] for i in ours.keys() & theirs.keys())


def race(
    runs: Mapping[str, Run],
    seconds: float,
    *,
    lead: Iterable[str] = (),
    first: Mapping[str, float] | None = None,
    stopwatch: Stopwatch | None = None,
) -> Samples:
    """Time the contenders in interleaved rounds.

    Args:
        runs: the contenders by name.
        seconds: about how long the whole may take. A slow contender takes part in fewer rounds; of one whose first call
            takes more than its share, that call counts, as if it were of the first round.
        lead: contenders that get half of the time for themselves and take part in every round: those whose ratio
            matters most, and whom all others are compared with.
        first: seconds that a first call took, for contenders that had one already.
        stopwatch: takes the time of a call; None: the host's clock.
    """

    def timed(run: Run) -> float:
        run.prepare()
        return watch.seconds_of(run.call)

    watch = stopwatch or wall_clock()
    leaders = set(lead) & runs.keys()
    parts = 2 if 0 < len(leaders) < len(runs) else 1
    taken: dict[str, dict[int, float]] = {name: {} for name in runs}
    repeats, rounds = {}, {}
    for name in runs:
        share = seconds / parts / (len(leaders) if name in leaders else len(runs) - len(leaders))
        # the first call allocates, packs and compiles
        calls = [first[name] if first and name in first else timed(runs[name])]
        if calls[0] > share and name not in leaders:  # too slow to be called again; others will give it a round 0
            repeats[name], rounds[name], taken[name][0] = 1, 0, calls[0]
            continue
        while len(calls) < 2 or (sum(calls) < min(0.05, seconds / 20) and len(calls) < 10):
            calls.append(timed(runs[name]))
        cost = max(min(calls), 1e-9)
        repeats[name] = max(1, min(50, math.ceil(watch.short / cost)))
        calls_a_round = repeats[name] + (repeats[name] > 1)
        rounds[name] = min(MOST_ROUNDS, max(1, int(share / ((cost + watch.overhead) * calls_a_round))))
    most = max(rounds.values(), default=0)
    rounds.update(dict.fromkeys(leaders, most))

    order = random.Random(0)
    for i in range(most):
        # spread over all rounds, the first included
        names = [name for name in runs if i * rounds[name] // most > (i - 1) * rounds[name] // most]
        for name in order.sample(names, len(names)):
            if repeats[name] > 1:
                timed(runs[name])  # bring its data back into the caches, as in a loop of its own
            taken[name][i] = statistics.fmean(timed(runs[name]) for _ in range(repeats[name]))
    return Samples(taken)

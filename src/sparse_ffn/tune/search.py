"""The decisions of tuning: what is tried, in which order, what is chosen. It measures nothing itself."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Collection, Iterable
from typing import Protocol

from sparse_ffn.backends.triton.tile import Tile
from sparse_ffn.backends.triton.tuned import Key, Tuned
from sparse_ffn.tune.problems import KERNELS, Entry, Problem, choices, heights, rows_class

GAIN = 0.02  # what a tile must save of the time to replace another: less may be noise


class Runner(Protocol):
    """Runs a problem by a table."""

    def check(self, problem: Problem, table: Tuned) -> str | None:
        """What is wrong with the results, or why it cannot run; None if it is right."""

    def seconds(self, problem: Problem, table: Tuned) -> float:
        """Of one training step."""


class OutOfTime(Exception):
    """The budget is spent."""


class Search:
    """Goes through problems and decides one class after the other; ``found`` is what was decided so far.

    Args:
        entries: kernel, arithmetic and tile of all that may be launched.
        runner: checks and times.
        cache: bytes of the card's second-level cache.
        seconds: the budget.
        kernels: which kernels to choose tiles for.
        say: takes lines about what is going on.
        clock: seconds.
        before: what an earlier search had decided, to go on with.
    """

    def __init__(
        self,
        entries: Iterable[Entry],
        runner: Runner,
        *,
        cache: int,
        seconds: float,
        kernels: Collection[str] = KERNELS,
        say: Callable[[str], None] = print,
        clock: Callable[[], float] = time.monotonic,
        before: Tuned | None = None,
    ) -> None:
        self.entries, self.runner, self.kernels, self.say, self.clock = list(entries), runner, kernels, say, clock
        self.cache, self.end = cache, clock() + seconds
        self.found = Tuned() if before is None else copy.deepcopy(before)

    def run(self, problems: Iterable[Problem], keep: Callable[[Tuned], object] = lambda found: None) -> bool:
        """Decide all classes of the problems; ``keep`` gets the result after each.

        Returns:
            Whether all are decided: the budget was enough, and something ran of each problem. Undecided classes have no
            entry: the built-in tables count there.
        """
        all_ran = True
        try:
            for problem in problems:
                if not self._decide(problem):
                    self.say(f"{problem}: no tile computes it right here (--verbose says why of each)")
                    all_ran = False
                keep(self.found)
        except OutOfTime:
            self.say("the time is up; the classes not reached keep the built-in tiles")
            keep(self.found)
            return False
        return all_ran

    def _decide(self, problem: Problem) -> bool:
        """Whether there is a tile that runs."""
        key = rows_class(problem)
        options = [self.found.heights[key]] if key in self.found.heights else heights(self.entries, problem)
        if key in self.found.heights and all(c in self.found.decided for c in self._coordinates(problem, options[0])):
            return True
        self.say(str(problem))
        best: tuple[float, int] | None = None
        for m in options:
            table = copy.deepcopy(self.found)
            table.heights[key] = m
            seconds = self._try(problem, table, f"tiles of {m} rows")
            if seconds is None:
                continue
            for coordinate, large in self._coordinates(problem, m).items():
                if coordinate not in self.found.decided:
                    seconds = self._choose(problem, table, coordinate, large, seconds)
            if best is None or seconds < best[0] * (1 - GAIN):
                best = seconds, m
        if best is None:
            return False
        self.found.heights[key] = best[1]
        return True

    def _coordinates(self, problem: Problem, m: int) -> dict[Key, bool]:
        return {c: large for c, large in problem.coordinates(m, self.cache).items() if c[0] in self.kernels}

    def _choose(self, problem: Problem, table: Tuned, coordinate: Key, large: bool, seconds: float) -> float:
        """Enter the best tile of a class into the table and into what was found; the seconds with it."""
        chosen: Tile | None = None
        try:
            for tile in choices(self.entries, coordinate, large):
                trial = copy.deepcopy(table)
                trial.tiles[coordinate] = tile
                found = self._try(problem, trial, f"{' '.join(map(str, coordinate))}: {tile}")
                if found is not None and found < seconds * (1 - GAIN):
                    seconds, chosen = found, tile
            self.found.decided.add(coordinate)
        finally:  # out of time or not: what was measured to be better is
            if chosen is not None:
                table.tiles[coordinate] = self.found.tiles[coordinate] = chosen
        return seconds

    def _try(self, problem: Problem, table: Tuned, what: str) -> float | None:
        """Seconds of a step by the table; None if it is wrong or does not run. Checked before it is timed."""
        if self.clock() >= self.end:
            raise OutOfTime
        wrong = self.runner.check(problem, table)
        if wrong is not None:
            self.say(f"  {what}: {wrong}")
            return None
        seconds = self.runner.seconds(problem, table)
        self.say(f"  {what}: {seconds * 1e3:.3f} ms")
        return seconds


def merged(before: Tuned | None, found: Tuned) -> Tuned:
    """What an earlier run measured, and what this one did, which goes first."""
    if before is None:
        return found
    tiles = {**before.tiles, **found.tiles}
    return Tuned({**before.heights, **found.heights}, tiles, before.decided | found.decided)

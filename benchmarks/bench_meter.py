"""Benchmark of RoutingMeter: a training step of the demo's model while it counts and without it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # to run as a script, too

import sparse_ffn as sf
from benchmarks import machine
from benchmarks.bench_chain import step
from benchmarks.measuring.timing import Quartiles, Run, race
from examples.language_model.configs import DEMO, Config
from examples.language_model.model import N_BYTES
from examples.language_model.variants import sigma_moe, transformer


def ratio(config: Config, seconds: float) -> Quartiles:
    """Time with a meter over the time without, paired: of one model, whose weights lie in the same memory."""
    tokens = torch.empty(config.batch_size, config.context + 1, dtype=torch.int64)
    model = transformer(sigma_moe, config, seed=0)
    meter = sf.RoutingMeter(model)

    def draw() -> None:
        tokens.random_(0, N_BYTES)

    def metered() -> None:
        with meter:
            step(model, tokens)

    runs = {"metered": Run(draw, metered), "plain": Run(draw, lambda: step(model, tokens))}
    found = race(runs, seconds).ratio("metered", "plain")
    metered()
    if [stats["load"].tolist() for stats in meter.stats().values()] != [
        stats["load"].tolist() for stats in sf.routing_stats(model).values()
    ]:
        raise RuntimeError("the meter did not count the step that it was timed with")
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--seconds", type=float, default=60)
    options = arguments.parse_args(argv)
    print(", ".join(f"{name}: {fact}" for name, fact in machine.describe(torch.device("cpu")).items()))
    found = ratio(DEMO, options.seconds)
    print(f"{found.median:.3f} of the time without a meter [{found.low:.3f}, {found.high:.3f}], {found.rounds} pairs")


if __name__ == "__main__":
    main()

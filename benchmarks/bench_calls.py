"""What a call costs beside its arithmetic: layers of tiny sizes on a CPU, one token each, beside `nn.Linear`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))  # to run as a script, too

import sparse_ffn as sf
from benchmarks import machine
from benchmarks.measuring.timing import Quartiles, Run, race

D_MODEL = 16
FORWARD, STEP = "forward", "training step"
BARS = {("SigmaMoE", FORWARD): 35.0, ("SigmaMoE", STEP): 300.0}
"""Most microseconds."""


def layers() -> dict[str, nn.Module]:
    """A few units each: their arithmetic takes no time."""
    return {
        "nn.Linear": nn.Linear(D_MODEL, D_MODEL),
        "DenseFFN": sf.DenseFFN(D_MODEL, 32),
        "TopKFFN": sf.TopKFFN(D_MODEL, 32, k=8),
        "ProductKeyMemory": sf.ProductKeyMemory(D_MODEL, n_sub_keys=8, k=4),
        "SigmaMoE": sf.SigmaMoE(D_MODEL, n_experts=4, expert_size=8, k=2),
    }


def check(made: Mapping[str, nn.Module]) -> None:
    """What is timed computes what the reference does.

    Raises:
        AssertionError: it does not.
    """
    x = torch.randn(1, D_MODEL)
    for layer in made.values():
        with sf.backend("reference"):
            expected = layer.eval()(x)
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


def measure(seconds: float) -> dict[tuple[str, str], Quartiles]:
    """Seconds of a call by layer and pass; the layers take turns."""
    torch.manual_seed(0)
    made, x = layers(), torch.empty(1, D_MODEL)
    found: dict[tuple[str, str], Quartiles] = {}
    check(made)

    def draw() -> None:
        x.normal_()

    def forward(layer: nn.Module) -> None:
        layer(x)

    def step(layer: nn.Module) -> None:
        (layer(x).sum() + sf.aux_loss(layer)).backward()
        layer.zero_grad()

    for what in (FORWARD, STEP):
        call = step if what == STEP else forward
        runs = {name: Run(draw, partial(call, layer.train(what == STEP))) for name, layer in made.items()}
        with torch.set_grad_enabled(what == STEP):
            samples = race(runs, seconds / 2)
        found.update({(name, what): samples.time(name) for name in made})
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--seconds", type=float, default=30)
    options = arguments.parse_args(argv)
    print(", ".join(f"{name}: {fact}" for name, fact in machine.describe(torch.device("cpu")).items()))
    for (name, what), found in measure(options.seconds).items():
        low, median, high = (1e6 * seconds for seconds in (found.low, found.median, found.high))
        bar = BARS.get((name, what))
        judged = "" if bar is None else f"  {'holds' if median <= bar else 'misses'} the bar of {bar:.0f}"
        print(f"{name:17} {what:13} {median:6.1f} µs [{low:.1f}, {high:.1f}]{judged}")


if __name__ == "__main__":
    main()

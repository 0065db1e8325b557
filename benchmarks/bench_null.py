"""Benchmark of null experts: a layer some of whose slots are null beside the same layer with none, forward pass."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # to run as a script, too

import sparse_ffn as sf
from benchmarks import machine
from benchmarks.measuring.timing import Quartiles, Run, race

D_MODEL, N_EXPERTS, EXPERT_SIZE, K = 512, 16, 128, 4


def ratio(tokens: int, share: float, seconds: float) -> tuple[float, Quartiles]:
    """The share of null slots that came out, and the time over that of the layer without null experts, paired."""
    null = round(N_EXPERTS * share / (1 - share))  # as many of all rows: an undecided router sends that share there
    plain = sf.SigmaMoE(D_MODEL, N_EXPERTS, EXPERT_SIZE, K).eval()
    layer = sf.SigmaMoE(D_MODEL, N_EXPERTS, EXPERT_SIZE, K, null_experts=null).eval()
    x = torch.empty(tokens, D_MODEL)
    with torch.no_grad():
        runs = {n: Run(lambda: x.normal_(), lambda m=m: m(x)) for n, m in (("null", layer), ("plain", plain))}
        samples = race(runs, seconds)
        layer(x)
    return sf.routing_stats(layer)[""]["null"], samples.ratio("null", "plain")


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--tokens", type=int, nargs="+", default=[512, 2048])
    arguments.add_argument("--share", type=float, default=0.5, help="of null slots, about")
    arguments.add_argument("--seconds", type=float, default=5, help="for each ratio")
    options = arguments.parse_args(argv)
    torch.manual_seed(0)
    print(", ".join(f"{name}: {fact}" for name, fact in machine.describe(torch.device("cpu")).items()))
    for tokens in options.tokens:
        share, found = ratio(tokens, options.share, options.seconds)
        times = f"{found.median:.2f} [{found.low:.2f}, {found.high:.2f}] of the time"
        print(f"{tokens:6} tokens, {share:.2f} of the slots null: {times}; bar {1 - 0.9 * share:.2f}")


if __name__ == "__main__":
    main()

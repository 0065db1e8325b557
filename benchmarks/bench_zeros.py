"""Benchmark of decode where hidden units are zero: one token, layers with and without such units."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # to run as a script, too

import sparse_ffn as sf
from benchmarks import machine
from benchmarks.timing import Quartiles, Run, race, wall_clock

D_MODEL, N_EXPERTS, EXPERT_SIZE, K = 2048, 16, 1024, 8


def make(kind: str, share: float, dtype: torch.dtype) -> sf.MoE | sf.DenseFFN:
    """A layer of which about this share of the units is zero for an input whose last number is 1."""
    glu = kind.endswith("glu")
    layer: sf.MoE | sf.DenseFFN
    if kind.startswith("moe"):
        layer = sf.SigmaMoE(D_MODEL, N_EXPERTS, EXPERT_SIZE, K, glu=glu, dtype=dtype)
    else:
        layer = sf.DenseFFN(D_MODEL, K * EXPERT_SIZE, glu=glu, dtype=dtype)
    first = layer.keys if layer.gate_keys is None else layer.gate_keys
    with torch.no_grad():
        level = torch.special.ndtri(torch.tensor(1 - share)).clamp(-9, 9)
        first[..., -1] = level * first[..., :-1].norm(dim=-1)
    return layer.eval()


def ratio(kind: str, share: float, dtype: torch.dtype, seconds: float) -> Quartiles:
    """Time of the layer with zeros over that of one without, paired; processor time of one thread."""
    x = torch.empty(1, D_MODEL, dtype=dtype)

    def draw() -> None:
        x.normal_()[:, -1] = 1

    layers = {"zeros": make(kind, share, dtype), "none": make(kind, 0.0, dtype)}
    with torch.no_grad():
        runs = {name: Run(draw, lambda layer=layer: layer(x)) for name, layer in layers.items()}
        samples = race(runs, seconds, stopwatch=wall_clock(time.thread_time))
    return samples.ratio("zeros", "none")


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--zeros", type=float, default=0.8, help="share of the units")
    arguments.add_argument("--seconds", type=float, default=5, help="for each ratio")
    options = arguments.parse_args(argv)
    torch.set_num_threads(1)
    print(", ".join(f"{name}: {fact}" for name, fact in machine.describe(torch.device("cpu")).items()))
    for kind in ("moe", "moe-glu", "dense", "dense-glu"):
        for dtype in (torch.float32, torch.bfloat16):
            found = ratio(kind, options.zeros, dtype, options.seconds)
            name = str(dtype).removeprefix("torch.")
            print(f"{kind:9} {name:8} {found.median:.2f} of the time without zeros [{found.low:.2f}, {found.high:.2f}]")


if __name__ == "__main__":
    main()

"""Benchmark of decode of one token that leaves hidden units out: those that are zero, or whose gates are small."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # to run as a script, too

import sparse_ffn as sf
from benchmarks import machine
from benchmarks.measuring.timing import Quartiles, Run, race, wall_clock

D_MODEL, N_EXPERTS, EXPERT_SIZE, K = 2048, 16, 1024, 8


def make(kind: str, share: float, dtype: torch.dtype) -> sf.MoE | sf.DenseFFN:  # a TopKFFN is one
    """A layer of which about this share of the units is zero for an input whose last number is 1."""
    glu = kind.endswith("glu")
    layer: sf.MoE | sf.DenseFFN
    if kind.startswith("moe"):
        layer = sf.SigmaMoE(D_MODEL, N_EXPERTS, EXPERT_SIZE, K, glu=glu, dtype=dtype)
    elif kind.startswith("topk"):
        layer = sf.TopKFFN(D_MODEL, K * EXPERT_SIZE, K * EXPERT_SIZE // 2, glu=glu, dtype=dtype)
    else:
        layer = sf.DenseFFN(D_MODEL, K * EXPERT_SIZE, glu=glu, dtype=dtype)
    first = layer.keys if layer.gate_keys is None else layer.gate_keys
    with torch.no_grad():
        level = torch.special.ndtri(torch.tensor(1 - share)).clamp(-9, 9)
        first[..., -1] = level * first[..., :-1].norm(dim=-1)
    return layer.eval()


def ratio(fewer: torch.nn.Module, all_units: torch.nn.Module, dtype: torch.dtype, seconds: float) -> Quartiles:
    """Time of the first layer over that of the second, paired; processor time of one thread."""
    x = torch.empty(1, D_MODEL, dtype=dtype)

    def draw() -> None:
        x.normal_()[:, -1] = 1

    layers = {"fewer": fewer, "all": all_units}
    with torch.no_grad():
        runs = {name: Run(draw, lambda layer=layer: layer(x)) for name, layer in layers.items()}
        samples = race(runs, seconds, stopwatch=wall_clock(time.thread_time))
    return samples.ratio("fewer", "all")


def by_gate(dtype: torch.dtype, seconds: float) -> Quartiles:
    """Time of a TopKFFN that takes a quarter of the units by their gates, over that of its dense GLU."""
    options: dict[str, Any] = {"glu": True, "activation": "silu", "bias": False, "dtype": dtype}
    n_units = K * EXPERT_SIZE
    topk = sf.TopKFFN(D_MODEL, n_units, n_units // 4, rank_by="gate", **options)
    return ratio(topk.eval(), sf.DenseFFN(D_MODEL, n_units, **options).eval(), dtype, seconds)


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--zeros", type=float, default=0.8, help="share of the units")
    arguments.add_argument("--seconds", type=float, default=5, help="for each ratio")
    options = arguments.parse_args(argv)
    torch.set_num_threads(1)
    print(", ".join(f"{name}: {fact}" for name, fact in machine.describe(torch.device("cpu")).items()))
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    for kind in ("moe", "moe-glu", "dense", "dense-glu", "topk", "topk-glu"):
        for name, dtype in dtypes.items():
            found = ratio(make(kind, options.zeros, dtype), make(kind, 0.0, dtype), dtype, options.seconds)
            print(f"{kind:9} {name:8} {found.median:.2f} of the time without zeros [{found.low:.2f}, {found.high:.2f}]")
    for name, dtype in dtypes.items():
        found = by_gate(dtype, options.seconds)
        print(f"by gate   {name:8} {found.median:.2f} of the dense GLU's time [{found.low:.2f}, {found.high:.2f}]")


if __name__ == "__main__":
    main()

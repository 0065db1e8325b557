"""Benchmark of the experts of transformers' MoE models: our implementation beside transformers' own, in one process."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))  # to run as a script, too

from benchmarks import machine
from benchmarks.measuring.contender import DTYPES
from benchmarks.measuring.timing import Quartiles, Run, race, stopwatch
from benchmarks.shapes import MoEShape

SHAPES = (MoEShape(512, 512, 8, 1024, 2), MoEShape(512, 512, 64, 256, 8), MoEShape(1, 512, 64, 256, 8))
OURS = "sparse_ffn"
IMPLEMENTATIONS = (OURS, "eager", "grouped_mm", "batched_mm")
MOST_COPIES = 1 << 28  # weights that batched_mm may copy: it gathers a matrix for each slot


def main(argv: Sequence[str] | None = None) -> list[dict[str, Quartiles]]:
    """Run from the command line. Returns for each row each peer's time over ours: above 1, ours is faster."""
    from transformers import OlmoeConfig
    from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

    from sparse_ffn.integrations.transformers import register

    register()
    add = (found := argparse.ArgumentParser(description=__doc__)).add_argument
    add("--shapes", nargs="+", type=MoEShape.parse, default=list(SHAPES), metavar="T,D,E,G,k",
        help="tokens, d_model, experts, units of an expert, selected experts")  # fmt: skip
    add("--dtype", nargs="+", choices=DTYPES, default=["fp32", "bf16"], help="default: fp32 bf16")
    add("--device", default="cpu", help="cpu (the default) or cuda")
    add("--seconds", type=float, default=5.0, help="to time one row for, about; default 5")
    options = found.parse_args(argv)
    device = torch.device(options.device)
    for name, fact in machine.describe(device).items():
        print(f"{name}: {fact}")

    rows = []
    for dtype in options.dtype:
        for shape in options.shapes:
            torch.manual_seed(0)
            config = OlmoeConfig(hidden_size=shape.D, intermediate_size=shape.G, num_experts=shape.E)
            experts = OlmoeExperts(config).to(device, DTYPES[dtype])
            for parameter in experts.parameters():
                nn.init.normal_(parameter, 0.0, 0.02)
            for train in (False, True) if shape.T > 1 else (False,):
                rows.append(_row(experts, shape, options.seconds, train))
                print(f"\n{dtype} {shape} {'forward and backward' if train else 'forward'}: time over ours")
                for name, ratio in rows[-1].items():
                    print(
                        f"  {name:10} {ratio.median:6.2f}  ({ratio.low:.2f} to {ratio.high:.2f}, {ratio.rounds} rounds)"
                    )
    return rows


def _row(experts: nn.Module, shape: MoEShape, seconds: float, train: bool) -> dict[str, Quartiles]:
    own = experts.down_proj
    x = torch.randn(shape.T, shape.D, device=own.device, dtype=own.dtype, requires_grad=train)
    gate, index = torch.rand(shape.T, shape.E, device=own.device).topk(shape.k)
    gate = gate.to(own.dtype)

    def run(name: str) -> Run:
        def call() -> object:
            experts.config._experts_implementation = name
            with torch.set_grad_enabled(train):
                y = experts(x, index, gate)
            return torch.autograd.grad(y.sum(), (x, *experts.parameters())) if train else y

        return Run(lambda: None, call)

    copies = shape.T * shape.k * 3 * shape.D * shape.G
    names = [n for n in IMPLEMENTATIONS if n != "batched_mm" or copies <= MOST_COPIES]
    samples = race({n: run(n) for n in names}, seconds, lead=(OURS,), stopwatch=stopwatch(own.device))
    return {name: samples.ratio(name, OURS) for name in names if name != OURS}


if __name__ == "__main__":
    main()

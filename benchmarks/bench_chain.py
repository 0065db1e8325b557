"""Benchmark of RouterChain: a training step of the demo's model with and without a recurrent router state."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # to run as a script, too

import sparse_ffn as sf
from benchmarks import machine
from benchmarks.measuring.timing import Quartiles, Run, race
from examples.language_model.configs import DEMO, Config
from examples.language_model.model import N_BYTES, ByteTransformer
from examples.language_model.variants import sigma_moe
from sparse_ffn.routing import RouterChain


class Chained(ByteTransformer):
    """The demo's model of mixtures; with a state width their routers see a chain's state."""

    def __init__(self, config: Config, d_state: int | None) -> None:
        torch.manual_seed(0)
        super().__init__(
            d_model=config.d_model, n_layers=config.n_layers, n_heads=config.n_heads, d_head=config.d_head,
            context=config.context, dropout=0.0, make_ffn=lambda _: sigma_moe(config, d_router=d_state),
        )  # fmt: skip
        self.chain = None if d_state is None else RouterChain(config.d_model, d_state, config.n_layers)

    def body(self, x: Tensor) -> Tensor:
        if self.chain is None:
            return super().body(x)
        state = None
        for i, block in enumerate(self.blocks):
            x = x + block.attention(block.attention_norm(x))
            seen = block.ffn_norm(x)
            state = self.chain(seen, state, i)
            x = x + block.ffn(seen, router_input=state)
        return x


def step(model: ByteTransformer, tokens: Tensor) -> None:
    """Forward and backward pass, without the optimizer's step."""
    loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    (loss + sf.aux_loss(model)).backward()  # type: ignore[no-untyped-call]
    model.zero_grad()


def ratio(d_state: int, config: Config, seconds: float) -> Quartiles:
    """Time with a chain over the time without, paired."""
    tokens = torch.empty(config.batch_size, config.context + 1, dtype=torch.int64)

    def draw() -> None:
        tokens.random_(0, N_BYTES)

    models = {"chain": Chained(config, d_state), "plain": Chained(config, None)}
    runs = {name: Run(draw, lambda model=model: step(model, tokens)) for name, model in models.items()}
    return race(runs, seconds).ratio("chain", "plain")


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--d-state", type=int, nargs="+", default=[64, 128], help="widths of the state")
    arguments.add_argument("--seconds", type=float, default=20, help="for each ratio")
    options = arguments.parse_args(argv)
    print(", ".join(f"{name}: {fact}" for name, fact in machine.describe(torch.device("cpu")).items()))
    for d_state in options.d_state:
        found = ratio(d_state, DEMO, options.seconds)
        print(f"d_state {d_state:4} {found.median:.2f} of the time without a chain [{found.low:.2f}, {found.high:.2f}]")


if __name__ == "__main__":
    main()

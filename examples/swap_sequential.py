"""Swap the FFN of a trained nn.Sequential model for a sparse one, see what it costs, train a little more.

python examples/swap_sequential.py
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import sparse_ffn as sf

D_MODEL, D_FF, N_EXPERTS = 32, 256, 16


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600, help="training steps of the dense model; half after the swap")
    parser.add_argument("--k", type=int, nargs="+", default=[16, 8, 4], help=f"experts for a token, of {N_EXPERTS}")
    return parser.parse_args(argv)


def batch(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens of a few kinds, each kind with a rule of its own: work for experts."""
    rules = torch.randn(8, D_MODEL, D_MODEL, generator=torch.Generator().manual_seed(7)) / D_MODEL**0.5
    kinds = torch.randn(8, D_MODEL, generator=torch.Generator().manual_seed(8))
    kind = torch.randint(8, (n,), generator=generator)
    x = torch.randn(n, D_MODEL, generator=generator) + 2 * kinds[kind]
    return x, torch.einsum("nij,nj->ni", rules[kind], x)


def train(model: nn.Module, steps: int, generator: torch.Generator) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(steps):
        x, y = batch(256, generator)
        loss = (model(x) - y).square().mean() + sf.aux_loss(model)  # 0 while the model has no MoE layer
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def error(model: nn.Module) -> float:
    x, y = batch(2048, torch.Generator().manual_seed(9))
    return float((model.eval()(x) - y).square().mean() / y.square().mean())


def main(argv: Sequence[str] | None = None) -> dict[int, tuple[float, float]]:
    """Returns, for each k, the relative error after the swap and after more training; for k = 0 the dense model's."""
    args = parse(argv)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    dense = nn.Sequential(
        nn.LayerNorm(D_MODEL),
        nn.Sequential(nn.Linear(D_MODEL, D_FF), nn.ReLU(), nn.Linear(D_FF, D_MODEL)),
    )
    train(dense, args.steps, generator)
    errors = {0: (error(dense), error(dense))}
    print(f"dense: relative error {errors[0][0]:.4f}")

    seen = sf.calibrate(dense, [batch(512, generator)[0] for _ in range(8)])
    for k in args.k:
        model = copy.deepcopy(dense)
        config = sf.MoEConfig(n_experts=N_EXPERTS, k=k, router="unweighted", init="cluster")  # exact at k = n_experts
        report = sf.sparsify_(model, config, calibration=seen)
        if k == args.k[0]:
            print(report)
        swapped = error(model)
        train(model, args.steps // 2, generator)
        errors[k] = (swapped, error(model))
        print(
            f"k = {k:2} of {N_EXPERTS}: relative error {swapped:.4f} after the swap, {errors[k][1]:.4f} after training"
        )
    return errors


if __name__ == "__main__":
    main()

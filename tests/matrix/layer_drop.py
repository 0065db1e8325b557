"""LayerDrop: blocks that are skipped at random in training, and all that may come between a loss and its end."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import sparse_ffn as sf

from .feature import EVERY_BACKEND, feature
from .layers import LAST, MIXTURES, D, assert_near, build, tokens

N_BLOCKS, STEPS = 3, 20
COMPILED = tuple(name for name in MIXTURES if name not in LAST)
OF_MIXTURES = dict.fromkeys(EVERY_BACKEND, MIXTURES)


class _Block(nn.Module):
    def __init__(self, layer: sf.SparseFFN) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return x + F.pad(y, (0, D - y.shape[-1]))  # SwitchMoE here is narrower


Call = Callable[[nn.Module, Tensor], Tensor]


def _train(
    name: str,
    call: Call = lambda block, x: block(x),
    *,
    forwards: int = 1,
    retain: bool = False,
    tolerance: float = 0,
    steps: int = STEPS,
    **options: Any,
) -> None:
    """Compare balance loss and gradients of each step with those of a model that is made of the blocks that ran."""
    blocks, draw = nn.ModuleList(_Block(build(name, **options)) for _ in range(N_BLOCKS)), random.Random(0)
    for seed in range(steps):
        blocks.zero_grad()
        twins = copy.deepcopy(blocks)
        for micro in range(forwards):
            ran = [i for i in range(N_BLOCKS) if draw.random() < 0.5]
            x = tokens(16, seed=2 * seed + micro).requires_grad_()  # where no block runs there is a gradient, too
            y, expected = x, x
            for i in ran:
                y, expected = call(blocks[i], y), twins[i](expected)
            balance, sums = sf.aux_loss(blocks), [sf.aux_loss(twins[i]) for i in ran]
            torch.testing.assert_close(balance, sum(sums, torch.zeros(())), rtol=1e-6 + tolerance, atol=1e-6)
            (expected.square().mean() + sum(sums)).backward()
            if retain:
                y.square().mean().backward(retain_graph=True)
                balance = sf.aux_loss(blocks)
                (balance if balance.requires_grad else balance + 0 * y.sum()).backward()
            else:
                (y.square().mean() + balance).backward()
            assert sf.aux_loss(blocks) == 0
        assert_near(_gradients(blocks), _gradients(twins), max(tolerance, 1e-6))
        with torch.no_grad():
            for p in blocks.parameters():
                if p.grad is not None:
                    p.sub_(p.grad, alpha=0.1)
    for block in blocks:
        block(tokens(16))
    assert sf.aux_loss(blocks.eval()) == 0
    assert sf.aux_loss(blocks.train()) == 0


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


@feature("LayerDrop")
def layer_drop(name: str) -> None:
    """Blocks skipped at random, 20 steps: balance loss and gradients are those of the blocks that ran; 0 after eval."""
    _train(name)


@feature("LayerDrop, gradient accumulation", OF_MIXTURES)
def accumulated(name: str) -> None:
    """As above, with two forward and backward passes in a step, of other blocks each."""
    _train(name, forwards=2)


@feature("LayerDrop, `retain_graph=True`", OF_MIXTURES)
def retained(name: str) -> None:
    """As above, with a backward pass for the loss and then one for `aux_loss`."""
    _train(name, retain=True)


@feature("LayerDrop, `checkpoint(use_reentrant=False)`", OF_MIXTURES)
def checkpointed(name: str) -> None:
    """As above, the blocks checkpointed."""
    _train(name, lambda block, x: checkpoint(block, x, use_reentrant=False))


@feature("LayerDrop, `checkpoint(use_reentrant=True)`", OF_MIXTURES)
def checkpointed_reentrant(name: str) -> None:
    """As above, with `aux="inject"`."""
    _train(name, lambda block, x: checkpoint(block, x, use_reentrant=True), aux="inject")


@feature("LayerDrop, `torch.compile`", {"reference": ("SigmaMoE",), "torch": ("SigmaMoE",), "cpu": COMPILED})
def compiled(name: str) -> None:
    """As above, the blocks compiled (`backend="aot_eager"`) and `aux_loss` asked outside."""
    torch._dynamo.reset()
    call = torch.compile(_Block.forward, fullgraph=True, backend="aot_eager")
    _train(name, call, tolerance=1e-5, steps=6)


FEATURES = (layer_drop, accumulated, retained, checkpointed, checkpointed_reentrant, compiled)

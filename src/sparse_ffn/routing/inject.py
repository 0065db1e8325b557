"""Adding the gradient of a loss in the backward pass, without any change to the training loop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def inject(x: Tensor, loss: Tensor) -> Tensor:
    """x unchanged; when its gradient is computed, ``loss`` is differentiated with weight 1. Without grad, x itself."""
    injected: Tensor = _Inject.apply(x, loss)  # type: ignore[no-untyped-call]
    return injected


class _Inject(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, loss: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        (loss,) = ctx.saved_tensors
        return grad, torch.ones_like(loss)

"""Adding the gradient of a loss in the backward pass, without any change to the training loop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def inject(y: Tensor, loss: Tensor) -> Tensor:
    """Y unchanged; when its gradient is computed, ``loss`` is differentiated with weight 1. Without grad, y itself."""
    injected: Tensor = _Inject.apply(y, loss)  # type: ignore[no-untyped-call]
    return injected


class _Inject(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        (loss,) = ctx.saved_tensors
        return grad, torch.ones_like(loss)

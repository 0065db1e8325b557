"""Top-k FFN on the backend "cuda": csrc/cuda has no kernel for it, so torch computes it.

Weights in another dtype than x are cast in each pass, and no copy is kept.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sparse_ffn.ops.topk_ffn import torch as by_torch
from sparse_ffn.ops.topk_ffn.backend import Gradients, Saved
from sparse_ffn.ops.units import Units


def forward(
    x: Tensor, units: Units, k: int, dropout_mask: Tensor | None, activation: str, norm_aware: bool
) -> tuple[Tensor, Saved]:
    """As ``topk_ffn.torch`` has it."""
    return by_torch.forward(x, units.to(x.dtype), k, dropout_mask, activation, norm_aware)


def backward(
    grad: Tensor, x: Tensor, units: Units, dropout_mask: Tensor | None, saved: Saved, activation: str
) -> Gradients:
    """As ``topk_ffn.torch`` has it, gradients in the weights' own dtype."""
    dx, dunits = by_torch.backward(grad, x, units.to(x.dtype), dropout_mask, saved, activation)
    own: Any = (None if w is None or g is None else g.to(w.dtype) for g, w in zip(dunits, units, strict=True))
    return Gradients(dx, Units(*own))

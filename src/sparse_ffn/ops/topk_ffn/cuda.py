"""Top-k FFN on the backend "cuda": csrc/cuda has no kernel for it, so torch computes it.

Weights in another dtype than x are cast in each pass, and no copy is kept.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sparse_ffn.ops.autocast import cast
from sparse_ffn.ops.topk_ffn import torch as by_torch


def forward(
    x: Tensor, keys: Tensor, values: Tensor, k: int, gate_keys: Tensor | None, key_bias: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As ``topk_ffn.torch`` has it."""
    keys, values = keys.to(x.dtype), values.to(x.dtype)
    return by_torch.forward(x, keys, values, k, cast(gate_keys, x.dtype), cast(key_bias, x.dtype), *options)


def backward(
    grad: Tensor,
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    gate_keys: Tensor | None,
    key_bias: Tensor | None,
    *saved: Any,
) -> tuple[Tensor, ...]:
    """As ``topk_ffn.torch`` has it, gradients in the weights' own dtype."""
    weights = (keys, values, gate_keys, key_bias)
    narrow: list[Any] = [cast(w, x.dtype) for w in weights]
    dx, *gradients = by_torch.backward(grad, x, *narrow, *saved)
    return dx, *(g if w is None else g.to(w.dtype) for g, w in zip(gradients, weights, strict=True))

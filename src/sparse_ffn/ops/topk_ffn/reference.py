"""Top-k FFN, the contract: all hidden units computed, all but the k largest set to zero."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_ffn.ops.activations import hidden_anywhere
from sparse_ffn.ops.select import stable_topk
from sparse_ffn.ops.units import Units


def rank(h: Tensor, values: Tensor, norm_aware: bool) -> Tensor:
    """What hidden units are ranked by: |h|, times the norm of the unit's value if norm-aware. No gradient."""
    score = h.detach().abs()
    if norm_aware:
        wide = torch.promote_types(h.dtype, torch.float32)
        score = score.to(wide) * values.detach().to(wide).norm(dim=1)
    return score


def topk_ffn(
    x: Tensor,
    units: Units,
    k: int,
    dropout_mask: Tensor | None,
    activation: str,
    norm_aware: bool,
) -> Tensor:
    """y = sum of h[i]·values[i] over the k units of the largest |h[i]|; shapes as in ``ops.topk_ffn``."""
    keys, values, gate_keys, key_bias = units
    glu_gate_TF = None if gate_keys is None else F.linear(x, gate_keys)
    h_TF = hidden_anywhere(activation, F.linear(x, keys, key_bias), glu_gate_TF, dropout_mask)
    index = stable_topk(rank(h_TF, values, norm_aware), k)
    selected = torch.zeros_like(h_TF, dtype=torch.bool).scatter(1, index, True)
    return torch.where(selected, h_TF, 0) @ values

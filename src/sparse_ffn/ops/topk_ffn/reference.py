"""Top-k FFN, the contract: all hidden units computed, all but the k largest set to zero."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_ffn.ops.activations import hidden_anywhere
from sparse_ffn.ops.select import stable_topk
from sparse_ffn.ops.units import Units

RANK_BY = ("hidden", "gate")
"""What hidden units may be ranked by: themselves, or in a GLU their gate alone, so that few keys have to be read."""


def rank(h: Tensor, values: Tensor, norm_aware: bool) -> Tensor:
    """The ranks of hidden units: |h|, times the norm of the unit's value if norm-aware. No gradient."""
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
    rank_by: str,
) -> Tensor:
    """y = sum of h[i]·values[i] over the k units of the largest |h[i]|; shapes as in ``ops.topk_ffn``.

    With ``rank_by="gate"`` they are those of the largest |act(gate_keys[i] x)|, times dropout's multiplier.
    """
    keys, values, gate_keys, key_bias = units
    glu_gate_TF = None if gate_keys is None else F.linear(x, gate_keys)
    up_TF = F.linear(x, keys, key_bias)
    if rank_by == "gate":
        assert glu_gate_TF is not None
        ranked_TF = hidden_anywhere(activation, glu_gate_TF, None, dropout_mask)
    else:
        ranked_TF = hidden_anywhere(activation, up_TF, glu_gate_TF, dropout_mask)
    index = stable_topk(rank(ranked_TF, values, norm_aware), k)
    selected = torch.zeros_like(ranked_TF, dtype=torch.bool).scatter(1, index, 1)  # torch.jit takes no True
    # before the activation, which is 0 at 0: after it, no gradient times an infinite slope would be NaN
    up_TF = torch.where(selected, up_TF, 0)
    glu_gate_TF = None if glu_gate_TF is None else torch.where(selected, glu_gate_TF, 0)
    return hidden_anywhere(activation, up_TF, glu_gate_TF, dropout_mask) @ values

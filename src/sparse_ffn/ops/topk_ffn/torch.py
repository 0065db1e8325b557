"""Top-k FFN that keeps only (index, activation) for the backward pass and gathers values where that is cheaper."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_ffn.ops.activations import hidden, hidden_backward
from sparse_ffn.ops.library import absent
from sparse_ffn.ops.select import eager_stable_topk
from sparse_ffn.ops.topk_ffn.reference import rank
from sparse_ffn.ops.weighted_bag import torch as bag

# T tokens, K selected units, F hidden units, D d_model, O d_out


def forward(
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    k: int,
    gate_keys: Tensor | None,
    key_bias: Tensor | None,
    dropout_mask: Tensor | None,
    activation: str,
    norm_aware: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output [T, O]; the selected units int32 [T, K], their z and, for a GLU, their other half [T, K]."""
    up_TF = F.linear(x, keys, key_bias)
    z_TF, other_TF = (up_TF, None) if gate_keys is None else (F.linear(x, gate_keys), up_TF)
    h_TF = hidden(activation, z_TF, other_TF, dropout_mask)
    index = eager_stable_topk(rank(h_TF, values, norm_aware), k)
    out = bag.forward(values, index, h_TF.gather(1, index))
    other_TK = absent(x) if other_TF is None else other_TF.gather(1, index)
    return out, index.to(torch.int32), z_TF.gather(1, index), other_TK


def backward(
    grad: Tensor,
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    gate_keys: Tensor | None,
    key_bias: Tensor | None,
    dropout_mask: Tensor | None,
    index: Tensor,
    z: Tensor,
    other: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, keys, values, gate_keys and key_bias; empty tensors for the arguments that are absent."""
    index = index.long()
    scale_TK = None if dropout_mask is None else dropout_mask.gather(1, index)
    other_TK = None if gate_keys is None else other
    dvalues, dh_TK = bag.backward(grad, values, index, hidden(activation, z, other_TK, scale_TK))
    dz_TK, dother_TK = hidden_backward(activation, dh_TK, z, other_TK, scale_TK)
    dup_TF = _densify(dz_TK if dother_TK is None else dother_TK, index, keys.shape[0])
    dx, dkeys = dup_TF @ keys, dup_TF.t() @ x
    dkey_bias = absent(x) if key_bias is None else dup_TF.sum(0)
    if gate_keys is None:
        return dx, dkeys, dvalues, absent(x), dkey_bias
    dz_TF = _densify(dz_TK, index, keys.shape[0])
    return dx + dz_TF @ gate_keys, dkeys, dvalues, dz_TF.t() @ x, dkey_bias


def _densify(selected: Tensor, index: Tensor, width: int) -> Tensor:
    return selected.new_zeros(index.shape[0], width).scatter_(1, index, selected)

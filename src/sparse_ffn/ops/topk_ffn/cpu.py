"""Top-k FFN in the CPU core: select fused after the first product, then only the selected units are touched."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_ffn.backends import cpu
from sparse_ffn.backends.cpu import ACTIVATIONS
from sparse_ffn.ops.activations import activate, hidden, hidden_backward, scaled
from sparse_ffn.ops.library import absent
from sparse_ffn.ops.products import linear
from sparse_ffn.ops.topk_ffn.reference import rank
from sparse_ffn.ops.weighted_bag import cpu as bag

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
    up_TF = linear(x, keys, key_bias)
    if gate_keys is None and dropout_mask is None:
        norm_F = values.float().norm(dim=1) if norm_aware else None
        index, kept_TK = _select_activation(up_TF, k, activation, norm_F)
        return bag.forward(values, index, kept_TK), index.to(torch.int32), up_TF.gather(1, index), absent(x)
    z_TF, other_TF = (up_TF, None) if gate_keys is None else (linear(x, gate_keys), up_TF)
    h_TF = hidden(activation, z_TF, other_TF, dropout_mask)
    index = _select(rank(h_TF, values, norm_aware), k)
    other_TK = absent(x) if other_TF is None else other_TF.gather(1, index)
    return bag.forward(values, index, h_TF.gather(1, index)), index.to(torch.int32), z_TF.gather(1, index), other_TK


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
    h_TK = scaled(activate(activation, z), other_TK, scale_TK)
    dvalues, dh_TK = bag.backward(grad, values, index, h_TK)
    dz_TK, dother_TK = hidden_backward(activation, dh_TK, z, other_TK, scale_TK)
    dup_TK = dz_TK if dother_TK is None else dother_TK
    dx = bag.forward(keys, index, dup_TK)
    dkeys = bag.values_backward(x, keys, index, dup_TK)
    dkey_bias = absent(x)
    if key_bias is not None:
        sums = torch.zeros(keys.shape[0], dtype=torch.float32, device="cpu").index_add_(
            0, index.flatten(), dup_TK.flatten().float()
        )
        dkey_bias = sums.to(key_bias.dtype)
    if gate_keys is None:
        return dx, dkeys, dvalues, absent(x), dkey_bias
    dgate_keys = bag.values_backward(x, gate_keys, index, dz_TK)
    return dx + bag.forward(gate_keys, index, dz_TK), dkeys, dvalues, dgate_keys, dkey_bias


def _select_activation(u: Tensor, k: int, activation: str, norm: Tensor | None) -> tuple[Tensor, Tensor]:
    """The k units of the largest |act(u)| (times norm), int64 [T, K], and act(u) there."""
    index, kept = cpu.empty(u.shape[0], k, dtype=torch.int64), cpu.empty(u.shape[0], k, dtype=u.dtype)
    cpu.call("topk_activation", (u, norm, index, kept), ACTIVATIONS[activation])
    return index, kept


def _select(scores: Tensor, k: int) -> Tensor:
    """The k largest of each row, ties to the lower index."""
    scores = scores.float().contiguous()
    index = cpu.empty(scores.shape[0], k, dtype=torch.int64)
    cpu.call("topk", (scores, index, None))
    return index

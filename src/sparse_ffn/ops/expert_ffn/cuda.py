"""Expert FFN out of two CVMM calls, as in the paper: up, activation, and down with the gates as reduction weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_ffn.backends.sort import sort_by_expert
from sparse_ffn.ops.activations import hidden, hidden_backward
from sparse_ffn.ops.cvmm import cuda as cvmm
from sparse_ffn.ops.library import absent
from sparse_ffn.ops.weighted_bag.cuda import segment_sums

# T tokens, K slots a token, S = T·K, E experts, G units of an expert, D d_model, O d_out; slots are in their own order


def forward(
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    index: Tensor,
    gate: Tensor,
    gate_keys: Tensor | None,
    key_bias: Tensor | None,
    dropout_mask: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output [T, O] and what the backward pass needs: z [S, G], GLU's other half [S, G], order [S], offsets [E + 1]."""
    T, K = index.shape
    expert, token = index.reshape(-1), _tokens(T, K, index)
    up_SG = cvmm.forward(x, keys.transpose(1, 2), expert, token, None, None, T * K)
    if key_bias is not None:
        up_SG += F.pad(key_bias.to(x.dtype), (0, 0, 0, 1)).index_select(0, expert)  # of void slots: zero
    if gate_keys is None:
        z_SG, other_SG = up_SG, None
    else:
        z_SG, other_SG = cvmm.forward(x, gate_keys.transpose(1, 2), expert, token, None, None, T * K), up_SG
    h_SG = hidden(activation, z_SG, other_SG, _slots(dropout_mask))
    out = cvmm.forward(h_SG, values, expert, None, token, gate.reshape(-1), T)
    order, offsets = sort_by_expert(expert, keys.shape[0])
    return out, z_SG, absent(x) if other_SG is None else other_SG, order, offsets


def inference(*arguments: Any) -> Tensor:
    """Output [T, O] for the arguments of :func:`forward`."""
    return forward(*arguments)[0]


def backward(
    grad: Tensor,
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    gate: Tensor,
    gate_keys: Tensor | None,
    key_bias: Tensor | None,
    dropout_mask: Tensor | None,
    z: Tensor,
    other: Tensor,
    order: Tensor,
    offsets: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, keys, values, gate, gate_keys and key_bias; empty tensors for the arguments that are absent."""
    T, K = gate.shape
    token, expert = _tokens(T, K, order), _experts(order, offsets)
    other_SG, scale_SG = None if gate_keys is None else other, _slots(dropout_mask)
    h_SG = hidden(activation, z, other_SG, scale_SG)
    dh_SG, dvalues, dgate = cvmm.backward(grad, h_SG, values, expert, None, token, gate.reshape(-1))
    dz_SG, dother_SG = hidden_backward(activation, dh_SG, z, other_SG, scale_SG)

    dup_SG = dz_SG if dother_SG is None else dother_SG
    dx, dkeys_EDG, _ = cvmm.backward(dup_SG, x, keys.transpose(1, 2), expert, token, None, None)
    dgate_keys = absent(x)
    if gate_keys is not None:
        more, dgate_keys_EDG, _ = cvmm.backward(dz_SG, x, gate_keys.transpose(1, 2), expert, token, None, None)
        dx, dgate_keys = dx + more, dgate_keys_EDG.transpose(1, 2).contiguous()
    dkey_bias = absent(x) if key_bias is None else segment_sums(dup_SG, order, offsets).to(key_bias.dtype)
    return dx, dkeys_EDG.transpose(1, 2).contiguous(), dvalues, dgate.view(T, K), dgate_keys, dkey_bias


def _tokens(T: int, K: int, like: Tensor) -> Tensor:
    """The token of each slot: int64 [S]."""
    return torch.arange(T * K, device=like.device) // K


def _experts(order: Tensor, offsets: Tensor) -> Tensor:
    """The expert of each slot: int64 [S], without waiting for the device."""
    position = torch.arange(order.shape[0], device=order.device, dtype=order.dtype)
    sorted_S = torch.searchsorted(offsets[1:].contiguous(), position, right=True)
    return torch.empty_like(sorted_S).index_copy_(0, order.long(), sorted_S)


def _slots(dropout_mask: Tensor | None) -> Tensor | None:
    return None if dropout_mask is None else torch.flatten(dropout_mask, 0, 1)

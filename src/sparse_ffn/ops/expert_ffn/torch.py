"""Expert FFN by sorting the slots and one matrix product an expert: sparse arithmetic without a compiler."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_ffn.backends.sort import sort_by_expert
from sparse_ffn.ops.activations import hidden, hidden_backward
from sparse_ffn.ops.library import absent
from sparse_ffn.ops.segments import segment_mm, segment_outer, segment_sum, unsort

# T tokens, K slots a token, S = T·K, E experts, G units of an expert, D d_model, O d_out; _S rows are sorted by expert


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
    order, offsets = sort_by_expert(index.reshape(-1), keys.shape[0])
    bounds = offsets.tolist()
    slots = order[: bounds[-1]]  # without the void ones
    x_SD = x.index_select(0, slots // K)
    up_SG = segment_mm(x_SD, keys.transpose(1, 2), bounds)
    if key_bias is not None:
        up_SG += key_bias.index_select(0, index.reshape(-1).index_select(0, slots))
    if gate_keys is None:
        z_SG, other_SG = up_SG, None
    else:
        z_SG, other_SG = segment_mm(x_SD, gate_keys.transpose(1, 2), bounds), up_SG
    h_SG = hidden(activation, z_SG, other_SG, _sorted_rows(dropout_mask, slots))
    h_SG = h_SG * _sorted_gates(gate, slots).to(h_SG.dtype)
    out_SO = segment_mm(h_SG, values, bounds)
    out = unsort(out_SO, slots, T * K).view(T, K, values.shape[2]).sum(1)
    if len(slots) < T * K:  # room for the void slots, too
        behind = (0, 0, 0, T * K - len(slots))
        z_SG, other_SG = F.pad(z_SG, behind), None if other_SG is None else F.pad(other_SG, behind)
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
    bounds = offsets.tolist()
    z, order = z[: bounds[-1]], order[: bounds[-1]]  # without the void slots
    token = order // K
    x_SD, grad_SO = x.index_select(0, token), grad.index_select(0, token)
    scale_SG, gate_S1 = _sorted_rows(dropout_mask, order), _sorted_gates(gate, order)
    other_SG = None if gate_keys is None else other[: bounds[-1]]

    h_SG = hidden(activation, z, other_SG, scale_SG)
    dh_SG = segment_mm(grad_SO, values.transpose(1, 2), bounds)
    dgate = unsort((dh_SG.to(gate.dtype) * h_SG).sum(1, keepdim=True), order, T * K).view(T, K)
    gate_S1 = gate_S1.to(h_SG.dtype)
    dvalues = segment_outer(h_SG * gate_S1, grad_SO, bounds)
    dz_SG, dother_SG = hidden_backward(activation, dh_SG * gate_S1, z, other_SG, scale_SG)

    dup_SG = dz_SG if dother_SG is None else dother_SG
    dx_SD = segment_mm(dup_SG, keys, bounds)
    if gate_keys is not None:
        dx_SD += segment_mm(dz_SG, gate_keys, bounds)
    dx = unsort(dx_SD, order, T * K).view(T, K, x.shape[1]).sum(1)
    dkeys = segment_outer(dup_SG, x_SD, bounds)
    dgate_keys = absent(x) if gate_keys is None else segment_outer(dz_SG, x_SD, bounds)
    dkey_bias = absent(x) if key_bias is None else segment_sum(dup_SG, bounds)
    return dx, dkeys, dvalues, dgate, dgate_keys, dkey_bias


def _sorted_gates(gate: Tensor, order: Tensor) -> Tensor:
    return gate.reshape(-1, 1).index_select(0, order)


def _sorted_rows(dropout_mask: Tensor | None, order: Tensor) -> Tensor | None:
    return None if dropout_mask is None else torch.flatten(dropout_mask, 0, 1).index_select(0, order)

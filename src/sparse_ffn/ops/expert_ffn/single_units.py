"""Experts of one unit, of which a memory has many thousands, out of the Triton kernels of the weighted bag.

A tile of a grouped product would hold one column of use. Keys and values are tables instead: rows are gathered,
multiplied and summed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_ffn.backends.sort import sort_by_expert
from sparse_ffn.backends.triton import bag, config, outer, segments
from sparse_ffn.backends.triton.launch import rows
from sparse_ffn.backends.triton.routing import check_slots
from sparse_ffn.ops.activations import hidden_anywhere, hidden_backward
from sparse_ffn.ops.expert_ffn.backend import Gradients, Saved
from sparse_ffn.ops.expert_ffn.by_products import with_void
from sparse_ffn.ops.units import Units

# T tokens, K slots a token, S = T·K, E experts, D d_model, O d_out. up is kept in the order of the slots.


def takes(experts: Units) -> bool:
    """Whether these are experts of one unit without a gate."""
    return experts.keys.shape[1] == 1 and experts.gate_keys is None


def forward(
    x: Tensor, experts: Units, index: Tensor, gate: Tensor, dropout_mask: Tensor | None, activation: str
) -> tuple[Tensor, Saved]:
    """The output, and what the backward pass needs."""
    E = experts.keys.shape[0]
    out, up_TK = _forward(x, experts, index, gate, dropout_mask, activation)
    order, offsets = sort_by_expert(index.flatten().clamp(-1, E).to(torch.int32), E)
    return out, Saved(order, offsets, up_TK.to(x.dtype).view(-1, 1), None)


def inference(
    x: Tensor, experts: Units, index: Tensor, gate: Tensor, dropout_mask: Tensor | None, activation: str
) -> Tensor:
    """The output, nothing kept."""
    return _forward(x, experts, index, gate, dropout_mask, activation)[0]


def _forward(
    x: Tensor, experts: Units, index: Tensor, gate: Tensor, dropout_mask: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    """The output, and the units before their activation, fp32 [T, K]."""
    check_slots(index)
    keys_ED, values_EO, index = rows(experts.keys[:, 0]), rows(experts.values[:, 0]), index.contiguous()
    up_TK = bag.dot_products(rows(x), keys_ED, index)
    if experts.key_bias is not None:
        bias_E, E = with_void(experts.key_bias)[:, 0], experts.keys.shape[0]
        up_TK += bias_E[torch.where((index < 0) | (index > E), E, index)]
    h_TK = hidden_anywhere(activation, up_TK, None, _of_slots(dropout_mask))
    out = x.new_empty(x.shape[0], values_EO.shape[1])
    bag.bag(values_EO, index, h_TK * gate, out)  # which reads nothing of a void slot
    return out, up_TK


def backward(
    grad: Tensor,
    x: Tensor,
    experts: Units,
    gate: Tensor,
    dropout_mask: Tensor | None,
    saved: Saved,
    needs_experts: bool,
    activation: str,
) -> Gradients:
    """The gradients; of void slots neither gate nor dropout's multiplier is of any weight."""
    keys, values, _, key_bias = experts
    order, offsets, up, _ = saved
    x, grad, keys_ED, values_EO = rows(x), rows(grad), rows(keys[:, 0]), rows(values[:, 0])
    scale = _of_slots(dropout_mask)
    position = torch.arange(order.shape[0], dtype=torch.int32, device=order.device)
    index = torch.empty_like(order)
    index[order.long()] = torch.searchsorted(offsets[1:], position, right=True, out_int32=True)
    index, up_TK = index.view_as(gate), up.view_as(gate).float()
    h_TK = hidden_anywhere(activation, up_TK, None, scale)

    dvalues, groups = None, None
    if needs_experts:
        dvalues, groups = values.new_empty(values.shape), segments.of_sorted(order, offsets, config.BAG.cap)
        dots_TK = bag.bag_gradient(groups, grad, h_TK * gate, dvalues[:, 0], values_EO)
    else:
        dots_TK = bag.dot_products(grad, values_EO, index)
    assert dots_TK is not None
    void = index >= keys.shape[0]
    dgate = (dots_TK * h_TK).masked_fill_(void, 0).to(gate.dtype)
    dup_TK = hidden_backward(activation, dots_TK * gate, up_TK, None, scale)[0].masked_fill_(void, 0)

    dx = x.new_empty(x.shape)
    bag.bag(keys_ED, index, dup_TK, dx)
    if dvalues is None or groups is None:
        return Gradients(dx, None, dgate)
    dkeys = keys.new_empty(keys.shape)
    bag.bag_gradient(groups, x, dup_TK, dkeys[:, 0])
    dkey_bias = None if key_bias is None else key_bias.new_empty(key_bias.shape)
    if dkey_bias is not None:
        outer.sum_rows(dup_TK.flatten()[order.long()].unsqueeze(1), offsets, dkey_bias)
    return Gradients(dx, Units(dkeys, dvalues, None, dkey_bias), dgate)


def _of_slots(dropout_mask: Tensor | None) -> Tensor | None:
    """[T, K, 1] as [T, K]."""
    return None if dropout_mask is None else dropout_mask[:, :, 0]

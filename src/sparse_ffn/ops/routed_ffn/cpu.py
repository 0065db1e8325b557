"""Routed FFN in the native core: scores, selection, gates, experts, and the sums for balance losses in one call."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_ffn import native
from sparse_ffn.native import GATES, Router, pointer
from sparse_ffn.ops.expert_ffn.cpu import arguments
from sparse_ffn.ops.library import absent


def inference(
    x: Tensor,
    router_weight: Tensor,
    router_bias: Tensor | None,
    keys: Tensor,
    values: Tensor,
    gate_keys: Tensor | None,
    key_bias: Tensor | None,
    k: int,
    gate_function: str,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """Output [T, O] and the selected experts int64 [T, K]."""
    tokens = x.shape[0]
    block, _keep = arguments(x, keys, values, None, gate_keys, key_bias, None, activation, None, None, k=k)
    router, _keep_router = _router(router_weight, router_bias, None, 1, gate_function)
    out, index = native.empty(tokens, values.shape[2], dtype=x.dtype), native.empty(tokens, k, dtype=torch.int64)
    nothing = (None, None, None, None)
    native.call("moe_forward", block, router, out.data_ptr(), None, None, index.data_ptr(), *nothing)
    return out, index


def forward(
    x: Tensor,
    router_weight: Tensor,
    router_bias: Tensor | None,
    mask: Tensor | None,
    keys: Tensor,
    values: Tensor,
    gate_keys: Tensor | None,
    key_bias: Tensor | None,
    hidden_scale: Tensor | None,
    k: int,
    gate_function: str,
    groups: int,
    activation: str,
) -> tuple[Tensor, ...]:
    """out, index, gate, softmax sums, hidden units [S, G], a GLU's gates [S, G], order, offsets."""
    (tokens, _), (n_experts, size, d_out) = x.shape, values.shape
    x = native.rows(x)
    block, _keep = arguments(x, keys, values, None, gate_keys, key_bias, hidden_scale, activation, None, None, k=k)
    router, _keep_router = _router(router_weight, router_bias, mask, groups, gate_function)
    out, index = native.empty(tokens, d_out, dtype=x.dtype), native.empty(tokens, k, dtype=torch.int64)
    gate = native.empty(tokens, k, dtype=torch.float32)
    sums = native.empty(groups, n_experts, dtype=torch.float32)
    z = native.empty(tokens * k, size, dtype=x.dtype)
    other = absent(x) if gate_keys is None else native.empty(*z.shape, dtype=z.dtype)
    order, offsets = native.empty(tokens * k, dtype=torch.int32), native.empty(n_experts + 1, dtype=torch.int32)
    native.call(
        "moe_forward",
        *(block, router, out.data_ptr(), z.data_ptr(), None if gate_keys is None else other.data_ptr()),
        *(t.data_ptr() for t in (index, gate, order, offsets, sums)),
    )
    return out, index, gate, sums, z, other, order, offsets


def backward(
    grad: Tensor,
    grad_gate: Tensor | None,
    grad_sums: Tensor | None,
    x: Tensor,
    router_weight: Tensor,
    mask: Tensor | None,
    keys: Tensor,
    values: Tensor,
    gate_keys: Tensor | None,
    key_bias: Tensor | None,
    hidden_scale: Tensor | None,
    index: Tensor,
    gate: Tensor,
    z: Tensor,
    other: Tensor,
    order: Tensor,
    offsets: Tensor,
    gate_function: str,
    groups: int,
    activation: str,
) -> tuple[Tensor, ...]:
    """Gradients of x, router_weight, keys, values, gate_keys, key_bias; empty tensors for what is absent."""
    block, _keep = arguments(x, keys, values, gate, gate_keys, key_bias, hidden_scale, activation, order, offsets)
    router, _keep_router = _router(router_weight, None, mask, groups, gate_function)
    grad, grad_gate, grad_sums = native.rows(grad), native.dense(grad_gate), native.dense(grad_sums)
    present = (x, router_weight, keys, gate_keys, values, key_bias)
    found = [None if t is None else native.empty(*t.shape, dtype=t.dtype) for t in present]
    native.call(
        "moe_backward",
        *(block, router, grad.data_ptr(), grad.stride(0), z.data_ptr()),
        *(None if gate_keys is None else other.data_ptr(), index.data_ptr(), pointer(grad_gate), pointer(grad_sums)),
        *(pointer(t) for t in found),
    )
    dx, drouter, dkeys, dgate_keys, dvalues, dkey_bias = (absent(x) if t is None else t for t in found)
    return dx, drouter, dkeys, dvalues, dgate_keys, dkey_bias


def _router(
    weight: Tensor, bias: Tensor | None, mask: Tensor | None, groups: int, gate_function: str
) -> tuple[Router, tuple[Tensor | None, ...]]:
    """The core's description of a router, and the tensors whose memory it points to."""
    weight, bias, mask = weight.contiguous(), native.dense(bias), native.dense(mask)
    block = Router(weight.data_ptr(), pointer(bias), pointer(mask), groups, GATES[gate_function], 0)
    return block, (weight, bias, mask)

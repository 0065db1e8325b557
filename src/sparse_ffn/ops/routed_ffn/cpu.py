"""Routed FFN in the CPU core: scores, selection, gates, experts, and the sums for balance losses in one call."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_ffn.backends import cpu
from sparse_ffn.backends.cpu import ACTIVATIONS, GATES, dense, rows
from sparse_ffn.ops.expert_ffn.cpu import NOTHING_SAVED, units
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
    out, index = cpu.empty(tokens, values.shape[-1], dtype=x.dtype), cpu.empty(tokens, k, dtype=torch.int64)
    cpu.call(
        "moe_forward",
        (
            *units(x, keys, values, gate_keys, key_bias),
            *(router_weight.contiguous(), dense(router_bias), None, None),
            *(out, index, None, None, *NOTHING_SAVED),
        ),
        *(GATES[gate_function], ACTIVATIONS[activation]),
    )
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
    dropout_mask: Tensor | None,
    k: int,
    gate_function: str,
    groups: int,
    activation: str,
) -> tuple[Tensor, ...]:
    """out, index, gate, softmax sums, hidden units [S, G], a GLU's gates [S, G], order, offsets."""
    (tokens, _), (n_experts, size, d_out) = x.shape, values.shape
    out, index = cpu.empty(tokens, d_out, dtype=x.dtype), cpu.empty(tokens, k, dtype=torch.int64)
    gate = cpu.empty(tokens, k, dtype=torch.float32)
    sums = cpu.empty(groups, router_weight.shape[0], dtype=torch.float32)
    z = cpu.empty(tokens * k, size, dtype=x.dtype)
    other = None if gate_keys is None else cpu.empty(*z.shape, dtype=z.dtype)
    order, offsets = cpu.empty(tokens * k, dtype=torch.int32), cpu.empty(n_experts + 1, dtype=torch.int32)
    cpu.call(
        "moe_forward",
        (
            *units(x, keys, values, gate_keys, key_bias),
            *(router_weight.contiguous(), dense(router_bias), dense(mask), dense(dropout_mask)),
            *(out, index, gate, sums, order, offsets, z, other),
        ),
        *(GATES[gate_function], ACTIVATIONS[activation]),
    )
    return out, index, gate, sums, z, absent(x) if other is None else other, order, offsets


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
    dropout_mask: Tensor | None,
    index: Tensor,
    gate: Tensor,
    z: Tensor,
    other: Tensor,
    order: Tensor,
    offsets: Tensor,
    gate_function: str,
    activation: str,
) -> tuple[Tensor, ...]:
    """Gradients of x, router_weight, keys, values, gate_keys, key_bias; empty tensors for what is absent."""
    present = (x, router_weight, keys, values, gate_keys, key_bias)
    found = [None if t is None else cpu.empty(*t.shape, dtype=t.dtype) for t in present]
    cpu.call(
        "moe_backward",
        (
            *units(x, keys, values, gate_keys, key_bias),
            *(router_weight.contiguous(), dense(mask), dense(dropout_mask), index, gate),
            *(order, offsets, z, None if gate_keys is None else other),
            *(rows(grad), dense(grad_gate), dense(grad_sums), *found),
        ),
        *(GATES[gate_function], ACTIVATIONS[activation]),
    )
    return tuple(absent(x) if t is None else t for t in found)

"""Expert FFN in the native core: gather, both layers, gate and combine in two passes over the experts."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_ffn import native
from sparse_ffn.native import ACTIVATIONS, DTYPES, Experts, pointer
from sparse_ffn.ops.library import absent


def inference(
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    index: Tensor,
    gate: Tensor,
    gate_keys: Tensor | None,
    key_bias: Tensor | None,
    hidden_scale: Tensor | None,
    activation: str,
) -> Tensor:
    """Output [T, O], nothing saved."""
    block, _keep = arguments(x, keys, values, gate, gate_keys, key_bias, hidden_scale, activation, None, None)
    index = index.contiguous()
    out = native.empty(x.shape[0], values.shape[2], dtype=x.dtype)
    native.call("experts_infer", block, index.data_ptr(), out.data_ptr())
    return out


def forward(
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    index: Tensor,
    gate: Tensor,
    gate_keys: Tensor | None,
    key_bias: Tensor | None,
    hidden_scale: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output [T, O] and what the backward pass needs: hidden units [S, G], a GLU's gates [S, G], order, offsets."""
    order, offsets = native.route(index.reshape(-1), keys.shape[0])
    block, _keep = arguments(x, keys, values, gate, gate_keys, key_bias, hidden_scale, activation, order, offsets)
    out = native.empty(x.shape[0], values.shape[2], dtype=x.dtype)
    z = native.empty(order.shape[0], keys.shape[1], dtype=x.dtype)
    other = absent(x) if gate_keys is None else native.empty(*z.shape, dtype=z.dtype)
    native.call("experts_forward", block, out.data_ptr(), z.data_ptr(), None if gate_keys is None else other.data_ptr())
    return out, z, other, order, offsets


def backward(
    grad: Tensor,
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    gate: Tensor,
    gate_keys: Tensor | None,
    key_bias: Tensor | None,
    hidden_scale: Tensor | None,
    z: Tensor,
    other: Tensor,
    order: Tensor,
    offsets: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, keys, values, gate, gate_keys and key_bias; empty tensors for the arguments that are absent."""
    block, _keep = arguments(x, keys, values, gate, gate_keys, key_bias, hidden_scale, activation, order, offsets)
    grad = native.rows(grad)
    dx, dkeys, dvalues = (native.empty(*t.shape, dtype=t.dtype) for t in (x, keys, values))
    dgate = native.empty(*gate.shape, dtype=torch.float32)
    dgate_keys, dkey_bias = (
        None if t is None else native.empty(*t.shape, dtype=t.dtype) for t in (gate_keys, key_bias)
    )
    native.call(
        "experts_backward",
        block,
        grad.data_ptr(),
        grad.stride(0),
        z.data_ptr(),
        None if gate_keys is None else other.data_ptr(),
        *(pointer(t) for t in (dx, dkeys, dgate_keys, dvalues, dkey_bias, dgate)),
    )
    return (
        *(dx, dkeys, dvalues, dgate.to(gate.dtype)),
        absent(x) if dgate_keys is None else dgate_keys,
        absent(x) if dkey_bias is None else dkey_bias,
    )


def arguments(
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    gate: Tensor | None,
    gate_keys: Tensor | None,
    key_bias: Tensor | None,
    hidden_scale: Tensor | None,
    activation: str,
    order: Tensor | None,
    offsets: Tensor | None,
    k: int | None = None,
) -> tuple[Experts, tuple[Tensor | None, ...]]:
    """The core's argument block, and the tensors whose memory it points to: keep them while it is in use.

    ``k`` counts a token's experts where there is no gate yet.
    """
    x, keys, values = native.rows(x), keys.contiguous(), values.contiguous()
    gate_keys, key_bias, hidden_scale = native.dense(gate_keys), native.dense(key_bias), native.dense(hidden_scale)
    if gate is not None:
        gate, k = gate.float().contiguous(), gate.shape[1]
    n_experts, size, d_out = values.shape
    block = Experts(
        *(*x.shape, d_out, n_experts, size, k, DTYPES[x.dtype], ACTIVATIONS[activation], torch.get_num_threads(), 0),
        *(x.data_ptr(), x.stride(0), keys.data_ptr(), pointer(gate_keys), values.data_ptr(), pointer(key_bias)),
        *(pointer(gate), pointer(hidden_scale), pointer(order), pointer(offsets)),
    )
    return block, (x, keys, gate_keys, values, key_bias, gate, hidden_scale, order, offsets)

"""Expert FFN in the CPU core: gather, both layers, gate and combine in two passes over the experts."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_ffn.backends import cpu
from sparse_ffn.backends.cpu import ACTIVATIONS, dense, rows
from sparse_ffn.ops.library import absent


def inference(
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    index: Tensor,
    gate: Tensor,
    gate_keys: Tensor | None,
    key_bias: Tensor | None,
    dropout_mask: Tensor | None,
    activation: str,
) -> Tensor:
    """Output [T, O], nothing saved."""
    out = cpu.empty(x.shape[0], values.shape[-1], dtype=x.dtype)
    cpu.call(
        "experts_forward",
        (
            *units(x, keys, values, gate_keys, key_bias),
            *(index.contiguous(), gate.float().contiguous(), dense(dropout_mask), out),
            *NOTHING_SAVED,
        ),
        ACTIVATIONS[activation],
    )
    return out


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
    """Output [T, O] and what the backward pass needs: hidden units [S, G], a GLU's gates [S, G], order, offsets."""
    slots, size = index.numel(), keys.shape[1]
    out = cpu.empty(x.shape[0], values.shape[-1], dtype=x.dtype)
    z = cpu.empty(slots, size, dtype=x.dtype)
    other = None if gate_keys is None else cpu.empty(slots, size, dtype=x.dtype)
    order, offsets = cpu.empty(slots, dtype=torch.int32), cpu.empty(keys.shape[0] + 1, dtype=torch.int32)
    cpu.call(
        "experts_forward",
        (
            *units(x, keys, values, gate_keys, key_bias),
            *(index.contiguous(), gate.float().contiguous(), dense(dropout_mask), out),
            *(order, offsets, z, other),
        ),
        ACTIVATIONS[activation],
    )
    return out, z, absent(x) if other is None else other, order, offsets


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
    dx, dkeys, dvalues = (cpu.empty(*t.shape, dtype=t.dtype) for t in (x, keys, values))
    dgate = cpu.empty(*gate.shape, dtype=torch.float32)
    dgate_keys, dkey_bias = (None if t is None else cpu.empty(*t.shape, dtype=t.dtype) for t in (gate_keys, key_bias))
    cpu.call(
        "experts_backward",
        (
            *units(x, keys, values, gate_keys, key_bias),
            *(gate.float().contiguous(), dense(dropout_mask)),
            *(order, offsets, z, None if gate_keys is None else other, rows(grad)),
            *(dx, dkeys, dvalues, dgate_keys, dkey_bias, dgate),
        ),
        ACTIVATIONS[activation],
    )
    return (
        *(dx, dkeys, dvalues, dgate.to(gate.dtype)),
        absent(x) if dgate_keys is None else dgate_keys,
        absent(x) if dkey_bias is None else dkey_bias,
    )


NOTHING_SAVED = (None, None, None, None)


def units(
    x: Tensor, keys: Tensor, values: Tensor, gate_keys: Tensor | None, key_bias: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The core's ``sparse_ffn_units``."""
    return rows(x), keys.contiguous(), values.contiguous(), dense(gate_keys), dense(key_bias)

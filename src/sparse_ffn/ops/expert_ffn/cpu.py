"""Expert FFN in the CPU core: gather, both layers, gate and combine in two passes over the experts."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_ffn.backends import cpu, crossovers
from sparse_ffn.backends.cpu import ACTIVATIONS
from sparse_ffn.backends.layout import contiguous, rows
from sparse_ffn.ops.expert_ffn.backend import Gradients, Saved
from sparse_ffn.ops.units import Units

NOTHING_SAVED = (None,) * len(Saved._fields)
NO_UNITS = (None,) * len(Units._fields)


def forward(
    x: Tensor, experts: Units, index: Tensor, gate: Tensor, dropout_mask: Tensor | None, activation: str
) -> tuple[Tensor, Saved]:
    """The output, and what the backward pass needs: the units' rows are in the order of the experts."""
    saved = empty_saved(x, experts, index.numel())
    return _forward(x, experts, index, gate, dropout_mask, activation, saved), saved


def inference(
    x: Tensor, experts: Units, index: Tensor, gate: Tensor, dropout_mask: Tensor | None, activation: str
) -> Tensor:
    """The output, nothing kept."""
    return _forward(x, experts, index, gate, dropout_mask, activation, NOTHING_SAVED)


def _forward(
    x: Tensor,
    experts: Units,
    index: Tensor,
    gate: Tensor,
    dropout_mask: Tensor | None,
    activation: str,
    saved: tuple[Tensor | None, ...],
) -> Tensor:
    out = cpu.empty(x.shape[0], experts.values.shape[-1], dtype=x.dtype)
    operands = (*units(x, experts), index.contiguous(), gate.float().contiguous(), contiguous(dropout_mask))
    few = crossovers.decode_tokens(x.dtype, experts.keys, index.shape[1])
    cpu.call("experts_forward", (*operands, out, *saved), ACTIVATIONS[activation], few)
    return out


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
    """The gradients."""
    dx, dexperts = cpu.empty(*x.shape, dtype=x.dtype), empty_like(experts) if needs_experts else None
    dgate = cpu.empty(*gate.shape, dtype=torch.float32)
    operands = (*units(x, experts), gate.float().contiguous(), contiguous(dropout_mask))
    tensors = (*operands, *saved, rows(grad), dx, *(dexperts or NO_UNITS), dgate)
    cpu.call("experts_backward", tensors, ACTIVATIONS[activation])
    return Gradients(dx, dexperts, dgate.to(gate.dtype))


def units(x: Tensor, experts: Units) -> tuple[Tensor | None, ...]:
    """The core's ``sparse_ffn_units``."""
    return rows(x), *map(contiguous, experts)


def empty_saved(x: Tensor, experts: Units, slots: int) -> Saved:
    """Memory for what a forward pass keeps."""
    n_experts, size, _ = experts.keys.shape
    return Saved(
        cpu.empty(slots, dtype=torch.int32),
        cpu.empty(n_experts + 1, dtype=torch.int32),
        cpu.empty(slots, size, dtype=x.dtype),
        None if experts.gate_keys is None else cpu.empty(slots, size, dtype=x.dtype),
    )


def empty_like(experts: Units) -> Units:
    """Memory for gradients."""
    return Units._make([None if t is None else cpu.empty(*t.shape, dtype=t.dtype) for t in experts])

"""Routed FFN in the CPU core: scores, selection, gates, experts, and the sums for balance losses in one call."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparse_ffn.backends import cpu, crossovers
from sparse_ffn.backends.cpu import ACTIVATIONS, GATES
from sparse_ffn.backends.layout import contiguous, rows
from sparse_ffn.ops.expert_ffn.backend import Saved
from sparse_ffn.ops.expert_ffn.cpu import NO_UNITS, NOTHING_SAVED, empty_like, empty_saved, units
from sparse_ffn.ops.route.backend import Router
from sparse_ffn.ops.units import Units


class Selected(NamedTuple):
    """Output [T, O] and the selected experts, int64 [T, K]."""

    out: Tensor
    selected: Tensor


class Routed(NamedTuple):
    """What ``reference.routed_ffn`` returns, and what the backward pass needs."""

    out: Tensor
    selected: Tensor
    gate: Tensor
    sums: Tensor
    saved: Saved


class Gradients(NamedTuple):
    """The gradients of the trained operands."""

    x: Tensor
    router_weight: Tensor
    experts: Units | None


def inference(
    x: Tensor,
    router: Router,
    experts: Units,
    dropout_mask: Tensor | None,
    k: int,
    gate_function: str,
    groups: int,
    activation: str,
) -> Selected:
    """The first two results, nothing kept."""
    tokens = x.shape[0]
    found = Selected(
        cpu.empty(tokens, experts.values.shape[-1], dtype=x.dtype), cpu.empty(tokens, k, dtype=torch.int64)
    )
    operands = (*units(x, experts), *map(contiguous, (*router, dropout_mask)))
    options = (GATES[gate_function], ACTIVATIONS[activation], crossovers.decode_tokens(x.dtype, experts.keys, k))
    cpu.call("moe_forward", (*operands, *found, None, None, *NOTHING_SAVED), *options)
    return found


def forward(
    x: Tensor,
    router: Router,
    experts: Units,
    dropout_mask: Tensor | None,
    k: int,
    gate_function: str,
    groups: int,
    activation: str,
) -> Routed:
    """The results."""
    tokens = x.shape[0]
    found = Routed(
        cpu.empty(tokens, experts.values.shape[2], dtype=x.dtype),
        cpu.empty(tokens, k, dtype=torch.int64),
        cpu.empty(tokens, k, dtype=torch.float32),
        cpu.empty(groups, router.router_weight.shape[0], dtype=torch.float32),
        empty_saved(x, experts, tokens * k),
    )
    operands = (*units(x, experts), *map(contiguous, (*router, dropout_mask)))
    options = (GATES[gate_function], ACTIVATIONS[activation], 0)  # what is kept is not decoded
    cpu.call("moe_forward", (*operands, *found[:4], *found.saved), *options)
    return found


def backward(
    grad: Tensor | None,
    grad_gate: Tensor | None,
    grad_sums: Tensor | None,
    x: Tensor,
    router_weight: Tensor,
    mask: Tensor | None,
    experts: Units,
    dropout_mask: Tensor | None,
    selected: Tensor,
    gate: Tensor,
    saved: Saved,
    needs_experts: bool,
    gate_function: str,
    activation: str,
) -> Gradients:
    """The gradients, for those of out, gate and sums, each of which may be absent; experts have some if asked for."""
    grad = x.new_zeros(x.shape[0], experts.values.shape[2]) if grad is None else rows(grad)
    dx, drouter_weight = cpu.empty(*x.shape, dtype=x.dtype), cpu.empty(*router_weight.shape, dtype=x.dtype)
    dexperts = empty_like(experts) if needs_experts else None
    operands = (*units(x, experts), *map(contiguous, (router_weight, mask, dropout_mask)))
    grads = (grad, contiguous(grad_gate), contiguous(grad_sums))
    cpu.call(
        "moe_backward",
        (*operands, selected, gate, *saved, *grads, dx, drouter_weight, *(dexperts or NO_UNITS)),
        *(GATES[gate_function], ACTIVATIONS[activation]),
    )
    return Gradients(dx, drouter_weight, dexperts)

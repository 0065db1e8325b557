"""Routed FFN: a MoE layer whose router is a linear map, top-k and a gate, as one torch.library op of the CPU core.

The op saves a pass over x, its gradient and the scores [T, E]; where the core cannot compute, a layer runs its router
and ``expert_ffn`` one after the other, which is the same function.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_ffn.backends.choice import choose
from sparse_ffn.ops.autocast import autocast_enabled
from sparse_ffn.ops.expert_ffn import op as expert_ffn
from sparse_ffn.ops.operator import Operator
from sparse_ffn.ops.route.backend import Router
from sparse_ffn.ops.routed_ffn import cpu
from sparse_ffn.ops.units import Units


def routed_ffn_available(
    x: Tensor,
    router_weight: Tensor,
    router_bias: Tensor | None,
    experts: Units,
) -> bool:
    """Whether the op computes this input now: fp32 or bf16 throughout (a router's bias fp32), on the CPU core."""
    dtype = x.dtype
    return (
        dtype in (torch.float32, torch.bfloat16)
        and router_weight.dtype == dtype
        and all(t is None or t.dtype == dtype for t in experts)
        and (router_bias is None or router_bias.dtype == torch.float32)
        and not autocast_enabled(x)
        and choose(x) == "cpu"
    )


def routed_ffn(
    x: Tensor,
    router_weight: Tensor,
    experts: Units,
    *,
    k: int,
    gate_function: str,
    router_bias: Tensor | None = None,
    mask: Tensor | None = None,
    groups: int = 1,
    dropout_mask: Tensor | None = None,
    activation: str = "relu",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What ``reference.routed_ffn`` computes: out, index, gate, softmax sums; arguments are trusted to fit.

    Shapes: x [T, D], router_weight [R, D], experts of keys [E, G, D] and values [E, G, O], router_bias fp32 [R]
    (ranking only), mask bool [T], True for real tokens, dropout_mask [T, K, G], a factor on the hidden units; results
    [T, O], int64 [T, K], fp32 [T, K], fp32 [groups, R]. A slot that selects a row of the router from E on is void.
    """
    operands = (x, router_weight, router_bias, mask, *experts, dropout_mask)
    found: tuple[Tensor, ...] = _op.forward(*operands, k, gate_function, groups, activation)
    return found[0], found[1], found[2], found[3]


def routed_ffn_inference(
    x: Tensor,
    router_weight: Tensor,
    router_bias: Tensor | None,
    experts: Units,
    k: int,
    gate_function: str,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """Output and index of ``routed_ffn``, without a gradient."""
    operands = (x, router_weight, router_bias, None, *experts, None)
    found: tuple[Tensor, Tensor] = _op.inference(*operands, k, gate_function, 1, activation)
    return found


def _shapes(x: Tensor, router: Router, experts: Units, *rest: Any) -> cpu.Routed:
    _, k, _, groups, _ = rest
    selected, gate = (x.new_empty(x.shape[0], k, dtype=dtype) for dtype in (torch.int64, torch.float32))
    out, saved = expert_ffn.shapes(x, experts, selected)
    sums = x.new_empty(groups, router.router_weight.shape[0], dtype=torch.float32)
    return cpu.Routed(out, selected, gate, sums, saved)


_op = Operator("routed_ffn", cpu, _shapes)

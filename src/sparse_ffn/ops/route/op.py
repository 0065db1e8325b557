"""Route: the operator. It has one backend; elsewhere a layer calls its router, which is the same function."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from sparse_ffn.backends.choice import choose
from sparse_ffn.ops.operator import Operator, wanted
from sparse_ffn.ops.route.backend import Backend, Routed, Router

# a program of the kernel has all scores of its tokens in registers, and in fp32 the operands of its products
MAX_ROWS = {torch.bfloat16: 512, torch.float32: 128}


def route_available(x: Tensor, router_weight: Tensor, router_bias: Tensor | None) -> bool:
    """Whether the op computes this input now: tokens in bf16 or fp32, a router of that dtype or of fp32, on Triton."""
    return (
        x.dtype in MAX_ROWS
        and router_weight.dtype in (x.dtype, torch.float32)
        and (router_bias is None or router_bias.dtype == torch.float32)
        and router_weight.shape[0] <= MAX_ROWS[x.dtype]
        and choose(x) == "triton"
    )


def route(
    x: Tensor,
    router_weight: Tensor,
    *,
    k: int,
    gate_function: str,
    router_bias: Tensor | None = None,
    mask: Tensor | None = None,
    groups: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """What ``reference.route`` computes: index, gate, softmax sums; arguments are trusted to fit.

    Shapes: x [T, D], router_weight [R, D], router_bias fp32 [R] (ranking only), mask bool [T], True for real tokens;
    results int64 [T, K], fp32 [T, K], fp32 [groups, R]. 0 groups: no sums are wanted.
    """
    operands = (x, router_weight, router_bias, mask, k, gate_function, groups, "triton")
    if groups or wanted(x, router_weight):
        gate, index, sums, _ = _op.forward(*operands)
        return index, gate, sums
    gate, index = _op.inference(*operands)
    return index, gate, gate.new_empty(0, router_weight.shape[0])


@functools.cache
def implementation(backend: str) -> Backend:
    """The backend, imported when it is first asked for."""
    from sparse_ffn.ops.route import triton

    return triton


def _shapes(x: Tensor, router: Router, k: int, gate_function: str, groups: int, backend: str) -> Routed:
    def wide(*shape: int) -> Tensor:
        return x.new_empty(shape, dtype=torch.float32)

    T, R = x.shape[0], router.router_weight.shape[0]
    return Routed(wide(T, k), x.new_empty(T, k, dtype=torch.int64), wide(groups, R), wide(T, R))


_op = Operator("route", Backend, _shapes, implementation=implementation)

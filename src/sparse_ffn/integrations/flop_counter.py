"""Teaches torch.utils.flop_counter the FLOPs of our ops, which it else counts as none: import it before counting.

A multiply-add is 2 FLOPs, as there. Activations, gates, norms and selections are not counted, nor are void slots told
from others: the index's contents are unknown. A backward pass counts its products: twice the forward pass's where both
operands want a gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula


def _count(formula: Callable[[Any], Any], *names: str) -> None:
    """Let a formula count ops: of their arguments by name, tensors as their shapes, and of ``result``'s."""
    for name in names:
        op = getattr(torch.ops.sparse_ffn, name)
        arguments = [argument.name for argument in op.default._schema.arguments]

        def count(*given: Any, out_shape: Any, arguments: list[str] = arguments, **others: Any) -> Any:
            by_name = {**dict(zip(arguments, given, strict=False)), **others}
            return formula(SimpleNamespace(**by_name, result=out_shape))

        register_flop_formula(op)(count)


def _units(n: int, a: Any) -> Any:
    """Of so many hidden units."""
    return 2 * n * (a.keys[-1] * (1 if a.gate_keys is None else 2) + a.values[-1])


def _router(a: Any) -> Any:
    return 2 * a.x[0] * prod(a.router_weight)


def _coded(a: Any) -> Any:
    """Of stacks of codes, whose shapes do not tell their columns."""
    columns = a.x[-1] * (1 if a.gate_keys is None else 2) + a.result[0][-1]
    return 2 * a.x[0] * a.k * a.keys[1] * columns


def _topk_ffn(a: Any) -> Any:
    if a.rank_by == "gate":  # the other keys of the selected units alone
        return 2 * a.x[0] * (prod(a.keys) + a.k * (a.keys[1] + a.values[1]))
    return 2 * a.x[0] * (prod(a.keys) * (1 if a.gate_keys is None else 2) + a.k * a.values[1])


_count(lambda a: _units(prod(a.index) * a.keys[1], a), "expert_ffn", "expert_ffn_inference")
_count(lambda a: (1 + a.needs_experts) * _units(prod(a.gate) * a.keys[1], a), "expert_ffn_backward")
_count(_router, "route", "route_inference")
_count(lambda a: 2 * _router(a), "route_backward")
_count(lambda a: _router(a) + _units(a.x[0] * a.k * a.keys[1], a), "routed_ffn", "routed_ffn_inference")
_count(lambda a: _router(a) + _coded(a), "quantized_ffn_inference")
_count(
    lambda a: 2 * _router(a) + (1 + a.needs_experts) * _units(prod(a.selected) * a.keys[1], a), "routed_ffn_backward"
)
_count(_topk_ffn, "topk_ffn", "topk_ffn_inference")
_count(lambda a: (1 + a.needs_units) * _units(prod(a.up), a), "topk_ffn_backward")
_count(lambda a: 2 * prod(a.index) * a.values[1], "weighted_bag")
_count(lambda a: (1 + a.needs_values) * 2 * prod(a.index) * a.values[1], "weighted_bag_backward")
_count(lambda a: 2 * prod(a.expert) * prod(a.weight[1:]), "cvmm")
_count(lambda a: (1 + a.needs_weight) * 2 * prod(a.expert) * prod(a.weight[1:]), "cvmm_backward")
_count(lambda a: 2 * prod(a.expert) * a.x[-1] * a.result[-1], "quantized_cvmm")
_count(lambda a: 2 * prod(a.expert) * a.x[-1] * a.grad[-1], "quantized_cvmm_backward")
_count(lambda a: 2 * prod(a.x) * a.w[-2], "wide_product", "normalised_product")
_count(lambda a: 4 * prod(a.x) * a.w[-2], "wide_product_backward", "normalised_product_backward")

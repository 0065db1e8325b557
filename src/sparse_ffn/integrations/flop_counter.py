"""Teaches torch.utils.flop_counter the FLOPs of our ops, which it else counts as none: import it before counting.

A multiply-add is 2 FLOPs, as there. Activations, gates, norms and selections are not counted, nor are void slots told
from others: the index's contents are unknown. A backward pass counts its products: twice the forward pass's where both
operands want a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

Formula = Callable[..., int]
Shape = Sequence[int]
_ops = torch.ops.sparse_ffn


def _formula(*ops: Any) -> Callable[[Formula], Formula]:
    return register_flop_formula(list(ops))


def _units(n: int, keys: Shape, values: Shape, gate_keys: Shape | None) -> int:
    """Of so many hidden units."""
    return 2 * n * (keys[-1] * (1 if gate_keys is None else 2) + values[-1])


@_formula(_ops.expert_ffn, _ops.expert_ffn_inference)
def _expert_ffn(
    x: Shape, keys: Shape, values: Shape, gate_keys: Any, key_bias: Any, index: Shape, *_: Any, **__: Any
) -> int:
    return _units(prod(index) * keys[1], keys, values, gate_keys)


@_formula(_ops.expert_ffn_backward)
def _expert_ffn_backward(
    grad: Shape, x: Shape, keys: Shape, values: Shape, gate_keys: Any, key_bias: Any, gate: Shape, dropout_mask: Any,
    order: Shape, offsets: Shape, up: Shape, glu_gate: Any, needs_experts: bool, *_: Any, **__: Any
) -> int:  # fmt: skip
    return (1 + needs_experts) * _units(prod(gate) * keys[1], keys, values, gate_keys)


@_formula(_ops.route, _ops.route_inference)
def _route(x: Shape, router_weight: Shape, *_: Any, **__: Any) -> int:
    return 2 * x[0] * prod(router_weight)


@_formula(_ops.route_backward)
def _route_backward(grad: Any, grad_sums: Any, x: Shape, router_weight: Shape, *_: Any, **__: Any) -> int:
    return 4 * x[0] * prod(router_weight)


@_formula(_ops.routed_ffn, _ops.routed_ffn_inference)
def _routed_ffn(
    x: Shape, router_weight: Shape, router_bias: Any, mask: Any, keys: Shape, values: Shape, gate_keys: Any,
    key_bias: Any, dropout_mask: Any, k: int, *_: Any, **__: Any
) -> int:  # fmt: skip
    return 2 * x[0] * prod(router_weight) + _units(x[0] * k * keys[1], keys, values, gate_keys)


@_formula(_ops.routed_ffn_backward)
def _routed_ffn_backward(
    grad: Any, grad_gate: Any, grad_sums: Any, x: Shape, router_weight: Shape, mask: Any, keys: Shape, values: Shape,
    gate_keys: Any, key_bias: Any, dropout_mask: Any, selected: Shape, gate: Shape, order: Shape, offsets: Shape,
    up: Shape, glu_gate: Any, needs_experts: bool, *_: Any, **__: Any
) -> int:  # fmt: skip
    experts = (1 + needs_experts) * _units(prod(selected) * keys[1], keys, values, gate_keys)
    return 4 * x[0] * prod(router_weight) + experts


@_formula(_ops.topk_ffn, _ops.topk_ffn_inference)
def _topk_ffn(
    x: Shape, keys: Shape, values: Shape, gate_keys: Any, key_bias: Any, k: int, dropout_mask: Any, activation: str,
    norm_aware: bool, rank_by: str, *_: Any, **__: Any
) -> int:  # fmt: skip
    if rank_by == "gate":  # the other keys of the selected units alone
        return 2 * x[0] * (prod(keys) + k * (keys[1] + values[1]))
    return 2 * x[0] * (prod(keys) * (1 if gate_keys is None else 2) + k * values[1])


@_formula(_ops.topk_ffn_backward)
def _topk_ffn_backward(
    grad: Shape, x: Shape, keys: Shape, values: Shape, gate_keys: Any, key_bias: Any, dropout_mask: Any,
    selected: Shape, up: Shape, glu_gate: Any, needs_units: bool, *_: Any, **__: Any
) -> int:  # fmt: skip
    return (1 + needs_units) * _units(prod(up), keys, values, gate_keys)


@_formula(_ops.weighted_bag)
def _weighted_bag(values: Shape, index: Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(index) * values[1]


@_formula(_ops.weighted_bag_backward)
def _weighted_bag_backward(
    grad: Shape, values: Shape, index: Shape, weight: Shape, needs_values: bool, *_: Any, **__: Any
) -> int:
    return (1 + needs_values) * 2 * prod(index) * values[1]


@_formula(_ops.cvmm)
def _cvmm(x: Shape, weight: Shape, expert: Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(expert) * prod(weight[1:])


@_formula(_ops.cvmm_backward)
def _cvmm_backward(
    grad: Shape, x: Shape, weight: Shape, expert: Shape, gather: Any, scatter: Any, reduction: Any, needs_weight: bool,
    *_: Any, **__: Any
) -> int:  # fmt: skip
    return (1 + needs_weight) * 2 * prod(expert) * prod(weight[1:])


@_formula(_ops.quantized_cvmm)
def _quantized_cvmm(
    x: Shape, qdata: Shape, scale: Shape, zero_point: Any, expert: Shape, *_: Any, out_shape: Shape, **__: Any
) -> int:
    return 2 * prod(expert) * x[-1] * out_shape[-1]


@_formula(_ops.quantized_cvmm_backward)
def _quantized_cvmm_backward(
    grad: Shape, x: Shape, qdata: Shape, scale: Shape, zero_point: Any, expert: Shape, *_: Any, **__: Any
) -> int:
    return 2 * prod(expert) * x[-1] * grad[-1]


@_formula(_ops.wide_product, _ops.normalised_product)
def _wide_product(x: Shape, w: Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(x) * w[-2]


@_formula(_ops.wide_product_backward, _ops.normalised_product_backward)
def _wide_product_backward(grad: Shape, x: Shape, w: Shape, *_: Any, **__: Any) -> int:
    return 4 * prod(x) * w[-2]

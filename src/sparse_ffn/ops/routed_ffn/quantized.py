"""Routed FFN out of codes: what ``routed_ffn`` computes for inference, where the experts' rows are quantised."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_ffn.backends import cpu
from sparse_ffn.backends.layout import contiguous, rows
from sparse_ffn.ops.codes import Codes
from sparse_ffn.ops.library import define
from sparse_ffn.ops.routed_ffn.op import routed_ffn_available
from sparse_ffn.ops.units import Units

ABSENT = (None, None, None)


def quantized_ffn_available(x: Tensor, router_weight: Tensor, router_bias: Tensor | None, experts: Units) -> bool:
    """Whether the op computes this input now: fp32 or bf16 throughout (a router's bias fp32), on the CPU core."""
    keys, values, gate_keys, key_bias = experts
    stacks: tuple[Any, ...] = (keys, values, gate_keys)
    scales = (None if codes is None else codes.scale for codes in stacks)  # of the dtype that the numbers have
    return routed_ffn_available(x, router_weight, router_bias, Units._make([*scales, key_bias]))


def quantized_ffn_inference(
    x: Tensor,
    router_weight: Tensor,
    router_bias: Tensor | None,
    experts: Units,
    k: int,
    gate_function: str,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """Output and index of ``routed_ffn`` with ``Codes`` in the place of the experts' matrices, without a gradient."""
    keys: Any = experts.keys
    values: Any = experts.values
    gate_keys: Any = experts.gate_keys
    stacks = (*keys, *values, *(ABSENT if gate_keys is None else gate_keys))
    found: tuple[Tensor, Tensor] = _op(
        x, router_weight, router_bias, *stacks, experts.key_bias, k, gate_function, activation
    )
    return found


def _inference(
    x: Tensor,
    router_weight: Tensor,
    router_bias: Tensor | None,
    keys: Tensor,
    keys_scale: Tensor,
    keys_zero: Tensor | None,
    values: Tensor,
    values_scale: Tensor,
    values_zero: Tensor | None,
    gate_keys: Tensor | None,
    gate_scale: Tensor | None,
    gate_zero: Tensor | None,
    key_bias: Tensor | None,
    k: int,
    gate_function: str,
    activation: str,
) -> tuple[Tensor, Tensor]:
    down = Codes(values, values_scale, values_zero).in_rows()
    gate = ABSENT if gate_keys is None or gate_scale is None else Codes(gate_keys, gate_scale, gate_zero).in_rows()
    out = cpu.empty(x.shape[0], down.shape[2], dtype=x.dtype)
    index = cpu.empty(x.shape[0], k, dtype=torch.int64)
    operands = (rows(x), *Codes(keys, keys_scale, keys_zero).in_rows(), *down, *gate, contiguous(key_bias))
    router = (contiguous(router_weight), contiguous(router_bias))
    options = (cpu.GATES[gate_function], cpu.ACTIVATIONS[activation])
    cpu.call("quantized_moe", (*operands, *router, out, index), *options)
    return out, index


def _fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    values, values_scale, k = rest[5], rest[6], rest[12]
    width = Codes(values, values_scale).shape[2]
    return x.new_empty(x.shape[0], width), x.new_empty(x.shape[0], k, dtype=torch.int64)


_op = define(
    "quantized_ffn_inference(Tensor x, Tensor router_weight, Tensor? router_bias, "
    "Tensor keys, Tensor keys_scale, Tensor? keys_zero, Tensor values, Tensor values_scale, Tensor? values_zero, "
    "Tensor? gate_keys, Tensor? gate_scale, Tensor? gate_zero, Tensor? key_bias, "
    "SymInt k, str gate_function, str activation) -> (Tensor, Tensor)",
    _inference,
    _fake,
)

"""The ops with hidden units as arguments of their own, so that a test can name, change and differentiate each."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sparse_ffn import ops
from sparse_ffn.ops import Units
from sparse_ffn.ops.routed_ffn import reference

Four = tuple[Tensor, Tensor, Tensor, Tensor]


def expert_ffn(x: Tensor, keys: Tensor, values: Tensor, index: Tensor, gate: Tensor,
               gate_keys: Tensor | None = None, key_bias: Tensor | None = None, **rest: Any) -> Tensor:  # fmt: skip
    return ops.expert_ffn(x, Units(keys, values, gate_keys, key_bias), index, gate, **rest)


def topk_ffn(x: Tensor, keys: Tensor, values: Tensor, k: int,
             gate_keys: Tensor | None = None, key_bias: Tensor | None = None, **rest: Any) -> Tensor:  # fmt: skip
    return ops.topk_ffn(x, Units(keys, values, gate_keys, key_bias), k, **rest)


def routed_ffn(x: Tensor, router_weight: Tensor, keys: Tensor, values: Tensor,
               gate_keys: Tensor | None = None, key_bias: Tensor | None = None, **rest: Any) -> Four:  # fmt: skip
    return ops.routed_ffn(x, router_weight, Units(keys, values, gate_keys, key_bias), **rest)


def routed_reference(x: Tensor, router_weight: Tensor, keys: Tensor, values: Tensor,
                     gate_keys: Tensor | None = None, key_bias: Tensor | None = None, **rest: Any) -> Four:  # fmt: skip
    absent = {"router_bias": None, "mask": None, "dropout_mask": None, "groups": 1, "activation": "relu"}
    return reference.routed_ffn(x, router_weight, experts=Units(keys, values, gate_keys, key_bias), **(absent | rest))

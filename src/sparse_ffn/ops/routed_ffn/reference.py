"""Routed FFN, the contract: the route, and the expert FFN."""

from __future__ import annotations

from torch import Tensor

from sparse_ffn.ops.expert_ffn import reference
from sparse_ffn.ops.route.reference import route
from sparse_ffn.ops.units import Units


def routed_ffn(
    x: Tensor,
    router_weight: Tensor,
    router_bias: Tensor | None,
    mask: Tensor | None,
    experts: Units,
    dropout_mask: Tensor | None,
    k: int,
    gate_function: str,
    groups: int,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output [T, O], and what ``route`` returns: index [T, K], gate [T, K], sums [groups, R].

    A router's rows beyond the E experts stand for none: their slots are void.
    """
    index, gate, sums = route(x, router_weight, router_bias, mask, k, gate_function, groups)
    out = reference.expert_ffn(x, experts, index, gate, dropout_mask, activation)
    return out, index, gate, sums

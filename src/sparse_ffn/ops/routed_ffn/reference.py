"""Routed FFN, the contract: a linear router, top-k, gates, and the expert FFN."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_ffn.ops.expert_ffn import reference
from sparse_ffn.ops.select import stable_topk
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
    """Output [T, O], index [T, K], gate [T, K], and per group of T / groups tokens the sum [groups, R] of softmaxes.

    score = router_weight x; index ranks score + router_bias; gate is the named function of the scores; tokens whose
    mask is False take no part in the sums. A router's rows beyond the E experts stand for none: their slots are void.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    score = F.linear(x.to(wide), router_weight.to(wide))
    ranked = score.detach() if router_bias is None else score.detach() + router_bias
    index = stable_topk(ranked, k)
    gate = GATES[gate_function](score, index)
    softmax = torch.softmax(score, dim=1)
    if mask is not None:
        softmax = softmax.masked_fill(~mask.unsqueeze(1), 0)
    sums = softmax.view(groups, -1, softmax.shape[1]).sum(1)
    out = reference.expert_ffn(x, experts, index, gate, dropout_mask, activation)
    return out, index, gate, sums


GATES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sigmoid": lambda score, index: torch.sigmoid(score).gather(1, index),
    "softmax": lambda score, index: torch.softmax(score, dim=1).gather(1, index),
    "softmax_topk": lambda score, index: torch.softmax(score.gather(1, index), dim=1),
    "unweighted": lambda score, index: 1 + 0 * score.gather(1, index),
}

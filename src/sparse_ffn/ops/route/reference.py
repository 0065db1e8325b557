"""Route, the contract: a linear router, top-k, gates, and the sums that balance losses need."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_ffn.ops.select import stable_topk


def route(
    x: Tensor,
    router_weight: Tensor,
    router_bias: Tensor | None,
    mask: Tensor | None,
    k: int,
    gate_function: str,
    groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Index [T, K], gate [T, K], and per group of T / groups tokens the sum [groups, R] of softmaxes.

    score = router_weight x; index ranks score + router_bias; gate is the named function of the scores; tokens whose
    mask is False take no part in the sums.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    score = F.linear(x.to(wide), router_weight.to(wide))
    ranked = score.detach() if router_bias is None else score.detach() + router_bias
    index = stable_topk(ranked, k)
    softmax = torch.softmax(score, dim=1)
    if mask is not None:
        softmax = softmax.masked_fill(~mask.unsqueeze(1), 0)
    sums = softmax.view(groups, -1, softmax.shape[1]).sum(1)
    return index, GATES[gate_function](score, index), sums


GATES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sigmoid": lambda score, index: torch.sigmoid(score).gather(1, index),
    "softmax": lambda score, index: torch.softmax(score, dim=1).gather(1, index),
    "softmax_topk": lambda score, index: torch.softmax(score.gather(1, index), dim=1),
    "unweighted": lambda score, index: 1 + 0 * score.gather(1, index),
}

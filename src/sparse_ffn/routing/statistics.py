"""What a router did: load per expert, its entropy, busiest and dead share, co-activation."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def slot_counts(index_TK: Tensor, mask_T: Tensor | None, n_experts: int) -> Tensor:
    """Slots of real tokens that went to each expert: int64 [E]. Does not wait for the device."""
    slots_TK = torch.ones_like(index_TK)
    if mask_T is not None:
        slots_TK = slots_TK * mask_T.unsqueeze(1)
    counts = slots_TK.new_zeros(n_experts + 1)  # the last counts slots without an expert
    return counts.scatter_add(0, index_TK.flatten(), slots_TK.flatten())[:-1]


def summary(every: Tensor, null_experts: int = 0) -> dict[str, Any]:
    """Of the slots of each expert, null ones last: entropy of the load over log E, busiest and dead share, the load.

    Returns:
        ``entropy`` in [0, 1] (1 is balance), ``busiest`` in [1/E, 1] (share of the slots), ``dead`` in [0, 1) (share of
        the experts without a slot), ``load``: CPU fp32 [E] of shares summing to 1. Without a slot all are 0. Null
        experts have no part in these; where there are any, ``null`` in [0, 1] is their share of all slots.
    """
    every = every.to("cpu", torch.float64)
    counts = every[: len(every) - null_experts]
    null = {"null": (1 - counts.sum() / every.sum()).item() if every.sum() else 0.0} if null_experts else {}
    load = counts / counts.sum().clamp_min(1)
    if not counts.sum():
        return {"entropy": 0.0, "busiest": 0.0, "dead": 0.0, "load": load.float(), **null}
    entropy, n_experts = -torch.special.xlogy(load, load).sum().item(), len(counts)
    return {
        "entropy": entropy / math.log(n_experts) if n_experts > 1 else 1.0,
        "busiest": load.max().item(),
        "dead": (counts == 0).double().mean().item(),
        "load": load.float(),
        **null,
    }


def coactivation(index_TK: Tensor, mask_T: Tensor | None, n_experts: int) -> Tensor:
    """Share of the tokens using expert i that use expert j too: CPU fp32 [E, E], diagonal 1 (0 for a dead expert)."""
    if mask_T is not None:
        index_TK = index_TK[mask_T]
    used_TE = torch.zeros(index_TK.shape[0], n_experts + 1, device=index_TK.device, dtype=torch.float32)
    used_TE = used_TE.scatter_(1, index_TK, 1.0)[:, :-1]
    together_EE = used_TE.t() @ used_TE
    return (together_EE / together_EE.diagonal().unsqueeze(1).clamp_min(1)).cpu()

"""The stable sort of slots by expert (or by any group) out of torch's own ops; no host wait."""

from __future__ import annotations

import torch
from torch import Tensor


def sort_by_expert(expert: Tensor, n_experts: int) -> tuple[Tensor, Tensor]:
    """Stable order of the slots by expert.

    Args:
        expert: int [S], the expert of each slot; a number outside [0, E) is none.
        n_experts: E.

    Returns:
        order: int32 [S], the slot at each sorted position; offsets: int32 [E + 1], where each expert's slots begin, and
        where those without one do.
    """
    ranked, order = torch.sort(torch.where(expert < 0, n_experts, expert), stable=True)
    bounds = torch.arange(n_experts + 1, device=expert.device, dtype=ranked.dtype)
    return order.to(torch.int32), torch.searchsorted(ranked, bounds, out_int32=True)

"""Sinkhorn normalisation of routing logits over the batch, in the log domain."""

from __future__ import annotations

import math

import torch
from torch import Tensor


@torch.no_grad()
def sinkhorn_potential(logits_TE: Tensor, n_iters: int, mask_T: Tensor | None = None) -> Tensor:
    """The experts' log-potentials [E] after n_iters iterations: exp(logits + row + column) tends to balance.

    Each iteration makes every token's row sum to 1, then every expert's column to N/E (N real tokens), so that it ends
    with exactly equal columns. The potentials are zero where nothing can be balanced: with fewer than two real tokens,
    and with a NaN among the logits, which then shows in the ranking.
    """
    n_experts = logits_TE.shape[1]
    column_E = logits_TE.new_zeros(n_experts)
    real_T1 = torch.ones_like(logits_TE[:, :1], dtype=torch.bool) if mask_T is None else mask_T.unsqueeze(1)
    count = real_T1.sum()
    target = count.to(logits_TE.dtype).clamp_min(1).log() - math.log(n_experts)
    for _ in range(n_iters):
        row_T1 = -torch.logsumexp(logits_TE + column_E, dim=1, keepdim=True)
        balanced_TE = (logits_TE + row_T1).masked_fill(~real_T1, -torch.inf)
        column_E = target - torch.logsumexp(balanced_TE, dim=0)
    return torch.where((count > 1) & ~column_E.isnan(), column_E, 0.0)

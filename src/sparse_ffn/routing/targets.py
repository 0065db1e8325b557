"""Targets: the load that is wished on each expert, where it is not the same for all."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Targets(NamedTuple):
    """The shares of the slots that are wished on a router's experts, where they are not equal."""

    runs: tuple[tuple[int, float], ...]
    """Experts that follow each other, and the share wished on each of them; all shares sum to 1."""
    null_experts: int
    """The last ones, which have no hidden units."""

    def times_experts(self, like: Tensor) -> Tensor:
        """E times the share that is wished on each expert: [E]."""
        every = sum(experts for experts, _ in self.runs)
        return torch.cat([like.new_full((experts,), every * share) for experts, share in self.runs])

    def own(self, x_E: Tensor) -> Tensor:
        """Of numbers [..., E] those of the experts that have hidden units."""
        return x_E[..., : x_E.shape[-1] - self.null_experts]

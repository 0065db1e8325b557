"""Copies of a token's row for those that compute with it, and their sum: each is the other's gradient."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Copies(NamedTuple):
    """Where the copies of each token's row are. T tokens, P copies in all, M at most of a token."""

    source_P: Tensor
    """The token of each copy; int64."""
    place_TM: Tensor
    """A token's copies, int64; where there is none, that of another of its copies."""
    real_TM: Tensor
    """Whether there is one; bool."""


def spread(x_TN: Tensor, copies: Copies) -> Tensor:
    """A row for each copy: [P, N]."""
    rows: Tensor = _Spread.apply(x_TN, copies)  # type: ignore[no-untyped-call]
    return rows


def collect(x_PN: Tensor, copies: Copies) -> Tensor:
    """The sum of the rows of each token's copies, always in the same order: [T, N]."""
    total: Tensor = _Collect.apply(x_PN, copies)  # type: ignore[no-untyped-call]
    return total


def _sum(x_PN: Tensor, copies: Copies) -> Tensor:
    """Copy by copy: the atomics of index_add would add them in any order on a GPU."""
    total_TN = x_PN.new_zeros(len(copies.place_TM), x_PN.shape[1])
    for place_T, real_T in zip(copies.place_TM.unbind(1), copies.real_TM.unbind(1), strict=True):
        total_TN = total_TN + torch.where(real_T.unsqueeze(1), x_PN.index_select(0, place_T), 0)
    return total_TN


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TN: Tensor, copies: Copies) -> Tensor:
        ctx.save_for_backward(*copies)
        return x_TN.index_select(0, copies.source_P)

    @staticmethod
    def backward(ctx: Any, grad_PN: Tensor) -> tuple[Tensor, None]:
        return _sum(grad_PN, Copies(*ctx.saved_tensors)), None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_PN: Tensor, copies: Copies) -> Tensor:
        ctx.save_for_backward(*copies)
        return _sum(x_PN, copies)

    @staticmethod
    def backward(ctx: Any, grad_TN: Tensor) -> tuple[Tensor, None]:
        return grad_TN.index_select(0, ctx.saved_tensors[0]), None

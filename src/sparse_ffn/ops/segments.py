"""Rows grouped by expert with torch's own ops: per-expert products, deterministic sums of rows."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def segment_mm(rows: Tensor, weight: Tensor, bounds: list[int]) -> Tensor:
    """rows[a:b] @ weight[e] for each expert's segment: [S, M] x [E, M, N] -> [S, N]."""
    out = rows.new_empty(rows.shape[0], weight.shape[2])
    for e, (a, b) in enumerate(pairwise(bounds)):
        if b > a:
            torch.mm(rows[a:b], weight[e], out=out[a:b])
    return out


def segment_outer(left: Tensor, right: Tensor, bounds: list[int]) -> Tensor:
    """left[a:b].T @ right[a:b] for each expert's segment: [S, M] x [S, N] -> [E, M, N], zero where it is empty."""
    out = left.new_empty(len(bounds) - 1, left.shape[1], right.shape[1])
    for e, (a, b) in enumerate(pairwise(bounds)):
        if b > a:
            torch.mm(left[a:b].t(), right[a:b], out=out[e])
        else:
            out[e].zero_()
    return out


def segment_sum(rows: Tensor, bounds: list[int]) -> Tensor:
    """Sum of the rows of each expert's segment: [S, N] -> [E, N]."""
    out = rows.new_zeros(len(bounds) - 1, rows.shape[1])
    for e, (a, b) in enumerate(pairwise(bounds)):
        if b > a:
            torch.sum(rows[a:b], dim=0, out=out[e])
    return out


def is_transposed(weight: Tensor) -> bool:
    """Whether a stack of matrices [E, M, L] is a transposed view; its gradient is then one too.

    Gradients that are laid out as their parameter need no copy where autograd accumulates them.
    """
    return weight.stride(1) == 1 and weight.stride(2) != 1


def unsort(rows: Tensor, order: Tensor, n: int) -> Tensor:
    """Bring rows in sorted order back to the order of n slots: result[order[s]] = rows[s], and 0 for void slots."""
    if len(order) < n:
        return rows.new_zeros(n, rows.shape[1]).index_copy_(0, order.long(), rows)
    position = torch.empty_like(order)
    position[order.long()] = torch.arange(order.shape[0], device=order.device, dtype=order.dtype)
    return rows.index_select(0, position)  # reading rows in a new order is faster than writing them


def add_rows(n: int, index: Tensor, rows: Tensor) -> Tensor:
    """Result[index[s]] += rows[s] from zeros [n, N], in a fixed order on every device."""
    out = rows.new_zeros(n, rows.shape[1])
    if rows.device.type == "cpu":
        return out.index_add_(0, index, rows)
    return out.index_put_((index.long(),), rows, accumulate=True)  # sorts; index_add_ would use float atomics

"""Rows grouped by expert with torch's own ops: per-expert products, deterministic sums of rows."""

from __future__ import annotations

import functools
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F


class Segments:
    """Where each expert's rows begin: ``offsets``, int32 [E + 1]; the host learns it when it first asks, and waits.

    Rows behind all segments are those of void slots: products of theirs are zero.
    """

    def __init__(self, offsets: Tensor) -> None:
        self.offsets = offsets

    @functools.cached_property
    def bounds(self) -> list[int]:
        return self.offsets.tolist()

    def clear(self, rows: Tensor) -> Tensor:
        """The rows, those of void slots zero, in place."""
        if "bounds" in self.__dict__:
            rows[self.bounds[-1] :].zero_()
            return rows
        position = torch.arange(rows.shape[0], device=rows.device)
        return rows.masked_fill_((position >= self.offsets[-1]).unsqueeze(1), 0)


def segment_mm(rows: Tensor, weight: Tensor, segments: Segments) -> Tensor:
    """rows[a:b] @ weight[e] for each expert's segment: [S, M] x [E, M, N] -> [S, N]."""
    if use_grouped_mm(rows, weight):
        return segments.clear(F.grouped_mm(rows, weight, offs=segments.offsets[1:]))
    out = rows.new_empty(rows.shape[0], weight.shape[2])
    for e, (a, b) in enumerate(pairwise(segments.bounds)):
        if b > a:
            torch.mm(rows[a:b], weight[e], out=out[a:b])
    return segments.clear(out)


def segment_outer(left: Tensor, right: Tensor, segments: Segments) -> Tensor:
    """left[a:b].T @ right[a:b] for each expert's segment: [S, M] x [S, N] -> [E, M, N], zero where it is empty."""
    if use_grouped_mm(left, right):
        product = F.grouped_mm(left.t(), right, offs=segments.offsets[1:])
        # of an expert without rows it may hold anything on compute capability 10 (pytorch issue 172439)
        return product.masked_fill_((segments.offsets.diff() == 0)[:, None, None], 0)
    out = left.new_empty(segments.offsets.shape[0] - 1, left.shape[1], right.shape[1])
    for e, (a, b) in enumerate(pairwise(segments.bounds)):
        if b > a:
            torch.mm(left[a:b].t(), right[a:b], out=out[e])
        else:
            out[e].zero_()
    return out


def use_grouped_mm(*operands: Tensor) -> bool:
    """Whether torch has one kernel for the products of all experts, and the operands lie as it wants them.

    The kernel is for bf16 on NVIDIA's compute capabilities 9 and 10. Elsewhere torch has a loop like the one here: on a
    CPU with AVX-512 it took between 0.75 and 1.2 times as long (16 and 64 experts, 64 to 4096 rows).
    """
    first = operands[0]
    if first.dtype != torch.bfloat16 or not hasattr(F, "grouped_mm") or not has_grouped_kernel(first.device):
        return False
    return all(t.numel() > 0 and _is_aligned(t) for t in operands)


@functools.cache
def has_grouped_kernel(device: torch.device) -> bool:
    """Whether ``F.grouped_mm`` is one kernel on a device."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device)[0] in (9, 10)


def _is_aligned(t: Tensor) -> bool:
    """Whether one of the last two strides is 1, and what else the kernel steps by is a multiple of 16 bytes."""
    *batch, row, column = t.stride()
    steps = (*batch, row if column == 1 else column)
    return 1 in (row, column) and t.data_ptr() % 16 == 0 and all(n * t.element_size() % 16 == 0 for n in steps)


def segment_sum(rows: Tensor, segments: Segments) -> Tensor:
    """Sum of the rows of each expert's segment: [S, N] -> [E, N]."""
    out = rows.new_zeros(segments.offsets.shape[0] - 1, rows.shape[1])
    for e, (a, b) in enumerate(pairwise(segments.bounds)):
        if b > a:
            torch.sum(rows[a:b], dim=0, out=out[e])
    return out


def row_dots(rows: Tensor, others: Tensor, dtype: torch.dtype) -> Tensor:
    """Each row's dot product with the other, [S, 1] in ``dtype``; multiplied and added in the wider of both dtypes."""
    wide = torch.promote_types(rows.dtype, dtype)
    return (rows.to(wide) * others).sum(1, keepdim=True).to(dtype)


def is_transposed(weight: Tensor) -> bool:
    """Whether a stack of matrices [E, M, L] is a transposed view; its gradient is then one too.

    Gradients that are laid out as their parameter need no copy where autograd accumulates them.
    """
    return weight.stride(1) == 1 and weight.stride(2) != 1


def unsort(rows: Tensor, order: Tensor) -> Tensor:
    """Bring rows in sorted order back to slot order: result[order[s]] = rows[s]."""
    position = torch.empty_like(order)
    position[order.long()] = torch.arange(order.shape[0], device=order.device, dtype=order.dtype)
    return rows.index_select(0, position)  # reading rows in a new order is faster than writing them


def add_rows(n: int, index: Tensor, rows: Tensor) -> Tensor:
    """result[index[s]] += rows[s] from zeros [n, N], in a fixed order on every device."""
    out = rows.new_zeros(n, rows.shape[1])
    if rows.device.type == "cpu":
        return out.index_add_(0, index, rows)
    return out.index_put_((index.long(),), rows, accumulate=True)  # sorts; index_add_ would use float atomics

"""Slots grouped by the row of a table that they name, hot rows in several segments; plain torch, no host wait.

The table may have millions of rows, so the sort is torch's own stable radix sort and nothing here is per (row, block).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_ffn.backends.sort import sort_by_expert


@dataclass(frozen=True)
class Segments:
    """Which program sums which slots; everything int32 on the device, all sizes known without a look at it.

    Row r's slots are ``order[begins[r] : ends[r]]``, in ascending order, cut into segments of ``cap``; a row without
    slots has one segment, an empty one. Segment i is row ``row[i]``'s (the number of rows: idle), and row r's first
    segment is ``first[r]``. A row with several segments puts their sums at ``part[r]`` and on in a buffer of
    ``n_parts``; these rows are listed in ``hot`` (the number of rows: idle).
    """

    order: Tensor
    begins: Tensor
    ends: Tensor
    first: Tensor
    row: Tensor
    part: Tensor
    hot: Tensor
    cap: int

    @property
    def n_rows(self) -> int:
        """Rows that get a sum."""
        return self.begins.shape[0]

    @property
    def n_parts(self) -> int:
        """An upper bound: a row of s > cap slots has fewer than 2·s/cap segments."""
        return 2 * (self.order.shape[0] // self.cap)


def every_row(index: Tensor, n_rows: int, cap: int) -> Segments:
    """The segments of all rows of a table, those that no slot names included. Shape: index int [...]."""
    return of_sorted(*_sort(index, n_rows), cap)


def of_sorted(order: Tensor, offsets: Tensor, cap: int) -> Segments:
    """The segments of all rows, from slots that are in order already."""
    return _cut(order, offsets[:-1], offsets[1:], cap)


def named_rows(index: Tensor, n_rows: int, cap: int) -> tuple[Segments, Tensor]:
    """The segments of the rows that some slot names, and these rows, int64 ascending.

    How many there are only the device knows: this waits for it, once.
    """
    order, offsets = _sort(index, n_rows)
    named = offsets.diff().nonzero().squeeze(1)
    return _cut(order, offsets[:-1][named], offsets[1:][named], cap), named


def _sort(index: Tensor, n_rows: int) -> tuple[Tensor, Tensor]:
    if index.numel() >= 1 << 30 or n_rows >= 1 << 30:
        raise ValueError(f"fewer than 2**30 slots and rows are possible, got {index.numel()} and {n_rows}")
    index = index.flatten().clamp(-1, n_rows)  # what is in no row must not become one by the cast
    return sort_by_expert(index.to(torch.int32), n_rows)  # 32-bit keys take half the passes of 64


def _cut(order: Tensor, begins: Tensor, ends: Tensor, cap: int) -> Segments:
    S, R = order.shape[0], begins.shape[0]
    n_segments = ((ends - begins + (cap - 1)) // cap).clamp(min=1)
    several = n_segments > 1
    last, last_part, rank = (n.cumsum(0, dtype=torch.int32) for n in (n_segments, n_segments * several, several))
    segment = torch.arange(R + S // cap, dtype=torch.int32, device=order.device)
    nth_hot = torch.arange(1, S // (cap + 1) + 1, dtype=torch.int32, device=order.device)
    row = torch.searchsorted(last, segment, right=True, out_int32=True)
    hot = torch.searchsorted(rank, nth_hot, out_int32=True)
    return Segments(order, begins, ends, last - n_segments.int(), row, last_part - n_segments.int(), hot, cap)

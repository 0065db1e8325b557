"""Weighted bag: sums of gathered rows; and their gradient, each row of the table read and written once.

N bags, K slots a bag, S = N·K, R rows of the table, O columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_ffn.backends.triton.config import BAG
from sparse_ffn.backends.triton.launch import OF_TOKENS, cdiv, launch, power_of_two
from sparse_ffn.backends.triton.segments import Segments


@triton.jit
def bag_kernel(
    values, index, weight, out, K, R, O, stride_values,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A block of columns of one bag: out[n] = sum over j of weight[n, j] · values[index[n, j]]."""
    n_blocks = tl.cdiv(O, COLUMNS)
    first = (tl.program_id(0) // n_blocks).to(tl.int64) * K
    o = (tl.program_id(0) % n_blocks) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, K, ROWS):
        j = start + tl.arange(0, ROWS)
        row = tl.load(index + first + j, mask=j < K, other=-1).to(tl.int64)
        ok = (row >= 0) & (row < R)  # nothing checks indices on a GPU: never read outside of the table
        factor = tl.load(weight + first + j, mask=ok, other=0.0).to(tl.float32)
        at = values + row[:, None] * stride_values + o[None, :]
        total += tl.load(at, mask=ok[:, None] & (o < O)[None, :], other=0.0).to(tl.float32) * factor[:, None]
    at = out + (tl.program_id(0) // n_blocks).to(tl.int64) * O + o
    tl.store(at, tl.sum(total, 0).to(out.dtype.element_ty), mask=o < O)


@triton.jit(do_not_specialize=OF_TOKENS)
def bag_gradient_kernel(
    grad, weight, values, named, out, parts, dots, order, begins, ends, segment_row, segment_first, row_part,
    S, K, n_rows, O, stride_grad, stride_values,
    DOT: tl.constexpr, NAMED: tl.constexpr, CAP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One segment's sum of weight · grad, and for each of its slots the part of grad · value in these columns."""
    n_blocks = tl.cdiv(O, COLUMNS)
    segment = tl.program_id(0) // n_blocks
    block = tl.program_id(0) % n_blocks
    o = block * COLUMNS + tl.arange(0, COLUMNS)
    o_ok = o < O
    r = tl.load(segment_row + segment)
    if r >= n_rows:
        return
    nth = segment - tl.load(segment_first + r)
    row_begin, row_end = tl.load(begins + r), tl.load(ends + r)
    begin = row_begin + nth * CAP
    end = tl.minimum(row_end, begin + CAP)
    if DOT:
        row = (tl.load(named + r) if NAMED else r).to(tl.int64)
        used = tl.where(begin < end, O, 0)  # an empty segment reads nothing
        value = tl.load(values + row * stride_values + o, mask=o < used, other=0.0).to(tl.float32)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(begin, end, ROWS):
        p = start + tl.arange(0, ROWS)
        ok = p < end
        slot = tl.load(order + p, mask=ok, other=0)
        factor = tl.load(weight + slot, mask=ok, other=0.0).to(tl.float32)
        at = grad + (slot // K).to(tl.int64)[:, None] * stride_grad + o[None, :]
        tile = tl.load(at, mask=ok[:, None] & o_ok[None, :], other=0.0).to(tl.float32)
        total += tile * factor[:, None]
        if DOT:
            dot = tl.sum(tile * value[None, :], 1)
            tl.store(dots + block.to(tl.int64) * S + slot, dot, mask=ok)
    sum_ = tl.sum(total, 0)
    if row_end - row_begin > CAP:
        part = (tl.load(row_part + r) + nth).to(tl.int64)
        tl.store(parts + part * O + o, sum_, mask=o_ok)
    else:
        tl.store(out + r.to(tl.int64) * O + o, sum_.to(out.dtype.element_ty), mask=o_ok)


@triton.jit
def dot_products_kernel(
    x, values, index, dots, K, R, O, stride_x, stride_values,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A block of slots of one bag: dots[n, j] = x[n] · values[index[n, j]]."""
    n_blocks = tl.cdiv(K, ROWS)
    n = (tl.program_id(0) // n_blocks).to(tl.int64)
    j = (tl.program_id(0) % n_blocks) * ROWS + tl.arange(0, ROWS)
    row = tl.load(index + n * K + j, mask=j < K, other=-1).to(tl.int64)
    ok = (row >= 0) & (row < R)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, O, COLUMNS):
        o = start + tl.arange(0, COLUMNS)
        factor = tl.load(x + n * stride_x + o, mask=o < O, other=0.0).to(tl.float32)
        at = values + row[:, None] * stride_values + o[None, :]
        total += tl.load(at, mask=ok[:, None] & (o < O)[None, :], other=0.0).to(tl.float32) * factor[None, :]
    # of a row that is not there not even 0 · NaN
    tl.store(dots + n * K + j, tl.where(ok, tl.sum(total, 1), 0.0), mask=j < K)


@triton.jit(do_not_specialize=OF_TOKENS)
def hot_rows_kernel(
    parts, out, hot, begins, ends, row_part, n_rows, O, CAP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """out[r] = the sum of row r's parts in a fixed order, for the rows that have several."""
    n_blocks = tl.cdiv(O, COLUMNS)
    o = (tl.program_id(0) % n_blocks) * COLUMNS + tl.arange(0, COLUMNS)
    r = tl.load(hot + tl.program_id(0) // n_blocks)
    if r >= n_rows:
        return
    begin = tl.load(row_part + r).to(tl.int64)
    n_parts = tl.cdiv(tl.load(ends + r) - tl.load(begins + r), CAP)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, n_parts, ROWS):
        i = start + tl.arange(0, ROWS)
        at = parts + (begin + i)[:, None] * O + o[None, :]
        total += tl.load(at, mask=(i < n_parts)[:, None] & (o < O)[None, :], other=0.0)
    tl.store(out + r.to(tl.int64) * O + o, tl.sum(total, 0).to(out.dtype.element_ty), mask=o < O)


def bag(values: Tensor, index: Tensor, weight: Tensor, out: Tensor) -> None:
    """out[n] = sum over j of weight[n, j] · values[index[n, j]].

    Shapes: values [R, O] with unit stride in its rows, index int [N, K] and weight [N, K] contiguous, out [N, O]
    contiguous. An index outside of [0, R) adds nothing.
    """
    (N, K), (R, O) = index.shape, values.shape
    columns = _columns(O)
    launch(
        bag_kernel, N * cdiv(O, columns), values, index, weight, out, K, R, O, values.stride(0),
        ROWS=BAG.rows, COLUMNS=columns,
    )  # fmt: skip


def dot_products(x: Tensor, values: Tensor, index: Tensor) -> Tensor:
    """x[n] · values[index[n, j]] as fp32 [N, K]: what a bag's weights have as their gradient; 0 where no row is named.

    Shapes: x [N, O] and values [R, O] with unit stride in their rows, index int [N, K] contiguous.
    """
    (N, K), (R, O) = index.shape, values.shape
    dots = x.new_empty(N, K, dtype=torch.float32)
    launch(
        dot_products_kernel, N * cdiv(K, BAG.rows), x, values, index, dots, K, R, O, x.stride(0), values.stride(0),
        ROWS=BAG.rows, COLUMNS=_columns(O),
    )  # fmt: skip
    return dots


def bag_gradient(
    segments: Segments,
    grad: Tensor,
    weight: Tensor,
    out: Tensor,
    values: Tensor | None = None,
    named: Tensor | None = None,
) -> Tensor | None:
    """Sums of weight[n, j] · grad[n] over the slots of each row; with ``values`` also grad[n] · value of each slot.

    Args:
        segments: the slots of each row.
        grad: [N, O], unit stride in its rows.
        weight: [N, K], contiguous.
        out: [segments.n_rows, O], contiguous: zero where a row has no slot.
        values: [*, O], unit stride in its rows.
        named: which row of values each row of the segments is; None: the same.

    Returns:
        fp32 [N, K], if there are values; 0 for a slot that is in no row.
    """
    K, O, R = weight.shape[1], grad.shape[1], segments.n_rows
    S, columns = segments.order.shape[0], _columns(O)
    n_blocks = cdiv(O, columns)
    parts = out.new_empty(segments.n_parts, O, dtype=torch.float32)
    # a slot in no row keeps 0
    dots = None if values is None else out.new_zeros(n_blocks, S, dtype=torch.float32)
    launch(
        bag_gradient_kernel, segments.row.shape[0] * n_blocks, grad, weight, values, named, out, parts, dots,
        segments.order, segments.begins, segments.ends, segments.row, segments.first, segments.part,
        S, K, R, O, grad.stride(0), 0 if values is None else values.stride(0),
        DOT=values is not None, NAMED=named is not None, CAP=segments.cap, ROWS=BAG.rows, COLUMNS=columns,
    )  # fmt: skip
    launch(
        hot_rows_kernel, segments.hot.shape[0] * n_blocks, parts, out, segments.hot, segments.begins, segments.ends,
        segments.part, R, O, CAP=segments.cap, ROWS=BAG.rows, COLUMNS=columns,
    )  # fmt: skip
    return None if dots is None else (dots[0] if n_blocks == 1 else dots.sum(0)).view(weight.shape)


def _columns(n: int) -> int:
    """Columns of a program: no more than there are."""
    return min(BAG.columns, max(power_of_two(n), 16))

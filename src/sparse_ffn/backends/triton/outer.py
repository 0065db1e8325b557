"""Gradients of the experts' matrices: for each expert the product of two stacks of its rows, over a ragged range.

Where there are too few (expert, tile) pairs to fill the device, each range is split into parts that are summed in
order by a second kernel: no atomics, so that the result never depends on timing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_ffn.backends.triton import combine
from sparse_ffn.backends.triton.config import Tile, n_processors
from sparse_ffn.backends.triton.launch import OF_TOKENS, cdiv, launch

MAX_PARTS, ROWS_OF_A_PART, SUM_BLOCK_S, SUM_BLOCK_N = 16, 256, 64, 64


@triton.jit(do_not_specialize=OF_TOKENS)
def outer_kernel(
    left, left2, left_rows, right, right_rows, scale, order, offsets, out, out2,
    M, N, E, n_parts, stride_left, stride_left2, stride_right,
    LEFT: tl.constexpr, SECOND: tl.constexpr, RIGHT: tl.constexpr, SCALE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of one part of one expert's left.T @ right; see ``outer``."""
    m_blocks, n_blocks = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
    n = (program % n_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = (program // n_blocks % m_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    part = program // (n_blocks * m_blocks) % n_parts
    expert = program // (n_blocks * m_blocks * n_parts)
    m_ok, n_ok = m < M, n < N

    begin, end = tl.load(offsets + expert), tl.load(offsets + expert + 1)
    length = tl.cdiv(tl.cdiv(end - begin, n_parts), BLOCK_K) * BLOCK_K
    begin += part * length
    end = tl.minimum(end, begin + length)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if SECOND:
        acc2 = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(begin, end, BLOCK_K):
        p = start + tl.arange(0, BLOCK_K)
        ok = p < end
        l_row = tl.load(left_rows + p, mask=ok, other=0) if LEFT else p
        r_row = tl.load(right_rows + p, mask=ok, other=0) if RIGHT else p
        l_at = left + l_row.to(tl.int64)[None, :] * stride_left + m[:, None]
        r_at = right + r_row.to(tl.int64)[:, None] * stride_right + n[None, :]
        l_tile = tl.load(l_at, mask=m_ok[:, None] & ok[None, :], other=0.0)
        r_tile = tl.load(r_at, mask=ok[:, None] & n_ok[None, :], other=0.0)
        if SCALE:
            slot = tl.load(order + p, mask=ok, other=0)
            factor = tl.load(scale + slot, mask=ok, other=0.0).to(tl.float32)
            r_tile = (r_tile.to(tl.float32) * factor[:, None]).to(right.dtype.element_ty)
        acc = tl.dot(l_tile, r_tile, acc, input_precision=PRECISION)
        if SECOND:
            l2_at = left2 + l_row.to(tl.int64)[None, :] * stride_left2 + m[:, None]
            l2_tile = tl.load(l2_at, mask=m_ok[:, None] & ok[None, :], other=0.0)
            acc2 = tl.dot(l2_tile, r_tile, acc2, input_precision=PRECISION)
    at = ((part.to(tl.int64) * E + expert) * M + m[:, None]) * N + n[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=m_ok[:, None] & n_ok[None, :])
    if SECOND:
        tl.store(out2 + at, acc2.to(out2.dtype.element_ty), mask=m_ok[:, None] & n_ok[None, :])


@triton.jit
def sum_rows_kernel(x, offsets, out, N, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr):
    """out[e] = sum of expert e's rows of x [S, N]."""
    n_blocks = tl.cdiv(N, BLOCK_N)
    expert = (tl.program_id(0) // n_blocks).to(tl.int64)
    n = (tl.program_id(0) % n_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_N], tl.float32)
    end = tl.load(offsets + expert + 1)
    for start in range(tl.load(offsets + expert), end, BLOCK_S):
        p = start + tl.arange(0, BLOCK_S)
        mask = (p < end)[:, None] & (n < N)[None, :]
        row = tl.load(x + p.to(tl.int64)[:, None] * N + n[None, :], mask=mask, other=0.0)
        total += tl.sum(row.to(tl.float32), 0)
    tl.store(out + expert * N + n, total.to(out.dtype.element_ty), mask=n < N)


def n_parts(device: torch.device, n_tiles: int, n_rows: int) -> int:
    """Into how many parts to split: enough for two programs a processor, none much shorter than 256 rows."""
    return max(1, min(2 * n_processors(device) // max(n_tiles, 1), n_rows // ROWS_OF_A_PART, MAX_PARTS))


def outer(
    left: Tensor,
    right: Tensor,
    offsets: Tensor,
    order: Tensor,
    out: Tensor,
    tile: Tile,
    precision: str,
    *,
    second: tuple[Tensor, Tensor] | None = None,
    left_rows: Tensor | None = None,
    right_rows: Tensor | None = None,
    scale: Tensor | None = None,
) -> None:
    """out[e] = sum over positions p of e of outer(left[left_rows[p]], scale[order[p]] · right[right_rows[p]]).

    Shapes: left [*, M] and right [*, N] with unit stride in their rows, offsets int32 [E + 1], order, left_rows and
    right_rows int32 [S] (None: row p), scale [S] (None: 1), out [E, M, N] contiguous: zero where e has no position.
    ``second`` is another left and its out, for which the right rows are not read again.
    """
    left2, out2 = (None, None) if second is None else second
    E, M, N = out.shape
    tiles = E * cdiv(M, tile.m) * cdiv(N, tile.n)
    parts = n_parts(out.device, tiles, order.shape[0] // max(E, 1))

    outs = [out] if out2 is None else [out, out2]
    splits = outs if parts == 1 else [out.new_empty(parts, *out.shape, dtype=torch.float32) for out in outs]
    launch(
        outer_kernel, tiles * parts, left, left2, left_rows, right, right_rows, scale, order, offsets,
        splits[0], None if out2 is None else splits[1],
        M, N, E, parts, left.stride(0), 0 if left2 is None else left2.stride(0), right.stride(0),
        LEFT=left_rows is not None, SECOND=second is not None, RIGHT=right_rows is not None, SCALE=scale is not None,
        PRECISION=precision, **tile.meta,
    )  # fmt: skip
    if parts > 1:
        for split, out in zip(splits, outs, strict=True):
            combine.add_parts(split, out)


def sum_rows(x: Tensor, offsets: Tensor, out: Tensor) -> None:
    """out[e] = sum of the rows of x [S, N] at e's positions, out [E, N]; both contiguous."""
    E, N = out.shape
    launch(sum_rows_kernel, E * cdiv(N, SUM_BLOCK_N), x, offsets, out, N, BLOCK_S=SUM_BLOCK_S, BLOCK_N=SUM_BLOCK_N)

"""Products with rows of codes: a tile of codes becomes numbers after its load, so that only codes are read.

A row has C columns in groups that share a scale. Up, the rows are the columns of a product's matrix, down they are its
rows. The other names are those of ``grouped``.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_ffn.backends.triton import combine, schedule
from sparse_ffn.backends.triton.grouped import store_products
from sparse_ffn.backends.triton.launch import OF_TOKENS, cdiv, launch
from sparse_ffn.backends.triton.routing import Plan
from sparse_ffn.backends.triton.schedule import n_blocks_at_work, place
from sparse_ffn.backends.triton.tile import Tile

Codes = tuple[Tensor, Tensor, "Tensor | None"]
"""qdata, scale and zero_point of rows [E, G, C]: int8 codes, or uint8 of two 4-bit codes a byte."""
BLOCK_ROWS, BLOCK_COLUMNS = 16, 128  # of a slot taken by itself


@triton.jit
def numbers(
    qdata, scale, zero_point, row, row_ok, first, C, GROUP, stride_q, stride_s, stride_z,
    BITS: tl.constexpr, ZERO: tl.constexpr, SHARED: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Some rows' numbers in the columns from ``first`` on: fp32 [rows, COLUMNS], zero where there is none.

    ``first`` is a multiple of COLUMNS. Every SHARED columns lie in one group.
    """
    row = row.to(tl.int64)[:, None]
    if BITS == 4:
        byte = first // 2 + tl.arange(0, COLUMNS // 2)
        in_row = row_ok[:, None] & (byte < C // 2)[None, :]
        pair = tl.load(qdata + row * stride_q + byte[None, :], mask=in_row, other=0).to(tl.int32)
        code = tl.interleave(pair & 15, pair >> 4)
    else:
        c = first + tl.arange(0, COLUMNS)
        in_row = row_ok[:, None] & (c < C)[None, :]
        code = tl.load(qdata + row * stride_q + c[None, :], mask=in_row, other=0).to(tl.int32)
    start = first + tl.arange(0, COLUMNS // SHARED) * SHARED
    group = (start // GROUP)[None, :]
    known = row_ok[:, None] & (start < C)[None, :]
    factor = tl.load(scale + row * stride_s + group, mask=known, other=0.0).to(tl.float32)
    if ZERO:
        zero = tl.load(zero_point + row * stride_z + group, mask=known, other=0).to(tl.int32)
        code -= spread(zero - (0 if BITS == 4 else 128), SHARED, COLUMNS)
    elif BITS == 4:
        code -= 8
    return code.to(tl.float32) * spread(factor, SHARED, COLUMNS)


@triton.jit
def spread(x, SHARED: tl.constexpr, COLUMNS: tl.constexpr):
    """Each column SHARED times: [rows, COLUMNS // SHARED] to [rows, COLUMNS].

    Not the numbers are reshaped, but what they are made of: a reshape just before a tl.dot made Triton 3.9 fail.
    """
    if SHARED == COLUMNS:
        return tl.broadcast_to(x, [x.shape[0], COLUMNS])
    else:
        every = tl.broadcast_to(tl.expand_dims(x, 2), [x.shape[0], COLUMNS // SHARED, SHARED])
        return tl.reshape(every, [x.shape[0], COLUMNS])


@triton.jit(do_not_specialize=OF_TOKENS)
def codes_kernel(
    a, rows, qdata, scale, zero_point, weight, partner, partner_rows, out, dots,
    order, offsets, tiles, begin, N, K, S, C, GROUP, stride_a, stride_partner,
    stride_qe, stride_q, stride_se, stride_s, stride_ze, stride_z,
    DOWN: tl.constexpr, BITS: tl.constexpr, ZERO: tl.constexpr, SHARED: tl.constexpr,
    WEIGHTED: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Each position's row times its expert's matrix, and what comes after; see ``multiply``."""
    k = tl.arange(0, BLOCK_K)
    work = n_blocks_at_work(tiles, N, BLOCK_N)
    for at in tl.range(tl.program_id(0), work, tl.num_programs(0)):
        expert, _, p, ok, block = place(at, tiles, offsets, N, BLOCK_M, BLOCK_N)
        expert = expert.to(tl.int64)
        n = block * BLOCK_N + tl.arange(0, BLOCK_N)
        n_ok = n < N
        row = tl.load(rows + p, mask=ok, other=0)
        its_qdata, its_scale = qdata + expert * stride_qe, scale + expert * stride_se
        its_zero_point = zero_point + expert * stride_ze if ZERO else zero_point
        a_at = a + row.to(tl.int64)[:, None] * stride_a + k[None, :]
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, K, BLOCK_K):
            k_ok = start + k < K
            a_tile = tl.load(a_at, mask=ok[:, None] & k_ok[None, :], other=0.0)
            if DOWN:
                b_tile = numbers(
                    its_qdata, its_scale, its_zero_point, start + k, k_ok, begin + block * BLOCK_N, C, GROUP,
                    stride_q, stride_s, stride_z, BITS, ZERO, SHARED, BLOCK_N,
                )  # fmt: skip
            else:
                b_tile = tl.trans(numbers(
                    its_qdata, its_scale, its_zero_point, begin + n, n_ok, start, C, GROUP,
                    stride_q, stride_s, stride_z, BITS, ZERO, SHARED, BLOCK_K,
                ))  # fmt: skip
            acc = tl.dot(a_tile, b_tile.to(a_tile.dtype), acc, input_precision=PRECISION)
            a_at += BLOCK_K
        store_products(
            acc, p, ok, block, n, n_ok, order, weight, partner, partner_rows, out, dots, N, S, stride_partner,
            WEIGHTED, DOT, True,
        )  # fmt: skip


@triton.jit
def slot_codes_kernel(
    x, gather, expert, weight, qdata, scale, zero_point, y, N, K, E, C, GROUP, stride_x,
    stride_qe, stride_q, stride_se, stride_s, stride_ze, stride_z,
    DOWN: tl.constexpr, BITS: tl.constexpr, ZERO: tl.constexpr, SHARED: tl.constexpr,
    GATHER: tl.constexpr, WEIGHTED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A block of one slot's product; zero if it is void."""
    BLOCK_N: tl.constexpr = COLUMNS if DOWN else ROWS
    BLOCK_K: tl.constexpr = ROWS if DOWN else COLUMNS
    n_blocks = tl.cdiv(N, BLOCK_N)
    slot = tl.program_id(0) // n_blocks
    first = (tl.program_id(0) % n_blocks) * BLOCK_N
    n = first + tl.arange(0, BLOCK_N)
    e = tl.load(expert + slot)
    known = (e >= 0) & (e < E)
    e = tl.where(known, e, 0).to(tl.int64)
    qdata += e * stride_qe
    scale += e * stride_se
    if ZERO:
        zero_point += e * stride_ze
    row = (tl.load(gather + slot) if GATHER else slot).to(tl.int64)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, K if known else 0, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        value = tl.load(x + row * stride_x + k, mask=k < K, other=0.0).to(tl.float32)
        if DOWN:
            total += tl.expand_dims(value, 1) * numbers(
                qdata, scale, zero_point, k, k < K, first, C, GROUP, stride_q, stride_s, stride_z,
                BITS, ZERO, SHARED, COLUMNS,
            )  # fmt: skip
        else:
            total += tl.expand_dims(value, 0) * numbers(
                qdata, scale, zero_point, n, n < N, start, C, GROUP, stride_q, stride_s, stride_z,
                BITS, ZERO, SHARED, COLUMNS,
            )  # fmt: skip
    if DOWN:
        found = tl.sum(total, 0)
    else:
        found = tl.sum(total, 1)
    if WEIGHTED:
        found = tl.where(known, found * tl.load(weight + slot).to(tl.float32), 0.0)
    tl.store(y + slot.to(tl.int64) * N + n, found.to(y.dtype.element_ty), mask=n < N)


def multiply(
    plan: Plan,
    a: Tensor,
    rows: Tensor,
    codes: Codes,
    down: bool,
    part: slice,
    out: Tensor,
    tile: Tile,
    precision: str,
    *,
    weight: Tensor | None,
    partner: tuple[Tensor, Tensor] | None = None,
    dots: Tensor | None = None,
) -> None:
    """out[slot at p] = weight · a[rows[p]] @ matrix of p's expert, for every position p; zeros for void slots.

    Shapes: a [*, K] with unit stride in its rows, as all codes, rows int32 [S], out [S, N] contiguous, weight [S] in
    slot order.

    Args:
        plan: the positions, their experts, and the tiles.
        a: the rows.
        rows: which of them each position reads.
        codes: rows [E, G, C]. Up K = C, and N of the G columns; down K = G, and N of C.
        down: which of it.
        part: those N columns; its start is a multiple of ``tile.n``.
        out: receives the products.
        tile: block sizes.
        precision: of fp32 products.
        weight: a factor on each product.
        partner: rows [*, N] and int32 [S] that says which: their dot product with the unweighted product goes to dots.
        dots: fp32 [blocks of N, S] in slot order, to be summed over the first dimension.
    """
    _, G, C = _shape(codes)
    S, N = out.shape
    partners, partner_rows = (None, None) if partner is None else partner
    programs, _ = schedule.grid(plan, out, N, tile)
    launch(
        codes_kernel, programs, a, rows, *codes, weight, partners, partner_rows, out, dots,
        plan.order, plan.offsets, plan.tiles, part.start, N, G if down else C, S,
        C, _group(codes), a.stride(0), 0 if partners is None else partners.stride(0), *_strides(codes),
        DOWN=down, **_kind(codes, tile.n if down else tile.k), WEIGHTED=weight is not None, DOT=partner is not None,
        PRECISION=precision, **tile.meta,
    )  # fmt: skip
    combine.clear_void(out, plan.order, plan.offsets)


def multiply_slots(
    x: Tensor, gather: Tensor | None, expert: Tensor, codes: Codes, down: bool, weight: Tensor | None, y: Tensor
) -> None:
    """y[s] = weight[s] · x[gather[s]] @ matrix of expert[s], each slot by itself; zeros if it is void.

    Shapes: as ``multiply``; gather and expert int64 [S], contiguous, as y [S, N].
    """
    E, G, C = _shape(codes)
    N, K = (C, G) if down else (G, C)
    launch(
        slot_codes_kernel, y.shape[0] * cdiv(N, BLOCK_COLUMNS if down else BLOCK_ROWS), x, gather, expert, weight,
        *codes, y, N, K, E, C, _group(codes), x.stride(0), *_strides(codes),
        DOWN=down, **_kind(codes, BLOCK_COLUMNS), GATHER=gather is not None, WEIGHTED=weight is not None,
        ROWS=BLOCK_ROWS, COLUMNS=BLOCK_COLUMNS,
    )  # fmt: skip


def _bits(codes: Codes) -> int:
    return 4 if codes[0].dtype == torch.uint8 else 8


def _shape(codes: Codes) -> tuple[int, int, int]:
    E, G, width = codes[0].shape
    return E, G, width * 8 // _bits(codes)


def _group(codes: Codes) -> int:
    """Columns of a group."""
    return _shape(codes)[2] // codes[1].shape[-1]


def _strides(codes: Codes) -> tuple[int, ...]:
    return tuple(step for t in codes for step in ((0, 0) if t is None else t.stride()[:2]))


def _kind(codes: Codes, columns: int) -> dict[str, Any]:
    """What a kernel is compiled for: the codes, and how many of a tile's columns surely share a group."""
    group = _group(codes)
    shared = columns if codes[1].shape[-1] == 1 else min(columns, group & -group)
    return {"BITS": _bits(codes), "ZERO": codes[2] is not None, "SHARED": shared}

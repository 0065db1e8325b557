"""Grouped products: each row times its expert's matrix, one expert a tile, with what comes before and after fused in.

Rows are positions of a ``routing.Plan``, sorted by expert. S positions, E experts.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sparse_ffn.backends.triton import combine, operands, schedule
from sparse_ffn.backends.triton.config import Tile
from sparse_ffn.backends.triton.launch import OF_TOKENS, launch
from sparse_ffn.backends.triton.operands import matrix_tile, rows_tile
from sparse_ffn.backends.triton.routing import Plan
from sparse_ffn.backends.triton.schedule import n_blocks_at_work, place


@triton.jit
def store_products(
    acc, p, ok, block, n, n_ok, order, scale, partner, partner_rows, out, dots, N, S, stride_partner,
    SCALE: tl.constexpr, DOT: tl.constexpr, UNSORT: tl.constexpr,
):  # fmt: skip
    """A tile of products, scaled, to out; before that, their dot products with partners to dots; see ``multiply``."""
    mask = ok[:, None] & n_ok[None, :]
    slot = tl.load(order + p, mask=ok, other=0)
    if DOT:
        partner_row = tl.load(partner_rows + p, mask=ok, other=0).to(tl.int64)
        partners = tl.load(partner + partner_row[:, None] * stride_partner + n[None, :], mask=mask, other=0.0)
        tl.store(dots + block.to(tl.int64) * S + slot, tl.sum(acc * partners.to(tl.float32), 1), mask=ok)
    if SCALE:
        acc *= tl.load(scale + slot, mask=ok, other=0.0).to(tl.float32)[:, None]
    to = slot if UNSORT else p
    tl.store(out + to.to(tl.int64)[:, None] * N + n[None, :], acc.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=OF_TOKENS)
def rows_kernel(
    a, rows, b, a2, b2, scale, partner, partner_rows, out, dots,
    order, offsets, tiles, N, K, S, stride_a, stride_be, stride_bk, stride_bn,
    stride_b2e, stride_b2k, stride_b2n, stride_partner,
    GATHER: tl.constexpr, SECOND: tl.constexpr, SCALE: tl.constexpr, DOT: tl.constexpr, UNSORT: tl.constexpr,
    A_DESCRIBED: tl.constexpr, B_FORM: tl.constexpr, B2_FORM: tl.constexpr, FLATTEN: tl.constexpr,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Each position's row times its expert's matrix, and what comes before and after; see ``multiply``."""
    work = n_blocks_at_work(tiles, N, BLOCK_N)
    for at in tl.range(tl.program_id(0), work, tl.num_programs(0), flatten=FLATTEN):
        expert, first, p, ok, block = place(at, tiles, offsets, N, BLOCK_M, BLOCK_N)
        row = first if A_DESCRIBED else tl.load(rows + p, mask=ok, other=0) if GATHER else p
        column = block * BLOCK_N
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, K, BLOCK_K):
            a_tile = rows_tile(a, row, ok, start, K, stride_a, BLOCK_K, EVEN_K, A_DESCRIBED)
            b_tile = matrix_tile(
                b, expert, start, column, K, N, stride_be, stride_bk, stride_bn, BLOCK_K, BLOCK_N, EVEN_K, B_FORM
            )
            acc = tl.dot(a_tile, b_tile, acc, input_precision=PRECISION)
        if SECOND:
            for start in range(0, K, BLOCK_K):
                a_tile = rows_tile(a2, row, ok, start, K, stride_a, BLOCK_K, EVEN_K, A_DESCRIBED)
                b_tile = matrix_tile(
                    b2, expert, start, column, K, N, stride_b2e, stride_b2k, stride_b2n,
                    BLOCK_K, BLOCK_N, EVEN_K, B2_FORM,
                )  # fmt: skip
                acc = tl.dot(a_tile, b_tile, acc, input_precision=PRECISION)
        n = column + tl.arange(0, BLOCK_N)
        store_products(
            acc, p, ok, block, n, n < N, order, scale, partner, partner_rows, out, dots, N, S, stride_partner,
            SCALE, DOT, UNSORT,
        )  # fmt: skip


def multiply(
    plan: Plan,
    a: Tensor,
    b: Tensor,
    out: Tensor,
    tile: Tile,
    precision: str,
    *,
    rows: Tensor | None = None,
    second: tuple[Tensor, Tensor] | None = None,
    scale: Tensor | None = None,
    partner: tuple[Tensor, Tensor] | None = None,
    dots: Tensor | None = None,
    unsort: bool = False,
) -> None:
    """out[p] = a[rows[p]] @ b[expert of p] for every position p.

    Shapes: a [*, K] with unit stride in its rows, b [E, K, N], out [S, N] contiguous.

    Args:
        plan: the positions, their experts, and the tiles.
        a: the rows.
        b: the matrices.
        out: receives the products.
        tile: block sizes.
        precision: of fp32 products.
        rows: int32 [S]; None: row p.
        second: a2, b2 of the same shapes, whose product is added.
        scale: [S] in slot order, a factor on each product.
        partner: rows [*, N] and int32 [S] that says which: their dot product with the unscaled product goes to dots.
        dots: fp32 [blocks of N, S] in slot order, to be summed over the first dimension.
        unsort: write the product of slot s to out[s], zeros if it is void.
    """
    _, K, N = b.shape
    a2, b2 = (None, None) if second is None else second
    partners, partner_rows = (None, None) if partner is None else partner
    (a_rows, a2), described = ((a, a2), False) if rows is not None else operands.rows((tile.m, tile.k), a, a2)
    b, b_strides, b_form = operands.matrix(tile, b)
    b2, b2_strides, b2_form = operands.matrix(tile, b2)
    programs, flatten = schedule.grid(plan, out, N, tile)
    launch(
        rows_kernel, programs, a_rows, rows, b, a2, b2, scale, partners, partner_rows, out,
        dots, plan.order, plan.offsets, plan.tiles, N, K, out.shape[0], a.stride(0), *b_strides, *b2_strides,
        0 if partners is None else partners.stride(0),
        GATHER=rows is not None, SECOND=second is not None, SCALE=scale is not None, DOT=partner is not None,
        UNSORT=unsort, A_DESCRIBED=described, B_FORM=b_form, B2_FORM=b2_form,
        FLATTEN=flatten and second is None, EVEN_K=K % tile.k == 0, PRECISION=precision, **tile.meta,
    )  # fmt: skip
    if unsort:
        combine.clear_void(out, plan.order, plan.offsets)

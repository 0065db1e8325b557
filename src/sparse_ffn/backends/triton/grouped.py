"""Grouped products: each row times its expert's matrix, one expert a tile, with what comes before and after fused in.

Rows are positions of a ``routing.Plan``, sorted by expert. S positions, E experts, G hidden units of an expert.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sparse_ffn.backends.triton import combine
from sparse_ffn.backends.triton.activations import activate, gradient
from sparse_ffn.backends.triton.config import Tile
from sparse_ffn.backends.triton.launch import cdiv, launch
from sparse_ffn.backends.triton.routing import Plan


@triton.jit
def tile_of(tile_expert, tile_row, offsets, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """This program's expert (-1: idle), first position, positions, which of them are the expert's, and columns."""
    n_blocks = tl.cdiv(N, BLOCK_N)
    tile = tl.program_id(0) // n_blocks  # the blocks of one tile side by side: its gathered rows stay in the cache
    n = (tl.program_id(0) % n_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    expert = tl.load(tile_expert + tile).to(tl.int64)
    first = tl.load(tile_row + tile)
    p = first + tl.arange(0, BLOCK_M)
    end = tl.load(offsets + tl.maximum(expert, 0) + 1)
    return expert, first.to(tl.int64), p, p < end, n


@triton.jit
def product(
    acc, a, row, row_ok, stride_a, b, n, n_ok, stride_bk, stride_bn, K,
    BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Acc + A[row] @ B[:, n]; A's rows have unit stride inside."""
    k = tl.arange(0, BLOCK_K)
    a_at = a + row.to(tl.int64)[:, None] * stride_a + k[None, :]
    b_at = b + k.to(tl.int64)[:, None] * stride_bk + n.to(tl.int64)[None, :] * stride_bn
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            a_tile = tl.load(a_at, mask=row_ok[:, None], other=0.0)
            b_tile = tl.load(b_at, mask=n_ok[None, :], other=0.0)
        else:
            k_ok = k < K - start
            a_tile = tl.load(a_at, mask=row_ok[:, None] & k_ok[None, :], other=0.0)
            b_tile = tl.load(b_at, mask=k_ok[:, None] & n_ok[None, :], other=0.0)
        acc = tl.dot(a_tile, b_tile, acc, input_precision=PRECISION)
        a_at += BLOCK_K
        b_at += BLOCK_K * stride_bk
    return acc


@triton.jit
def two_products(
    acc, acc2, a, row, row_ok, stride_a, b, b2, n, n_ok, stride_bk, stride_bn, stride_b2k, stride_b2n, K,
    BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Acc + A[row] @ B[:, n] and acc2 + A[row] @ B2[:, n], reading A once."""
    k = tl.arange(0, BLOCK_K)
    a_at = a + row.to(tl.int64)[:, None] * stride_a + k[None, :]
    b_at = b + k.to(tl.int64)[:, None] * stride_bk + n.to(tl.int64)[None, :] * stride_bn
    b2_at = b2 + k.to(tl.int64)[:, None] * stride_b2k + n.to(tl.int64)[None, :] * stride_b2n
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            a_tile = tl.load(a_at, mask=row_ok[:, None], other=0.0)
            b_tile = tl.load(b_at, mask=n_ok[None, :], other=0.0)
            b2_tile = tl.load(b2_at, mask=n_ok[None, :], other=0.0)
        else:
            k_ok = k < K - start
            a_tile = tl.load(a_at, mask=row_ok[:, None] & k_ok[None, :], other=0.0)
            b_tile = tl.load(b_at, mask=k_ok[:, None] & n_ok[None, :], other=0.0)
            b2_tile = tl.load(b2_at, mask=k_ok[:, None] & n_ok[None, :], other=0.0)
        acc = tl.dot(a_tile, b_tile, acc, input_precision=PRECISION)
        acc2 = tl.dot(a_tile, b2_tile, acc2, input_precision=PRECISION)
        a_at += BLOCK_K
        b_at += BLOCK_K * stride_bk
        b2_at += BLOCK_K * stride_b2k
    return acc, acc2


@triton.jit
def up_kernel(
    x, rows, keys, gate_keys, key_bias, dropout_mask, saved_up, saved_glu_gate, h,
    order, offsets, tile_expert, tile_row, G, D, stride_x,
    stride_ke, stride_kg, stride_kd, stride_ge, stride_gg, stride_gd, stride_be, stride_bg,
    ACTIVATION: tl.constexpr, GLU: tl.constexpr, BIAS: tl.constexpr, SCALE: tl.constexpr,
    SAVE: tl.constexpr, STORE_H: tl.constexpr,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Hidden units of each position: act(x key + bias), or act(x gate_key) · (x key + bias); see ``up``."""
    expert, first, p, ok, g = tile_of(tile_expert, tile_row, offsets, G, BLOCK_M, BLOCK_N)
    if expert < 0:
        return
    g_ok = g < G
    row = tl.load(rows + p, mask=ok, other=0)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if GLU:
        pre = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        pre, up = two_products(
            pre, up, x, row, ok, stride_x, gate_keys + expert * stride_ge, keys + expert * stride_ke, g, g_ok,
            stride_gd, stride_gg, stride_kd, stride_kg, D, BLOCK_K, EVEN_K, PRECISION,
        )  # fmt: skip
    else:
        up = product(
            up, x, row, ok, stride_x, keys + expert * stride_ke, g, g_ok, stride_kd, stride_kg, D,
            BLOCK_K, EVEN_K, PRECISION,
        )  # fmt: skip
    if BIAS:
        bias = tl.load(key_bias + expert * stride_be + g.to(tl.int64) * stride_bg, mask=g_ok, other=0.0)
        up += bias.to(tl.float32)[None, :]
    at = tl.arange(0, BLOCK_M)[:, None] * G + g[None, :]  # 32 bits from the tile's first row: half the registers
    mask = ok[:, None] & g_ok[None, :]
    if GLU:
        hidden = activate(pre, ACTIVATION)
        if SAVE:
            tl.store(saved_glu_gate + first * G + at, pre.to(saved_glu_gate.dtype.element_ty), mask=mask)
            tl.store(saved_up + first * G + at, up.to(saved_up.dtype.element_ty), mask=mask)
        hidden *= up
    else:
        hidden = activate(up, ACTIVATION)
        if SAVE:
            saved = hidden if ACTIVATION == "relu" else up  # what ReLU keeps says all that its backward pass asks
            tl.store(saved_up + first * G + at, saved.to(saved_up.dtype.element_ty), mask=mask)
    if STORE_H:
        if SCALE:
            slot = tl.load(order + p, mask=ok, other=0).to(tl.int64)
            scale = tl.load(dropout_mask + slot[:, None] * G + g[None, :], mask=mask, other=0.0)
            hidden *= scale.to(tl.float32)
        tl.store(h + first * G + at, hidden.to(h.dtype.element_ty), mask=mask)


@triton.jit
def store_products(
    acc, p, ok, n, n_ok, order, scale, partner, partner_rows, out, dots, N, S, stride_partner,
    SCALE: tl.constexpr, DOT: tl.constexpr, UNSORT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile of products, scaled, to out; before that, their dot products with partners to dots; see ``multiply``."""
    mask = ok[:, None] & n_ok[None, :]
    slot = tl.load(order + p, mask=ok, other=0)
    if DOT:
        partner_row = tl.load(partner_rows + p, mask=ok, other=0).to(tl.int64)
        partners = tl.load(partner + partner_row[:, None] * stride_partner + n[None, :], mask=mask, other=0.0)
        part = (tl.program_id(0) % tl.cdiv(N, BLOCK_N)).to(tl.int64) * S
        tl.store(dots + part + slot, tl.sum(acc * partners.to(tl.float32), 1), mask=ok)
    if SCALE:
        acc *= tl.load(scale + slot, mask=ok, other=0.0).to(tl.float32)[:, None]
    to = slot if UNSORT else p
    tl.store(out + to.to(tl.int64)[:, None] * N + n[None, :], acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def rows_kernel(
    a, rows, b, a2, b2, scale, partner, partner_rows, out, dots,
    order, offsets, tile_expert, tile_row, N, K, S, stride_a, stride_be, stride_bk, stride_bn,
    stride_b2e, stride_b2k, stride_b2n, stride_partner,
    GATHER: tl.constexpr, SECOND: tl.constexpr, SCALE: tl.constexpr, DOT: tl.constexpr, UNSORT: tl.constexpr,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Each position's row times its expert's matrix, and what comes before and after; see ``multiply``."""
    expert, _, p, ok, n = tile_of(tile_expert, tile_row, offsets, N, BLOCK_M, BLOCK_N)
    if expert < 0:
        return
    n_ok = n < N
    row = tl.load(rows + p, mask=ok, other=0) if GATHER else p
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc = product(
        acc, a, row, ok, stride_a, b + expert * stride_be, n, n_ok, stride_bk, stride_bn, K,
        BLOCK_K, EVEN_K, PRECISION,
    )  # fmt: skip
    if SECOND:
        acc = product(
            acc, a2, row, ok, stride_a, b2 + expert * stride_b2e, n, n_ok, stride_b2k, stride_b2n, K,
            BLOCK_K, EVEN_K, PRECISION,
        )  # fmt: skip
    store_products(
        acc, p, ok, n, n_ok, order, scale, partner, partner_rows, out, dots, N, S, stride_partner,
        SCALE, DOT, UNSORT, BLOCK_N,
    )  # fmt: skip


@triton.jit
def unit_gradients(
    dh, weight, up, glu_gate, dropout_mask, scale_at, dup, dglu_gate, weighted, g, ok, G,
    ACTIVATION: tl.constexpr, GLU: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """From the gradient at columns g of a tile to those of up and glu_gate; returns the rows' sums of dh · h."""
    at = tl.arange(0, dh.shape[0])[:, None] * G + g[None, :]
    mask = ok[:, None] & (g < G)[None, :]
    pre = tl.load((glu_gate if GLU else up) + at, mask=mask, other=0.0).to(tl.float32)
    active = activate(pre, ACTIVATION)
    hidden = active
    if GLU:
        factor = tl.load(up + at, mask=mask, other=0.0).to(tl.float32)
        hidden *= factor
    if SCALE:
        scale = tl.load(dropout_mask + scale_at[:, None] + g[None, :], mask=mask, other=0.0).to(tl.float32)
        hidden *= scale
    dot = tl.sum(dh * hidden, 1)
    tl.store(weighted + at, (hidden * weight).to(weighted.dtype.element_ty), mask=mask)
    dh *= weight
    if SCALE:
        dh *= scale
    if GLU:
        tl.store(dup + at, (dh * active).to(dup.dtype.element_ty), mask=mask)
        dh *= factor
    before = dglu_gate if GLU else dup  # the activation
    tl.store(before + at, gradient(dh, pre, ACTIVATION).to(before.dtype.element_ty), mask=mask)
    return dot


@triton.jit
def hidden_gradient_kernel(
    grad, rows, values, up, glu_gate, dropout_mask, gate, dup, dglu_gate, weighted, dgate,
    order, offsets, tile_expert, tile_row, G, O, S, stride_grad, stride_ve, stride_vg, stride_vo,
    ACTIVATION: tl.constexpr, GLU: tl.constexpr, SCALE: tl.constexpr, HALVES: tl.constexpr,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The gradient at each hidden unit, and what follows from it element by element; see ``hidden_gradient``."""
    expert, first, p, ok, g = tile_of(tile_expert, tile_row, offsets, G, BLOCK_M, BLOCK_N)
    if expert < 0:
        return
    g_ok = g < G
    row = tl.load(rows + p, mask=ok, other=0)
    dh = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)  # still without the gate: its row sum with h is the gate's gradient
    dh = product(
        dh, grad, row, ok, stride_grad, values + expert * stride_ve, g, g_ok, stride_vo, stride_vg, O,
        BLOCK_K, EVEN_K, PRECISION,
    )  # fmt: skip
    slot = tl.load(order + p, mask=ok, other=0).to(tl.int64)
    weight = tl.load(gate + slot, mask=ok, other=0.0).to(tl.float32)[:, None]
    up, dup, weighted = up + first * G, dup + first * G, weighted + first * G
    if GLU:
        glu_gate, dglu_gate = glu_gate + first * G, dglu_gate + first * G
    scale_at = slot * G
    if HALVES:  # one half of the columns after the other: all that meets here would not fit into registers at once
        low, high = tl.split(tl.permute(tl.reshape(dh, [BLOCK_M, 2, BLOCK_N // 2]), [0, 2, 1]))
        half = (tl.program_id(0) % tl.cdiv(G, BLOCK_N)) * BLOCK_N + tl.arange(0, BLOCK_N // 2)
        dot = unit_gradients(
            low, weight, up, glu_gate, dropout_mask, scale_at, dup, dglu_gate, weighted, half, ok, G,
            ACTIVATION, GLU, SCALE,
        )  # fmt: skip
        half += BLOCK_N // 2
        dot += unit_gradients(
            high, weight, up, glu_gate, dropout_mask, scale_at, dup, dglu_gate, weighted, half, ok, G,
            ACTIVATION, GLU, SCALE,
        )  # fmt: skip
    else:
        dot = unit_gradients(
            dh, weight, up, glu_gate, dropout_mask, scale_at, dup, dglu_gate, weighted, g, ok, G,
            ACTIVATION, GLU, SCALE,
        )  # fmt: skip
    part = (tl.program_id(0) % tl.cdiv(G, BLOCK_N)).to(tl.int64) * S
    tl.store(dgate + part + slot, dot, mask=ok)


def up(
    plan: Plan,
    x: Tensor,
    keys: Tensor,
    gate_keys: Tensor | None,
    key_bias: Tensor | None,
    dropout_mask: Tensor | None,
    saved_up: Tensor | None,
    saved_glu_gate: Tensor | None,
    h: Tensor,
    activation: str,
    tile: Tile,
    precision: str,
) -> None:
    """Hidden units of every position into h, what the backward pass needs of them into saved_up and saved_glu_gate.

    Shapes: x [T, D] with unit stride in its rows, keys and gate_keys [E, G, D], key_bias [E, G], dropout_mask [S, G]
    in slot order, contiguous; saved_up, saved_glu_gate and h [S, G] contiguous. saved_up gets x key + bias (without a
    GLU of ReLU the result), saved_glu_gate x gate_key; None: kept nowhere. h may be saved_up where both hold the same.
    """
    G, D = keys.shape[1:]
    if G >= 1 << 24:
        raise ValueError(f"an expert has fewer than 2**24 hidden units here, got {G}")
    launch(
        up_kernel, plan.n_tiles * cdiv(G, tile.n), x, plan.rows, keys, gate_keys, key_bias, dropout_mask,
        saved_up, saved_glu_gate, h, plan.order, plan.offsets, plan.tile_expert, plan.tile_row, G, D, x.stride(0),
        *keys.stride(), *_strides(gate_keys, 3), *_strides(key_bias, 2),
        ACTIVATION=activation, GLU=gate_keys is not None, BIAS=key_bias is not None, SCALE=dropout_mask is not None,
        SAVE=saved_up is not None, STORE_H=h is not saved_up, EVEN_K=D % tile.k == 0, PRECISION=precision, **tile.meta,
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
    launch(
        rows_kernel, plan.n_tiles * cdiv(N, tile.n), a, rows, b, a2, b2, scale, partners, partner_rows, out, dots,
        plan.order, plan.offsets, plan.tile_expert, plan.tile_row, N, K, out.shape[0], a.stride(0), *b.stride(),
        *_strides(b2, 3), 0 if partners is None else partners.stride(0),
        GATHER=rows is not None, SECOND=second is not None, SCALE=scale is not None, DOT=partner is not None,
        UNSORT=unsort, EVEN_K=K % tile.k == 0, PRECISION=precision, **tile.meta,
    )  # fmt: skip
    if unsort:
        combine.clear_void(out, plan.order, plan.offsets)


def hidden_gradient(
    plan: Plan,
    grad: Tensor,
    values: Tensor,
    up: Tensor,
    glu_gate: Tensor | None,
    dropout_mask: Tensor | None,
    gate: Tensor,
    dup: Tensor,
    dglu_gate: Tensor | None,
    weighted: Tensor,
    dgate: Tensor,
    activation: str,
    tile: Tile,
    precision: str,
) -> None:
    """Gradients of up and glu_gate, the gate's gradient, and the hidden units times their gate, all in one pass.

    Shapes: grad [T, O] with unit stride in its rows, values [E, G, O], gate [S] and dropout_mask [S, G] in slot order;
    up, glu_gate, dup, dglu_gate and weighted [S, G]; dgate fp32 [blocks of G, S] in slot order, to be summed over the
    first dimension.
    """
    G, O = values.shape[1:]
    launch(
        hidden_gradient_kernel, plan.n_tiles * cdiv(G, tile.n), grad, plan.rows, values, up, glu_gate, dropout_mask,
        gate, dup, dglu_gate, weighted, dgate, plan.order, plan.offsets, plan.tile_expert, plan.tile_row,
        G, O, plan.order.shape[0], grad.stride(0), *values.stride(),
        ACTIVATION=activation, GLU=glu_gate is not None, SCALE=dropout_mask is not None, HALVES=tile.n > 32,
        EVEN_K=O % tile.k == 0, PRECISION=precision, **tile.meta,
    )  # fmt: skip


def _strides(x: Tensor | None, n: int) -> tuple[int, ...]:
    return (0,) * n if x is None else x.stride()

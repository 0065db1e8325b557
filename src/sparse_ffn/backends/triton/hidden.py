"""Hidden units of the experts, and their gradients: grouped products with all that follows element by element.

Rows are positions of a ``routing.Plan``, sorted by expert. S positions, E experts, G hidden units of an expert.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sparse_ffn.backends.triton import operands, schedule
from sparse_ffn.backends.triton.activations import activate, gradient
from sparse_ffn.backends.triton.config import Tile
from sparse_ffn.backends.triton.launch import OF_TOKENS, launch
from sparse_ffn.backends.triton.operands import matrix_tile, rows_tile
from sparse_ffn.backends.triton.routing import Plan
from sparse_ffn.backends.triton.schedule import n_blocks_at_work, place


@triton.jit
def up_kernel(
    x, rows, keys, gate_keys, key_bias, dropout_mask, saved_up, saved_glu_gate, h,
    order, offsets, tiles, G, D, stride_x,
    stride_ke, stride_kd, stride_kg, stride_ge, stride_gd, stride_gg, stride_be, stride_bg,
    ACTIVATION: tl.constexpr, GLU: tl.constexpr, BIAS: tl.constexpr, SCALE: tl.constexpr,
    SAVE: tl.constexpr, STORE_H: tl.constexpr, KEYS_FORM: tl.constexpr, GATE_FORM: tl.constexpr, FLATTEN: tl.constexpr,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Hidden units of each position: act(x key + bias), or act(x gate_key) · (x key + bias); see ``up``."""
    work = n_blocks_at_work(tiles, G, BLOCK_N)
    for at in tl.range(tl.program_id(0), work, tl.num_programs(0), flatten=FLATTEN):
        expert, first, p, ok, block = place(at, tiles, offsets, G, BLOCK_M, BLOCK_N)
        column = block * BLOCK_N
        row = tl.load(rows + p, mask=ok, other=0)
        up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        pre = up
        for start in range(0, D, BLOCK_K):
            x_tile = rows_tile(x, row, ok, start, D, stride_x, BLOCK_K, EVEN_K, False)
            if GLU:
                gate_tile = matrix_tile(
                    gate_keys, expert, start, column, D, G, stride_ge, stride_gd, stride_gg,
                    BLOCK_K, BLOCK_N, EVEN_K, GATE_FORM,
                )  # fmt: skip
                pre = tl.dot(x_tile, gate_tile, pre, input_precision=PRECISION)
            key_tile = matrix_tile(
                keys, expert, start, column, D, G, stride_ke, stride_kd, stride_kg,
                BLOCK_K, BLOCK_N, EVEN_K, KEYS_FORM,
            )  # fmt: skip
            up = tl.dot(x_tile, key_tile, up, input_precision=PRECISION)
        g = column + tl.arange(0, BLOCK_N)
        g_ok = g < G
        if BIAS:
            bias_at = key_bias + expert.to(tl.int64) * stride_be + g.to(tl.int64) * stride_bg
            up += tl.load(bias_at, mask=g_ok, other=0.0).to(tl.float32)[None, :]
        # 32 bits from the tile's first row: half the registers
        begin = first.to(tl.int64) * G
        units = tl.arange(0, BLOCK_M)[:, None] * G + g[None, :]
        mask = ok[:, None] & g_ok[None, :]
        if GLU:
            hidden = activate(pre, ACTIVATION)
            if SAVE:
                tl.store(saved_glu_gate + begin + units, pre.to(saved_glu_gate.dtype.element_ty), mask=mask)
                tl.store(saved_up + begin + units, up.to(saved_up.dtype.element_ty), mask=mask)
            hidden *= up
        else:
            hidden = activate(up, ACTIVATION)
            if SAVE:
                saved = hidden if ACTIVATION == "relu" else up  # what ReLU keeps says all that its backward pass asks
                tl.store(saved_up + begin + units, saved.to(saved_up.dtype.element_ty), mask=mask)
        if STORE_H:
            if SCALE:
                slot = tl.load(order + p, mask=ok, other=0).to(tl.int64)
                scale = tl.load(dropout_mask + slot[:, None] * G + g[None, :], mask=mask, other=0.0)
                hidden *= scale.to(tl.float32)
            tl.store(h + begin + units, hidden.to(h.dtype.element_ty), mask=mask)


@triton.jit
def kept_tile(units, first, column, at, mask, DESCRIBED: tl.constexpr):
    """What the forward pass kept of a tile in fp32; rows that are another expert's may be read if it is described."""
    if DESCRIBED:
        kept = units.load([first, column])
    else:
        kept = tl.load(units + at, mask=mask, other=0.0)
    return kept.to(tl.float32)


@triton.jit
def unit_gradients(
    dh, weight, up, glu_gate, first, dropout_mask, scale_at, dup, dglu_gate, weighted, column, ok, G,
    ACTIVATION: tl.constexpr, GLU: tl.constexpr, SCALE: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """From the gradient at columns g of a tile to those of up and glu_gate; returns the rows' sums of dh · h."""
    g = column + tl.arange(0, dh.shape[1])
    at = tl.arange(0, dh.shape[0])[:, None] * G + g[None, :]
    mask = ok[:, None] & (g < G)[None, :]
    pre = kept_tile(glu_gate if GLU else up, first, column, at, mask, DESCRIBED)
    active = activate(pre, ACTIVATION)
    hidden = active
    if GLU:
        factor = kept_tile(up, first, column, at, mask, DESCRIBED)
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
def halves(x):
    """The first and the second half of a tile's columns."""
    return tl.split(tl.permute(tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), [0, 2, 1]))


@triton.jit(do_not_specialize=OF_TOKENS)
def hidden_gradient_kernel(
    grad, rows, values, up, glu_gate, dropout_mask, gate, dup, dglu_gate, weighted, dgate,
    order, offsets, tiles, G, O, S, stride_grad, stride_ve, stride_vo, stride_vg,
    ACTIVATION: tl.constexpr, GLU: tl.constexpr, SCALE: tl.constexpr, FORM: tl.constexpr, FLATTEN: tl.constexpr,
    KEPT_DESCRIBED: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The gradient at each hidden unit, and what follows from it element by element; see ``hidden_gradient``."""
    work = n_blocks_at_work(tiles, G, BLOCK_N)
    for at in tl.range(tl.program_id(0), work, tl.num_programs(0), flatten=FLATTEN):
        expert, first, p, ok, block = place(at, tiles, offsets, G, BLOCK_M, BLOCK_N)
        column = block * BLOCK_N
        row = tl.load(rows + p, mask=ok, other=0)
        dh = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)  # without the gate: its row sum with h is the gate's gradient
        for start in range(0, O, BLOCK_K):
            grad_tile = rows_tile(grad, row, ok, start, O, stride_grad, BLOCK_K, EVEN_K, False)
            value_tile = matrix_tile(
                values, expert, start, column, O, G, stride_ve, stride_vo, stride_vg, BLOCK_K, BLOCK_N, EVEN_K, FORM
            )
            dh = tl.dot(grad_tile, value_tile, dh, input_precision=PRECISION)
        slot = tl.load(order + p, mask=ok, other=0).to(tl.int64)
        weight = tl.load(gate + slot, mask=ok, other=0.0).to(tl.float32)[:, None]
        begin = first.to(tl.int64) * G
        units = (up, glu_gate) if KEPT_DESCRIBED else (up + begin, glu_gate + begin if GLU else None)
        at_units = (first, dropout_mask, slot * G, dup + begin, dglu_gate + begin if GLU else None, weighted + begin)
        dot = tl.zeros([BLOCK_M], tl.float32)
        if BLOCK_N >= 64:  # a quarter of the columns after the other: all at once would not fit into registers
            low, high = halves(dh)
            for half in tl.static_range(2):
                left, right = halves(low if half == 0 else high)
                begin_left = column + half * (BLOCK_N // 2)
                dot += unit_gradients(
                    left, weight, *units, *at_units, begin_left, ok, G, ACTIVATION, GLU, SCALE, KEPT_DESCRIBED
                )
                begin_right = begin_left + BLOCK_N // 4
                dot += unit_gradients(
                    right, weight, *units, *at_units, begin_right, ok, G, ACTIVATION, GLU, SCALE, KEPT_DESCRIBED
                )
        else:
            dot += unit_gradients(dh, weight, *units, *at_units, column, ok, G, ACTIVATION, GLU, SCALE, KEPT_DESCRIBED)
        tl.store(dgate + block.to(tl.int64) * S + slot, dot, mask=ok)


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
    keys, key_strides, keys_form = operands.matrix(tile, keys.mT)
    gate_keys, gate_strides, gate_form = operands.matrix(tile, None if gate_keys is None else gate_keys.mT)
    programs, flatten = schedule.grid(plan, h, G, tile, 1 if gate_keys is None else 2)
    launch(
        up_kernel, programs, x, plan.rows, keys, gate_keys, key_bias, dropout_mask,
        saved_up, saved_glu_gate, h, plan.order, plan.offsets, plan.tiles, G, D, x.stride(0),
        *key_strides, *gate_strides, *((0, 0) if key_bias is None else key_bias.stride()),
        ACTIVATION=activation, GLU=gate_keys is not None, BIAS=key_bias is not None, SCALE=dropout_mask is not None,
        SAVE=saved_up is not None, STORE_H=h is not saved_up, KEYS_FORM=keys_form, GATE_FORM=gate_form,
        FLATTEN=flatten, EVEN_K=D % tile.k == 0, PRECISION=precision, **tile.meta,
    )  # fmt: skip


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
    values, value_strides, form = operands.matrix(tile, values.mT)
    programs, flatten = schedule.grid(plan, up, G, tile)
    (kept_up, kept_gate), described = operands.rows((tile.m, tile.n // 4 if tile.n >= 64 else tile.n), up, glu_gate)
    # the compiler is told how many programs there are to be: it wastes registers on one, or spills for more
    limit = {"maxnreg": schedule.registers(tile, up)} if described and form else {}
    launch(
        hidden_gradient_kernel, programs, grad, plan.rows, values, kept_up, kept_gate, dropout_mask,
        gate, dup, dglu_gate, weighted, dgate, plan.order, plan.offsets, plan.tiles, G, O, plan.order.shape[0],
        grad.stride(0), *value_strides,
        ACTIVATION=activation, GLU=glu_gate is not None, SCALE=dropout_mask is not None, FORM=form, FLATTEN=flatten,
        KEPT_DESCRIBED=described,
        EVEN_K=O % tile.k == 0, PRECISION=precision, **tile.meta, **limit,
    )  # fmt: skip

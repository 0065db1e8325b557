"""A router in one kernel: scores, selection, gates, and sums of softmaxes; and the gradient of its scores in another.

T tokens in equally long groups, D d_model, R rows of the router, K of them selected. A program takes some tokens of one
group and all rows of the router.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_ffn.backends.triton import config
from sparse_ffn.backends.triton.launch import cdiv, launch, power_of_two
from sparse_ffn.backends.triton.product_keys import number, ordered

MAX_TOKENS, SCORES, COLUMNS = 64, 8192, 64  # of a program: tokens, tokens times rows; columns of x's gradient at once
NONE = tl.constexpr(-(1 << 31))  # below the order of every score


class Blocks(NamedTuple):
    """Sizes of a program: tokens, rows of the router, columns of x at once, and its warps."""

    tokens: int
    rows: int
    depth: int
    warps: int

    @classmethod
    def of(
        cls,
        n_tokens: int,
        n_rows: int,
        dtype: torch.dtype,
        weights: torch.dtype,
        target: str,
        *,
        gradient: bool = False,
    ) -> Blocks:
        """For groups of so many tokens in a dtype, and the router's; or of its gradient, which holds more a score.

        ``target`` is what ``config.architecture`` says.
        """
        rows = max(power_of_two(n_rows), 16)
        split = weights != dtype  # into three numbers, all of them in registers
        # without tensor cores operands are, too
        scores = SCORES // (4 if dtype == torch.float32 else 2 if split or gradient else 1)
        tokens = max(min(MAX_TOKENS, scores // rows, power_of_two(n_tokens)), 16)
        if dtype == torch.float32:
            return cls(tokens, rows, 16, 8)
        depth = max(min(SCORES // (rows * (8 if split else 2)), 64), 16)
        # 8 would share the columns, too, and the sum would be laid out anew between products that follow one another
        one_layout = split and tokens == MAX_TOKENS and not gradient and target != "sm_80"  # which spills then
        warps = 4 if tokens * rows <= 512 or one_layout else 16 if rows > 256 else 8
        return cls(tokens, rows, depth, warps)


@triton.jit
def tokens_of(length, BLOCK_T: tl.constexpr):
    """This program's group, tokens, and which of these there are."""
    n_blocks = tl.cdiv(length, BLOCK_T)
    group = tl.program_id(0) // n_blocks
    within = (tl.program_id(0) % n_blocks) * BLOCK_T + tl.arange(0, BLOCK_T)
    return group, group.to(tl.int64) * length + within, within < length


@triton.jit
def scores(
    x, weight, t, ok, r, R, D, stride_x, stride_wr, stride_wd,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """x [T, D] @ weight [R, D].T in fp32."""
    d = tl.arange(0, BLOCK_D)
    x_at = x + t[:, None] * stride_x + d[None, :]
    w_at = weight + r.to(tl.int64)[None, :] * stride_wr + d.to(tl.int64)[:, None] * stride_wd
    acc = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
    for start in range(0, D, BLOCK_D):
        d_ok = d < D - start
        x_tile = tl.load(x_at, mask=ok[:, None] & d_ok[None, :], other=0.0)
        w_tile = tl.load(w_at, mask=d_ok[:, None] & (r < R)[None, :], other=0.0)
        if SPLIT:  # fp32 weights, tokens in bf16: a weight is the sum of three bf16, whose products are exact
            for _ in tl.static_range(3):
                part = w_tile.to(tl.bfloat16)
                acc = tl.dot(x_tile, part, acc)
                w_tile -= part.to(tl.float32)
                w_tile = tl.where(w_tile == w_tile, w_tile, 0.0)  # of an infinity nothing is left
        else:
            acc = tl.dot(x_tile, w_tile, acc, input_precision=PRECISION)
        x_at += BLOCK_D
        w_at += BLOCK_D * stride_wd
    return acc


@triton.jit
def softmax(z):
    """Over the columns; a NaN in a row makes all of it NaN."""
    exp = tl.exp(z - tl.max(z, 1)[:, None])
    return exp / tl.sum(exp, 1)[:, None]


@triton.jit
def route_kernel(
    x, weight, bias, mask, index, gate, logits, sums, R, D, K, length, stride_x, stride_wr, stride_wd,
    GATE: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr, KEEP: tl.constexpr, SUMS: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """The routing of some tokens; see ``route``."""
    _, t, ok = tokens_of(length, BLOCK_T)
    r = tl.arange(0, BLOCK_R)
    there = (r < R)[None, :]
    score = scores(
        x, weight, t, ok, r, R, D, stride_x, stride_wr, stride_wd, SPLIT, PRECISION, BLOCK_T, BLOCK_R, BLOCK_D
    )
    if KEEP:
        tl.store(logits + t[:, None] * R + r[None, :], score, mask=ok[:, None] & there)

    score = tl.where(there, score, float("-inf"))
    if SUMS:  # before the selection, which then keeps ranks only: both at once take more registers than there are
        counted = ok
        if MASK:
            counted = ok & (tl.load(mask + t, mask=ok, other=0) != 0)
        total = tl.sum(tl.where(counted[:, None], softmax(score), 0.0), 0)
        tl.store(sums + tl.program_id(0).to(tl.int64) * R + r, total, mask=r < R)
    if GATE == "softmax":
        top = tl.max(score, 1)[:, None]
        denominator = tl.sum(tl.exp(score - top), 1)[:, None]

    ranked = score
    if BIAS:
        ranked += tl.load(bias + r, mask=r < R, other=0.0)[None, :]
    rank = ordered(ranked)  # K <= R: of rows that are none, which come last among those of -inf, none is selected
    j = tl.arange(0, SLOTS)
    selected = tl.zeros([BLOCK_T, SLOTS], tl.int32)
    value = tl.full([BLOCK_T, SLOTS], float("-inf"), tl.float32)
    for nth in range(0, K):
        highest = tl.max(rank, 1)
        best = tl.min(tl.where(rank == highest[:, None], r[None, :], BLOCK_R), 1)  # ties: the lowest row
        here = r[None, :] == best[:, None]
        rank = tl.where(here, NONE, rank)
        selected = tl.where((j == nth)[None, :], best[:, None], selected)
        if BIAS:
            found = tl.sum(tl.where(here, score, 0.0), 1)
        else:
            found = number(highest)
        value = tl.where((j == nth)[None, :], found[:, None], value)

    if GATE == "sigmoid":
        weigh = 1 / (1 + tl.exp(-value))
    elif GATE == "softmax":
        weigh = tl.exp(value - top) / denominator
    elif GATE == "softmax_topk":
        weigh = softmax(value)
    else:
        tl.static_assert(GATE == "unweighted")
        weigh = 1 + 0 * value  # NaN where the score is no number
    at = t[:, None] * K + j[None, :]
    slots = ok[:, None] & (j < K)[None, :]
    tl.store(index + at, selected.to(tl.int64), mask=slots)
    tl.store(gate + at, weigh, mask=slots)


@triton.jit
def route_gradient_kernel(
    dgate, dsums, weight, mask, index, gate, logits, dlogits, dx, R, D, K, length, stride_wr, stride_wd,
    GATE: tl.constexpr, DGATE: tl.constexpr, DSUMS: tl.constexpr, MASK: tl.constexpr, DX: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradient of some tokens' scores, and with DX what follows from it for x; see ``gradient``."""
    group, t, ok = tokens_of(length, BLOCK_T)
    r = tl.arange(0, BLOCK_R)
    there = (r < R)[None, :]
    direct = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)  # what reaches the selected scores, or their softmax's shares
    if DGATE:
        mean = tl.zeros([BLOCK_T], tl.float32)
        if GATE == "softmax_topk":
            for nth in range(0, K):
                slope = tl.load(dgate + t * K + nth, mask=ok, other=0.0)
                mean += slope * tl.load(gate + t * K + nth, mask=ok, other=0.0)
        for nth in range(0, K):
            slope = tl.load(dgate + t * K + nth, mask=ok, other=0.0)
            share = tl.load(gate + t * K + nth, mask=ok, other=0.0)
            if GATE == "sigmoid":
                slope *= share * (1 - share)
            elif GATE == "softmax_topk":
                slope = share * (slope - mean)
            elif GATE == "unweighted":
                slope *= 0
            here = r[None, :] == tl.load(index + t * K + nth, mask=ok, other=-1).to(tl.int32)[:, None]
            direct = tl.where(here, slope[:, None], direct)
    gradient = direct
    if DSUMS or GATE == "softmax":
        over_all = direct if GATE == "softmax" else tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
        if DSUMS:
            counted = ok
            if MASK:
                counted = ok & (tl.load(mask + t, mask=ok, other=0) != 0)
            balance = tl.load(dsums + group.to(tl.int64) * R + r, mask=r < R, other=0.0)
            over_all += tl.where(counted[:, None], balance[None, :], 0.0)
        score = tl.load(logits + t[:, None] * R + r[None, :], mask=ok[:, None] & there, other=float("-inf"))
        share_all = softmax(score)
        slope_all = share_all * (over_all - tl.sum(share_all * over_all, 1)[:, None])
        gradient = slope_all if GATE == "softmax" else slope_all + direct
    narrow = gradient.to(dlogits.dtype.element_ty)
    tl.store(dlogits + t[:, None] * R + r[None, :], narrow, mask=ok[:, None] & there)
    if DX:
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)  # a step's addresses are its own: carried on, they take registers
            d_ok = (d < D)[None, :]
            w_at = weight + r.to(tl.int64)[:, None] * stride_wr + d.to(tl.int64)[None, :] * stride_wd
            w_tile = tl.load(w_at, mask=(r < R)[:, None] & d_ok, other=0.0).to(narrow.dtype)
            tl.store(dx + t[:, None] * D + d[None, :], tl.dot(narrow, w_tile).to(narrow.dtype), mask=ok[:, None] & d_ok)


def route(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    index: Tensor,
    gate: Tensor,
    logits: Tensor | None,
    groups: int,
    gate_function: str,
    precision: str,
) -> Tensor | None:
    """The K best rows of each token into index, their gates into gate, and all scores into logits if given.

    Shapes: x [T, D] with unit stride in its rows, fp32 or bf16; weight [R, D] of x's dtype or fp32; all others
    contiguous: bias fp32 [R], mask bool [T], index int64 [T, K], gate fp32 [T, K], logits fp32 [T, R].

    Returns:
        The sums of the softmaxes of each group's real tokens, fp32 [groups, R]; None for no group.
    """
    (T, D), R, K = x.shape, weight.shape[0], index.shape[1]
    length = T // max(groups, 1)
    blocks = Blocks.of(length, R, x.dtype, weight.dtype, config.architecture(x.device))
    parts = gate.new_empty(groups, cdiv(length, blocks.tokens), R)
    launch(
        route_kernel, max(groups, 1) * cdiv(length, blocks.tokens), x, weight, bias, mask, index, gate, logits, parts,
        R, D, K, length, x.stride(0), *weight.stride(),
        GATE=gate_function, BIAS=bias is not None, MASK=mask is not None, KEEP=logits is not None, SUMS=groups > 0,
        SPLIT=x.dtype != weight.dtype, PRECISION=precision,
        BLOCK_T=blocks.tokens, BLOCK_R=blocks.rows, BLOCK_D=blocks.depth, SLOTS=power_of_two(K),
        num_warps=blocks.warps,
    )  # fmt: skip
    return parts.sum(1) if groups else None


def gradient(
    dgate: Tensor | None,
    dsums: Tensor | None,
    weight: Tensor,
    mask: Tensor | None,
    index: Tensor,
    gate: Tensor,
    logits: Tensor,
    dlogits: Tensor,
    dx: Tensor | None,
    gate_function: str,
) -> None:
    """The gradient of the scores into dlogits [T, R]; times weight into dx [T, D], if given, in 16 bits.

    Shapes: dgate [T, K] and dsums [groups, R], fp32 and contiguous (None: zero), the others as for ``route``.
    """
    (R, D), (T, K) = weight.shape, index.shape
    groups = 1 if dsums is None else dsums.shape[0]
    length = T // groups
    target = config.architecture(dlogits.device)
    blocks = Blocks.of(length, R, dlogits.dtype, weight.dtype, target, gradient=True)
    launch(
        route_gradient_kernel, groups * cdiv(length, blocks.tokens), dgate, dsums, weight, mask, index, gate,
        logits, dlogits, dx, R, D, K, length, *weight.stride(),
        GATE=gate_function, DGATE=dgate is not None, DSUMS=dsums is not None, MASK=mask is not None, DX=dx is not None,
        BLOCK_T=blocks.tokens, BLOCK_R=blocks.rows, BLOCK_D=max(min(COLUMNS, SCORES // blocks.rows), 16),
        num_warps=min(blocks.warps, 8), num_stages=1 if blocks.rows > 256 else 2,  # two tiles of so many rows spill
    )  # fmt: skip

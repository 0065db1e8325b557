"""Sums of rows in a fixed order, in fp32: a token's k slots; any row's list of slots; the parts of a split product.

Void slots add 0.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sparse_ffn.backends.triton.launch import OF_TOKENS, cdiv, launch

BLOCK_T, BLOCK_S, BLOCK_N, SPLIT_BLOCK = 4, 32, 256, 1024


@triton.jit(do_not_specialize=OF_TOKENS)
def combine_kernel(
    y, inverse, gate, out, dots, dot_sums, T, N, K, n_dots, stride_y, stride_out,
    WEIGHTED: tl.constexpr, SORTED: tl.constexpr, DOTS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out[t] = sum over j of gate[t, j] · y[position of slot t·K + j], where it has one; see ``combine``."""
    n_blocks = tl.maximum(tl.cdiv(N, BLOCK_N), 1)  # without columns there are dots
    t = (tl.program_id(0) // n_blocks) * BLOCK_T + tl.arange(0, BLOCK_T)
    n = (tl.program_id(0) % n_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (t < T)[:, None] & (n < N)[None, :]
    total = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    for j in range(0, K):
        slot = t * K + j
        position = tl.load(inverse + slot, mask=t < T, other=-1) if SORTED else slot
        live = (position >= 0) & (t < T)
        if DOTS:  # noqa: SIM102 (the outer one is decided when this is compiled)
            if tl.program_id(0) % n_blocks == 0:
                sum_dots(dots + slot, dot_sums + slot, live, t < T, T * K, n_dots, BLOCK_T)
        at = y + position.to(tl.int64)[:, None] * stride_y + n[None, :]
        row = tl.load(at, mask=mask & live[:, None], other=0.0).to(tl.float32)
        if WEIGHTED:
            row *= tl.load(gate + slot, mask=live, other=0.0).to(tl.float32)[:, None]
        total += row
    at = out + t.to(tl.int64)[:, None] * stride_out + n[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def sum_dots(at, to, live, ok, stride, n_parts, BLOCK_T: tl.constexpr):
    """The sum of ``n_parts`` numbers that lie ``stride`` apart, for each slot of a block; 0 for void ones."""
    total = tl.zeros([BLOCK_T], tl.float32)
    for _ in range(0, n_parts):
        total += tl.load(at, mask=live, other=0.0)
        at += stride
    tl.store(to, total.to(to.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=OF_TOKENS)
def clear_void_kernel(y, order, offsets, E, S, N, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr):
    """y[order[p]] = 0 for the positions p from offsets[E] on."""
    n_blocks = tl.cdiv(N, BLOCK_N)
    p = (tl.program_id(0) // n_blocks) * BLOCK_S + tl.arange(0, BLOCK_S)
    n = (tl.program_id(0) % n_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    void = (p >= tl.load(offsets + E)) & (p < S)
    slot = tl.load(order + p, mask=void, other=0).to(tl.int64)
    zeros = tl.zeros([BLOCK_S, BLOCK_N], y.dtype.element_ty)
    tl.store(y + slot[:, None] * N + n[None, :], zeros, mask=void[:, None] & (n < N)[None, :])


@triton.jit
def segments_kernel(y, members, offsets, out, N, stride_y, stride_out, BLOCK_N: tl.constexpr):
    """out[r] = sum of y[members[i]] for offsets[r] <= i < offsets[r + 1]."""
    n_blocks = tl.cdiv(N, BLOCK_N)
    r = (tl.program_id(0) // n_blocks).to(tl.int64)
    n = (tl.program_id(0) % n_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_N], tl.float32)
    for i in range(tl.load(offsets + r), tl.load(offsets + r + 1)):
        row = tl.load(members + i).to(tl.int64)
        total += tl.load(y + row * stride_y + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out + r * stride_out + n, total.to(out.dtype.element_ty), mask=n < N)


@triton.jit(do_not_specialize=OF_TOKENS)
def add_parts_kernel(parts, out, size, n_parts, BLOCK: tl.constexpr):
    """out = parts[0] + parts[1] + ..., each of ``size`` numbers."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(0, n_parts):
        total += tl.load(parts + at, mask=at < size, other=0.0)
        parts += size  # the pointer has 64 bits; i * size would not
    tl.store(out + at, total.to(out.dtype.element_ty), mask=at < size)


def combine(
    y: Tensor,
    inverse: Tensor | None,
    gate: Tensor | None,
    out: Tensor,
    k: int,
    *,
    dots: tuple[Tensor, Tensor] | None = None,
) -> None:
    """out[t] = sum over j of gate[t, j] · y[inverse[t·k + j]]; without inverse y is in slot order, without gate 1.

    Slots whose inverse is -1 are void: they add 0.
    Shapes: y [S, N], inverse int32 [S], gate [T, k] contiguous, out [T, N]; y and out have
    unit stride in their rows. ``dots`` are numbers of the slots in parts, fp32 [P, S], and what receives their sums,
    [S] and 0 for void slots, which takes no launch of its own here; both contiguous.
    """
    T, N = out.shape
    parts, sums = (None, None) if dots is None else dots
    launch(
        combine_kernel, cdiv(T, BLOCK_T) * max(cdiv(N, BLOCK_N), 1), y, inverse, gate, out, parts, sums, T, N, k,
        0 if parts is None else parts.shape[0], y.stride(0), out.stride(0),
        WEIGHTED=gate is not None, SORTED=inverse is not None, DOTS=dots is not None, BLOCK_T=BLOCK_T, BLOCK_N=BLOCK_N,
        num_warps=2 * y.element_size(),  # a thread loads 16 bytes at once; with more, ptxas spilled
    )  # fmt: skip


def clear_void(y: Tensor, order: Tensor, offsets: Tensor) -> None:
    """Zero the rows of void slots in y [S, N], contiguous and in slot order."""
    S, N = y.shape
    launch(
        clear_void_kernel, cdiv(S, BLOCK_S) * cdiv(N, BLOCK_N), y, order, offsets, offsets.shape[0] - 1, S, N,
        BLOCK_S=BLOCK_S, BLOCK_N=BLOCK_N,
    )  # fmt: skip


def add_segments(y: Tensor, members: Tensor, offsets: Tensor, out: Tensor) -> None:
    """out[r] = sum of the rows of y that ``members[offsets[r] : offsets[r + 1]]`` names, zero if none.

    Shapes: y [S, N], members int32 [S], offsets int32 [R + 1], out [R, N]; y and out have unit stride in their
    rows.
    """
    R, N = out.shape
    launch(
        segments_kernel, R * cdiv(N, BLOCK_N), y, members, offsets, out, N, y.stride(0), out.stride(0), BLOCK_N=BLOCK_N
    )


def add_parts(parts: Tensor, out: Tensor) -> None:
    """out = parts.sum(0) in order, parts fp32 [P, *out.shape] contiguous."""
    launch(add_parts_kernel, cdiv(out.numel(), SPLIT_BLOCK), parts, out, out.numel(), parts.shape[0], BLOCK=SPLIT_BLOCK)

"""Top-k of a row of hidden units by a threshold, fused with activation, GLU and dropout; a program a token.

A score is not negative, so its fp32 bits order as integers do, those of a NaN above infinity's: the k-th largest is
found bit by bit from above, by counting how many scores reach a candidate. What reaches the threshold is taken, ties at
it from the lowest unit on.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_ffn.backends.triton.activations import activate
from sparse_ffn.backends.triton.launch import cdiv, launch, power_of_two

MAX_F = 1 << 13  # a program holds the scores of all units in its registers
CHOSEN = 512
NAN = tl.constexpr(0x7FC00000)  # all NaNs are equal, whatever their bits
# the lowest bit of fp32 that a number of each dtype can have: fp16's smallest ones are normal numbers there
LOWEST_BIT = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}


@triton.jit
def hidden_units(up, glu_gate, scale, f, mask, ACTIVATION: tl.constexpr, GLU: tl.constexpr, SCALE: tl.constexpr):
    """H at units f, rounded after each step as torch does (equal scores must be equal here too), as fp32."""
    dtype: tl.constexpr = up.dtype.element_ty
    pre = tl.load((glu_gate if GLU else up) + f, mask=mask, other=0.0)
    h = activate(pre.to(tl.float32), ACTIVATION).to(dtype).to(tl.float32)
    if GLU:
        h = (h * tl.load(up + f, mask=mask, other=0.0).to(tl.float32)).to(dtype).to(tl.float32)
    if SCALE:
        h = (h * tl.load(scale + f, mask=mask, other=0.0).to(tl.float32)).to(dtype).to(tl.float32)
    return h


@triton.jit
def select_kernel(
    up, glu_gate, scale, norm, index, F, k, lowest_bit, stride_up, stride_glu_gate, stride_scale,
    ACTIVATION: tl.constexpr, GLU: tl.constexpr, SCALE: tl.constexpr, NORM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The numbers of one token's k units of the largest |h|, ascending."""
    token = tl.program_id(0).to(tl.int64)
    f = tl.arange(0, BLOCK)
    ok = f < F
    score = tl.abs(
        hidden_units(
            up + token * stride_up,
            glu_gate + token * stride_glu_gate,
            scale + token * stride_scale,
            f,
            ok,
            ACTIVATION,
            GLU,
            SCALE,
        )
    )
    if NORM:
        score *= tl.load(norm + f, mask=ok, other=0.0)
    key = tl.where(score == score, score.to(tl.int32, bitcast=True), NAN)
    key = tl.where(ok, key, -1)

    threshold = 0
    for step in range(0, 31 - lowest_bit):
        candidate = threshold + (1 << (30 - step))
        count = tl.sum((key >= candidate).to(tl.int32), 0)
        threshold = tl.where(count >= k, candidate, threshold)

    above = key > threshold
    equal = key == threshold
    seen = tl.cumsum(above.to(tl.int32) + (equal.to(tl.int32) << 16), 0)  # two counts in one scan: F < 2^16
    n_equal = seen >> 16
    wanted = k - tl.sum(above.to(tl.int32), 0)
    place = (seen & 0xFFFF) + tl.minimum(n_equal, wanted) - 1
    tl.store(index + token * k + place, f, mask=above | (equal & (n_equal <= wanted)))


@triton.jit
def chosen_kernel(
    up, glu_gate, scale, index, saved_up, saved_glu_gate, h, k, stride_up, stride_glu_gate, stride_scale,
    ACTIVATION: tl.constexpr, GLU: tl.constexpr, SCALE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of one token's chosen units: up, glu_gate and h there."""
    n_blocks = tl.cdiv(k, BLOCK)
    token = (tl.program_id(0) // n_blocks).to(tl.int64)
    j = (tl.program_id(0) % n_blocks) * BLOCK + tl.arange(0, BLOCK)
    ok = j < k
    f = tl.load(index + token * k + j, mask=ok, other=0)
    up += token * stride_up
    glu_gate += token * stride_glu_gate
    tl.store(saved_up + token * k + j, tl.load(up + f, mask=ok, other=0.0), mask=ok)
    if GLU:
        tl.store(saved_glu_gate + token * k + j, tl.load(glu_gate + f, mask=ok, other=0.0), mask=ok)
    units = hidden_units(up, glu_gate, scale + token * stride_scale, f, ok, ACTIVATION, GLU, SCALE)
    tl.store(h + token * k + j, units.to(h.dtype.element_ty), mask=ok)


def fits(n_units: int) -> bool:
    """Whether the kernel takes so many hidden units."""
    return n_units <= MAX_F


def select(
    up: Tensor,
    glu_gate: Tensor | None,
    scale: Tensor | None,
    norm: Tensor | None,
    index: Tensor,
    saved_up: Tensor,
    saved_glu_gate: Tensor | None,
    h: Tensor,
    activation: str,
    by_gate: bool = False,
) -> None:
    """The k units of the largest |h| · norm of each token, ties to the lower unit.

    h is act(up), of a GLU act(glu_gate) · up, times scale; with by_gate a GLU's units go by act(glu_gate) · scale.
    Shapes: up, glu_gate and scale [T, F] with unit stride in their rows, norm fp32 [F]; into index int32 [T, k]
    ascending, and into saved_up, saved_glu_gate and h [T, k] those numbers there.
    """
    (T, F), k = up.shape, index.shape[1]
    block = max(power_of_two(F), 16)
    first = (up, up if glu_gate is None else glu_gate, up if scale is None else scale)
    strides = tuple(0 if x is None else x.stride(0) for x in (up, glu_gate, scale))
    units = {"ACTIVATION": activation, "GLU": glu_gate is not None, "SCALE": scale is not None}
    ranked, ranked_strides, ranked_units = first, strides, units
    if by_gate:  # which then is what an FFN without a GLU activates
        ranked, ranked_strides = (first[1], *first[1:]), (strides[1], *strides[1:])
        ranked_units = units | {"GLU": False}
    launch(
        select_kernel, T, *ranked, norm, index, F, k, 0 if norm is not None else LOWEST_BIT[up.dtype], *ranked_strides,
        **ranked_units, NORM=norm is not None, BLOCK=block, num_warps=min(max(block // 512, 1), 16),
    )  # fmt: skip
    block = max(min(power_of_two(k), CHOSEN), 16)
    launch(
        chosen_kernel, T * cdiv(k, block), *first, index, saved_up, saved_glu_gate, h, k, *strides,
        **units, BLOCK=block, num_warps=max(block // 128, 1),
    )  # fmt: skip

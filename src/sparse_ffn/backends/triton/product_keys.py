"""Product-key top-k: the k best of both halves, then of those pairs that can be, in one program a row; its gradient.

A score and its position make one 64-bit integer: the score's bits above, in an order that integers have too, the
position below, complemented. No two are equal and the larger one is the better one, ties to the lower position; a NaN
is larger than infinity.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sparse_ffn.backends.triton.launch import launch, power_of_two

MAX_K, MAX_N, CHUNK, GRADIENT = 64, 1 << 15, 512, 32
LAST = tl.constexpr(0x7FFFFFFF)
NONE = tl.constexpr(-(1 << 63))  # below every score
NAN = tl.constexpr(0x7FC00000)  # all NaNs are equal, whatever their bits


@triton.jit
def ordered(score):
    """fp32 scores as int32 in the same order, a NaN above infinity."""
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)  # -0 and 0 are equal
    bits = tl.where(score == score, bits, NAN)
    return tl.where(bits < 0, bits ^ LAST, bits)


@triton.jit
def number(order):
    """The fp32 score that ``ordered`` made this of; 0 for -0."""
    return tl.where(order < 0, order ^ LAST, order).to(tl.float32, bitcast=True)


@triton.jit
def pack(score, position):
    """fp32 scores and int32 positions as int64 keys."""
    return (ordered(score).to(tl.int64) << 32) | (position ^ LAST).to(tl.int64)


@triton.jit
def score_of(key):
    """The score in a key."""
    return number((key >> 32).to(tl.int32))


@triton.jit
def position_of(key):
    """The position in a key."""
    return (key & LAST).to(tl.int32) ^ LAST


@triton.jit
def best_keys(first, second, begin, n, CHUNK: tl.constexpr, TOP: tl.constexpr):
    """The TOP largest keys of a chunk of both halves [2, TOP], largest first; NONE where a half has fewer."""
    half = tl.arange(0, 2)[:, None]
    at = begin + tl.arange(0, CHUNK)[None, :]
    score_first = tl.load(first + at + 0 * half, mask=(at < n) & (half == 0), other=0.0).to(tl.float32)
    score_second = tl.load(second + at + 0 * half, mask=(at < n) & (half == 1), other=0.0).to(tl.float32)
    key = pack(tl.where(half == 0, score_first, score_second), at + 0 * half)
    return tl.topk(tl.where(at < n, key, NONE), TOP)


@triton.jit
def product_keys_kernel(
    first, second, out, n, k, width, stride_first, stride_second,
    CHUNK: tl.constexpr, MANY: tl.constexpr, TOP: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """The value indices of one row's k largest sums; width is min(n, k), MANY: n is more than a chunk."""
    row = tl.program_id(0).to(tl.int64)
    first += row * stride_first
    second += row * stride_second
    if MANY:
        best = tl.full([2, TOP], NONE, tl.int64)
        for begin in range(0, n, CHUNK):
            more = best_keys(first, second, begin, n, CHUNK, TOP)
            best = tl.topk(tl.reshape(tl.join(best, more), [2, 2 * TOP]), TOP)
    else:
        best = best_keys(first, second, 0, n, CHUNK, TOP)
    best = tl.reshape(best, [2 * TOP])

    # pair p is (i, j): row i of the candidates has the j < min(width, k // (i + 1))
    p = tl.arange(0, PAIRS)
    i = tl.zeros([PAIRS], tl.int32)
    j = p
    end = 0
    for r in range(0, width):
        length = tl.minimum(k // (r + 1), width)
        end += length
        passed = p >= end
        i += passed.to(tl.int32)
        j -= tl.where(passed, length, 0)
    exists = p < end
    i = tl.where(exists, i, 0)
    j = tl.where(exists, j, 0)
    key_first, key_second = tl.gather(best, i, 0), tl.gather(best, TOP + j, 0)
    total = score_of(key_first) + score_of(key_second)
    value = position_of(key_first) * n + position_of(key_second)
    best_pairs = tl.topk(tl.where(exists, pack(total, p), NONE), TOP)
    c = tl.arange(0, TOP)
    chosen = tl.where(c < k, position_of(best_pairs), 0)
    tl.store(out + row * k + c, tl.gather(value, chosen, 0).to(tl.int64), mask=c < k)


@triton.jit
def product_keys_gradient_kernel(
    grad, index, out, n, k, H, stride_t, stride_h, stride_half, stride_n, BLOCK: tl.constexpr
):
    """One half of one row: each sub-key's sum of the gradients of the pairs that have it, written once."""
    half = tl.program_id(0) % 2
    row = (tl.program_id(0) // 2).to(tl.int64)
    out += row // H * stride_t + row % H * stride_h + half * stride_half
    for start in range(0, k, BLOCK):
        j = start + tl.arange(0, BLOCK)
        pair = tl.load(index + row * k + j, mask=j < k, other=0)
        mine = tl.where(half == 0, pair // n, pair % n)
        total = tl.zeros([BLOCK], tl.float32)
        earlier = tl.zeros([BLOCK], tl.int32)
        for other in range(0, k, BLOCK):
            p = other + tl.arange(0, BLOCK)
            pair = tl.load(index + row * k + p, mask=p < k, other=0)
            theirs = tl.where(half == 0, pair // n, pair % n)
            same = (mine[:, None] == theirs[None, :]) & (p < k)[None, :]
            part = tl.load(grad + row * k + p, mask=p < k, other=0.0).to(tl.float32)
            total += tl.sum(tl.where(same, part[None, :], 0.0), 1)
            earlier += tl.sum((same & (p[None, :] < j[:, None])).to(tl.int32), 1)
        first = (j < k) & (earlier == 0)  # the first pair that has a sub-key writes for all of them
        tl.store(out + mine.to(tl.int64) * stride_n, total.to(out.dtype.element_ty), mask=first)


def fits(n: int, k: int) -> bool:
    """Whether the kernel takes a problem: what it sorts stays in registers, and n·n in 31 bits."""
    return k <= MAX_K and n < MAX_N


def product_keys(first: Tensor, second: Tensor, k: int, out: Tensor) -> None:
    """Value indices of the k largest sums of each row's pairs, largest first, into out int64 [M, k] contiguous.

    Shapes: first and second [M, n] with unit stride in their rows; k <= n², ``fits(n, k)``.
    """
    M, n = first.shape
    width, top = min(n, k), max(power_of_two(k), 2)  # not every Triton can compile a top-k of one
    chunk = max(min(power_of_two(n), CHUNK), top, 16)
    pairs = max(power_of_two(sum(min(width, k // (i + 1)) for i in range(width))), top, 16)
    warps = max(chunk // 64, 1) if n > chunk else max(chunk // 128, 1)  # merging takes more registers
    launch(
        product_keys_kernel, M, first, second, out, n, k, width, first.stride(0), second.stride(0),
        CHUNK=chunk, MANY=n > chunk, TOP=top, PAIRS=pairs, num_warps=warps,
    )  # fmt: skip


def product_keys_gradient(grad: Tensor, index: Tensor, out: Tensor) -> None:
    """Each sub-key's sum of the gradients of the pairs that have it, in the order of the pairs, into zeros.

    Shapes: grad and index int64 [T, H, k] contiguous, out [T, H, 2, n].
    """
    (T, H, k), n = grad.shape, out.shape[3]
    launch(
        product_keys_gradient_kernel, 2 * T * H, grad, index, out, n, k, H, *out.stride(),
        BLOCK=max(min(power_of_two(k), GRADIENT), 16), num_warps=1,
    )  # fmt: skip

"""The balance loss of a router's softmax sums, a few thousand numbers that one program adds up; and its gradient."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sparse_ffn.backends.triton.launch import cdiv, launch, power_of_two

BLOCK = 4096
TINY = tl.constexpr(2.0**-126)  # the smallest normal number of fp32


@triton.jit
def log_of(p):
    """Its logarithm, of a zero that of TINY; NaN stays."""
    return tl.log(tl.where(p < TINY, TINY, p))


@triton.jit
def entropy_kernel(sums, loss, n, count, scale, BLOCK: tl.constexpr):
    """See ``mean``."""
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        p = tl.load(sums + at, mask=at < n, other=0.0) / count
        total += p * log_of(p)
    tl.store(loss, tl.sum(total, 0) * scale)


@triton.jit
def entropy_gradient_kernel(grad, sums, slope, n, count, scale, BLOCK: tl.constexpr):
    """See ``gradient``."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    p = tl.load(sums + at, mask=at < n, other=0.0) / count
    tl.store(slope + at, (log_of(p) + 1) * (tl.load(grad) * scale / count), mask=at < n)


def mean(sums: Tensor, loss: Tensor, count: int, weight: float) -> None:
    """The weighted mean over the rows of the sums over p log p, p = sums / count, into loss: all fp32, contiguous."""
    n = sums.numel()
    scale = weight / sums.shape[0]
    launch(entropy_kernel, 1, sums, loss, n, float(count), scale, BLOCK=min(power_of_two(n), BLOCK), num_warps=8)


def gradient(grad: Tensor, sums: Tensor, slope: Tensor, count: int, weight: float) -> None:
    """That of ``mean`` with respect to sums, times grad, into slope."""
    n = sums.numel()
    scale = weight / sums.shape[0]
    launch(entropy_gradient_kernel, cdiv(n, BLOCK), grad, sums, slope, n, float(count), scale, BLOCK=BLOCK)

"""Operands of grouped products: tiles of rows and of matrices, by tensor descriptors or by pointers.

A descriptor lets the hardware of sm_90 and later (TMA) copy a whole tile, bounds checked, with one instruction. It
describes what lies in memory as a block: matrices, and rows in sorted order. Gathered rows go by pointers.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from sparse_ffn.backends.triton.config import Tile, has_descriptors


@triton.jit
def rows_tile(a, row, ok, start, K, stride, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, DESCRIBED: tl.constexpr):
    """A[row, start : start + BLOCK_K]; ``row`` is the first one of a block if A is described."""
    if DESCRIBED:
        tile = a.load([row, start])
    else:
        k = start + tl.arange(0, BLOCK_K)
        at = a + row.to(tl.int64)[:, None] * stride + k[None, :]
        if EVEN_K:
            tile = tl.load(at, mask=ok[:, None], other=0.0)
        else:
            tile = tl.load(at, mask=ok[:, None] & (k < K)[None, :], other=0.0)
    return tile


@triton.jit
def matrix_tile(
    b, expert, start, first, K, N, stride_e, stride_k, stride_n,
    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, EVEN_K: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """B[expert, start : start + BLOCK_K, first : first + BLOCK_N]."""
    if FORM == "k n":
        tile = tl.reshape(b.load([expert, start, first]), [BLOCK_K, BLOCK_N])
    elif FORM == "n k":
        tile = tl.trans(tl.reshape(b.load([expert, first, start]), [BLOCK_N, BLOCK_K]))
    else:
        k = start + tl.arange(0, BLOCK_K)
        n = first + tl.arange(0, BLOCK_N)
        across = k.to(tl.int64)[:, None] * stride_k + n.to(tl.int64)[None, :] * stride_n
        at = b + expert.to(tl.int64) * stride_e + across
        if EVEN_K:
            tile = tl.load(at, mask=(n < N)[None, :], other=0.0)
        else:
            tile = tl.load(at, mask=(k < K)[:, None] & (n < N)[None, :], other=0.0)
    return tile


def rows(block: tuple[int, int], *stacks: Tensor | None) -> tuple[tuple[Any, ...], bool]:
    """Stacks of rows [S, *] to be read in order, in blocks, and whether they are described: all, or none."""
    given = [x for x in stacks if x is not None]
    if block[1] < 8 or not all(_describable(x) and x.stride(1) == 1 for x in given):  # a copy has 16 bytes
        return stacks, False
    return tuple(None if x is None else _descriptor(x, *block) for x in stacks), True


def matrix(tile: Tile, b: Tensor | None) -> tuple[Any, tuple[int, ...], str]:
    """Matrices [E, K, N], their strides, and their form: which of K and N lies closest if described, else ""."""
    if b is None:
        return None, (0, 0, 0), ""
    if not _describable(b) or b.stride(0) == 1:
        return b, b.stride(), ""
    if b.stride(2) == 1:
        return _descriptor(b, 1, tile.k, tile.n), b.stride(), "k n"
    return _descriptor(b.mT, 1, tile.n, tile.k), b.stride(), "n k"


def _descriptor(x: Tensor, *block: int) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), list(block))


def _describable(x: Tensor) -> bool:
    """Whether TMA may copy it: some numbers of 16 bits, those side by side excepted multiples of 16 numbers apart."""
    if x.element_size() != 2 or not x.numel() or not has_descriptors(x.device):
        return False
    *_, step, closest = sorted(x.stride(), reverse=True)
    aligned = all(s > 0 and s % 16 == 0 for s in x.stride() if s != 1)
    return aligned and closest == 1 < step and x.data_ptr() % 16 == 0

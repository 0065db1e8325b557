"""Negative entropy: the operator. It has one backend; elsewhere ``routing.balance`` computes the same with torch."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from sparse_ffn.backends.choice import choose
from sparse_ffn.ops.negative_entropy.backend import Backend
from sparse_ffn.ops.operator import Operator


def negative_entropy_available(sums: Tensor) -> bool:
    """Whether the op computes this input now: fp32, on Triton."""
    return sums.dtype == torch.float32 and choose(sums) == "triton"


def negative_entropy(sums: Tensor, count: int, weight: float) -> Tensor:
    """The weighted mean over the groups of sum_e p_e log p_e, p = sums / count: a scalar, in fp32.

    Shapes: sums fp32 [groups, E], of count tokens each. At p = 0 the logarithm of the slope is that of the smallest
    normal number.
    """
    found: Tensor = _op.forward(sums, count, weight, "triton")
    return found


@functools.cache
def implementation(backend: str) -> Backend:
    """The backend, imported when it is first asked for."""
    from sparse_ffn.ops.negative_entropy import triton

    return triton


def _shapes(sums: Tensor, count: int, weight: float, backend: str) -> Tensor:
    return sums.new_empty(())


_op = Operator("negative_entropy", Backend, _shapes, implementation=implementation)

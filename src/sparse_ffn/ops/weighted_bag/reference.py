"""Weighted bag, the contract: the weights scattered into a [N, F] matrix, times the values."""

from __future__ import annotations

from torch import Tensor


def weighted_bag(values: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """out[n] = sum_j weight[n, j] * values[index[n, j]]; an index named twice counts twice.

    Shapes: values [F, O], index [N, K], weight [N, K] -> [N, O] in the dtype of values.
    """
    weight = weight.to(values.dtype)
    return weight.new_zeros(index.shape[0], values.shape[0]).scatter_add(1, index, weight) @ values

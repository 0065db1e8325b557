"""Weighted bag by gathering rows a chunk of bags at a time, or by one matrix product where the table is small."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_ffn.ops.segments import add_rows
from sparse_ffn.ops.weighted_bag import reference

# A gathered row is read at memory speed, a matrix product runs at arithmetic speed: on 2 CPU cores the product over the
# whole table is the faster one until the table has this many times the rows of a bag.
DENSE_UP_TO = 24
_CHUNK_BYTES = 4 << 20  # gathered rows at a time: about what stays in a core's cache


def forward(values: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """The bags [N, O]."""
    if _dense(values, index):
        return reference.weighted_bag(values, index, weight)
    out = values.new_empty(index.shape[0], values.shape[1])
    weight = weight.to(values.dtype)
    for part in _chunks(values, index):
        torch.bmm(weight[part].unsqueeze(1), values[index[part]], out=out[part].unsqueeze(1))
    return out


def backward(grad: Tensor, values: Tensor, index: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of values and weight."""
    small = weight.to(values.dtype)
    if _dense(values, index):
        table = small.new_zeros(index.shape[0], values.shape[0]).scatter_add(1, index, small)
        return table.t() @ grad, (grad @ values.t()).gather(1, index).to(weight.dtype)
    dvalues = values.new_zeros(values.shape, dtype=torch.promote_types(values.dtype, torch.float32))
    dweight = torch.empty_like(weight)
    for part in _chunks(values, index):
        dweight[part] = torch.bmm(values[index[part]], grad[part].unsqueeze(2)).squeeze(2).to(weight.dtype)
        rows = small[part].unsqueeze(2) * grad[part].unsqueeze(1)
        dvalues += add_rows(values.shape[0], index[part].reshape(-1), rows.flatten(0, 1).to(dvalues.dtype))
    return dvalues.to(values.dtype), dweight


def _dense(values: Tensor, index: Tensor) -> bool:
    return values.shape[0] <= DENSE_UP_TO * index.shape[1]


def _chunks(values: Tensor, index: Tensor) -> list[slice]:
    bag_bytes = max(1, index.shape[1] * values.shape[1] * values.element_size())
    size = max(1, _CHUNK_BYTES // bag_bytes)
    return [slice(a, a + size) for a in range(0, index.shape[0], size)]

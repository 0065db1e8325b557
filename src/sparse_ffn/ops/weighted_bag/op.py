"""Weighted bag: the operator, its row-sparse gradient, and the choice of the backend."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from sparse_ffn.backends.choice import choose
from sparse_ffn.ops.autocast import autocast_dtype, without_autocast
from sparse_ffn.ops.indices import Indices, check_indices, checked
from sparse_ffn.ops.library import under_transforms
from sparse_ffn.ops.operator import Operator
from sparse_ffn.ops.weighted_bag import reference
from sparse_ffn.ops.weighted_bag.backend import Backend


def weighted_bag(values: Tensor, index: Tensor, weight: Tensor, *, sparse_grad: bool = False) -> Tensor:
    """out[n] = sum_j weight[n, j] * values[index[n, j]]; arguments are trusted to fit.

    Shapes: values [F, O], index int64 [N, K], weight [N, K] (its own dtype); result [N, O] in the dtype of values or
    autocast's, to which the sums are rounded: few rows of a large table are read, and no copy of it is made. With
    ``sparse_grad`` the gradient of values is a coalesced sparse tensor of the rows that were read (not under
    torch.compile); on a GPU its size is why the backward pass waits for the device once.
    """
    with without_autocast(values):
        out = _bags(values, index, weight, sparse_grad and values.requires_grad and torch.is_grad_enabled())
    return out.to(autocast_dtype(values))


def _bags(values: Tensor, index: Tensor, weight: Tensor, sparse_grad: bool) -> Tensor:
    """The bags in the dtype of values."""
    out: Tensor
    if sparse_grad:
        if under_transforms():
            raise RuntimeError(
                "sparse_grad=True does not work inside torch.func's transforms, nor in forward-mode AD: take "
                "sparse_grad=False"
            )
        out = _SparseGradient.apply(values, index, weight)  # type: ignore[no-untyped-call]
    elif (chosen := choose(values)) == "reference":
        out = reference.weighted_bag(values, checked("index", index, values.shape[0], False), weight)
    else:
        out = _op.forward(values, index, weight, chosen)
    return out


class _SparseGradient(torch.autograd.Function):
    """The same bag whose gradient for the table holds only the rows that were read."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        chosen = choose(values)
        ctx.chosen = "torch" if chosen == "reference" else chosen  # the reference has no sparse gradient
        ctx.save_for_backward(values, index, weight)
        if ctx.chosen != "cpu":
            check_indices(*_indices(values, index))
        return implementation(ctx.chosen).forward(values, index, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, index, weight = ctx.saved_tensors
        backend = implementation(ctx.chosen)
        with without_autocast(grad):
            if not ctx.needs_input_grad[0]:
                return None, None, backend.backward(grad, values, index, weight, False).weight
            rows, drows, dweight = backend.backward_rows(grad, values, index, weight)
        dvalues = torch.sparse_coo_tensor(
            rows.unsqueeze(0), drows, values.shape, is_coalesced=True, check_invariants=False
        )
        return dvalues, None, dweight


@functools.cache
def implementation(backend: str) -> Backend:
    """A backend's module, imported when it is first asked for: triton takes a second, and is not everywhere."""
    from sparse_ffn.ops.weighted_bag import cpu, cuda, torch

    if backend == "triton":
        from sparse_ffn.ops.weighted_bag import triton

        return triton
    others: dict[str, Backend] = {"cpu": cpu, "cuda": cuda, "torch": torch}
    return others[backend]


def _shapes(values: Tensor, index: Tensor, weight: Tensor, backend: str) -> Tensor:
    return values.new_empty(index.shape[0], values.shape[1])


def _indices(values: Tensor, index: Tensor, *rest: Any) -> tuple[Indices]:
    return (("index", index, values.shape[0], False),)


def _backward_indices(grad: Tensor, *rest: Any) -> tuple[Indices]:
    return _indices(*rest)


_op = Operator("weighted_bag", Backend, _shapes, implementation=implementation, indices=(_indices, _backward_indices))

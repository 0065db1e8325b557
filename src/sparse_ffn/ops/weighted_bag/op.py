"""Weighted bag: the torch.library op, its fake, its autograd (dense or row-sparse), and the choice of the backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_ffn.backends.choice import choose
from sparse_ffn.ops.autocast import autocast_dtype, weights_for
from sparse_ffn.ops.indices import check_indices, checked
from sparse_ffn.ops.library import define, implementation, refuse_double_backward, set_autograd, under_transforms
from sparse_ffn.ops.weighted_bag import reference


def weighted_bag(values: Tensor, index: Tensor, weight: Tensor, *, sparse_grad: bool = False) -> Tensor:
    """out[n] = sum_j weight[n, j] * values[index[n, j]]; arguments are trusted to fit.

    Shapes: values [F, O], index int64 [N, K], weight [N, K] (its own dtype); result [N, O] in the dtype of values or
    autocast's. With ``sparse_grad`` the gradient of values is a coalesced sparse tensor of the rows that were read
    (not under torch.compile); on a GPU its size is why the backward pass waits for the device once.
    """
    if sparse_grad:  # casts inside: torch's cast cannot pass a sparse gradient on
        if under_transforms():
            raise RuntimeError("sparse_grad=True does not work inside torch.func's transforms: take sparse_grad=False")
        out: Tensor = _SparseGradient.apply(values, index, weight)  # type: ignore[no-untyped-call]
        return out
    dtype = autocast_dtype(values)
    chosen = choose(values, dtype)
    (values,) = weights_for(chosen, dtype, values)
    if chosen == "reference":
        return reference.weighted_bag(values, checked("index", index, values.shape[0], False), weight)
    out = _forward(values, index, weight, dtype, chosen)
    return out


def _forward_kernel(values: Tensor, index: Tensor, weight: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    check_indices(backend, ("index", index, values.shape[0], False))
    forward = implementation("weighted_bag", backend).forward
    out: Tensor = forward(values, index, weight, *(() if values.dtype == dtype else (dtype,)))
    return out


def _forward_fake(values: Tensor, index: Tensor, weight: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    return values.new_empty(index.shape[0], values.shape[1], dtype=dtype)


def _backward_kernel(
    grad: Tensor, values: Tensor, index: Tensor, weight: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    check_indices(backend, ("index", index, values.shape[0], False))
    out: tuple[Tensor, Tensor] = implementation("weighted_bag", backend).backward(
        grad.contiguous(), values, index, weight
    )
    return out


def _backward_fake(grad: Tensor, values: Tensor, index: Tensor, weight: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return values.new_empty(values.shape), weight.new_empty(weight.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.chosen = inputs[4]


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    dvalues, dweight = _backward(grad, *ctx.saved_tensors, ctx.chosen)
    return dvalues, None, dweight, None, None


class _SparseGradient(torch.autograd.Function):
    """The same bag whose gradient for the table holds only the rows that were read."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        ctx.dtype = values.dtype
        dtype = autocast_dtype(values)
        chosen = choose(values, dtype)
        ctx.chosen = "torch" if chosen == "reference" else chosen  # the reference has no sparse gradient
        (values,) = weights_for(ctx.chosen, dtype, values)
        ctx.save_for_backward(values, index, weight)
        return _forward_kernel(values, index, weight, dtype, ctx.chosen)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, index, weight = ctx.saved_tensors
        rows, drows, dweight = implementation("weighted_bag", ctx.chosen).backward_rows(grad, values, index, weight)
        dvalues = torch.sparse_coo_tensor(
            rows.unsqueeze(0), drows.to(ctx.dtype), values.shape, is_coalesced=True, check_invariants=False
        )
        return dvalues, None, dweight


_forward = define(
    "weighted_bag(Tensor values, Tensor index, Tensor weight, ScalarType dtype, str backend) -> Tensor",
    _forward_kernel,
    _forward_fake,
)
_backward = define(
    "weighted_bag_backward(Tensor grad, Tensor values, Tensor index, Tensor weight, str backend) "
    "-> (Tensor dvalues, Tensor dweight)",
    _backward_kernel,
    _backward_fake,
)
_forward = set_autograd(_forward, _autograd, _setup_context)
_backward = refuse_double_backward(_backward)

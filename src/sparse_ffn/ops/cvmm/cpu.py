"""CVMM in the native core."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_ffn import native
from sparse_ffn.native import DTYPES, Cvmm, pointer
from sparse_ffn.ops.library import absent
from sparse_ffn.ops.segments import is_transposed, unsort


def forward(
    x: Tensor,
    weight: Tensor,
    expert: Tensor,
    gather: Tensor | None,
    scatter: Tensor | None,
    reduction: Tensor | None,
    n_out: int,
) -> Tensor:
    """Output [n_out, L]."""
    arguments, _keep, _ = _arguments(x, weight, expert, gather, scatter, reduction, n_out)
    out = native.empty(n_out, weight.shape[2], dtype=x.dtype)
    native.call("cvmm_forward", arguments, out.data_ptr())
    return out


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    expert: Tensor,
    gather: Tensor | None,
    scatter: Tensor | None,
    reduction: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and reduction (empty if absent)."""
    x = native.rows(x)
    arguments, _keep, order = _arguments(x, weight, expert, gather, scatter, reduction, grad.shape[0])
    grad, dx = native.rows(grad), native.empty(*x.shape, dtype=x.dtype)
    dscale = None if reduction is None else native.empty(expert.shape[0], dtype=torch.float32)
    transposed = is_transposed(weight)
    dweight = native.empty(*(weight.mT if transposed else weight).shape, dtype=x.dtype)
    call = "cvmm_backward", arguments, grad.data_ptr(), grad.stride(0), dx.data_ptr()
    if transposed:
        native.call(*call, None, pointer(dscale))
        mirrored, _keep_too, _ = _arguments(grad, weight.mT, expert, scatter, gather, reduction, x.shape[0])
        native.call("cvmm_backward", mirrored, x.data_ptr(), x.stride(0), None, dweight.data_ptr(), None)
        dweight = dweight.mT
    else:
        native.call(*call, dweight.data_ptr(), pointer(dscale))
    if reduction is None or dscale is None:
        return dx, dweight, absent(x)
    return dx, dweight, unsort(dscale.unsqueeze(1), order).squeeze(1).to(reduction.dtype)


def weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, expert: Tensor) -> Tensor:
    """Gradient of weight alone, of which only the shape matters."""
    arguments, _keep, _ = _arguments(x, weight, expert, None, None, None, grad.shape[0])
    grad, dweight = native.rows(grad), native.empty(*weight.shape, dtype=x.dtype)
    native.call("cvmm_backward", arguments, grad.data_ptr(), grad.stride(0), None, dweight.data_ptr(), None)
    return dweight


def _arguments(
    x: Tensor,
    weight: Tensor,
    expert: Tensor,
    gather: Tensor | None,
    scatter: Tensor | None,
    reduction: Tensor | None,
    n_out: int,
) -> tuple[Cvmm, tuple[Tensor | None, ...], Tensor]:
    """The core's argument block, the tensors whose memory it points to, and the slot at each sorted position."""
    n_experts, m, n = weight.shape
    if weight.stride(1) != 1 and weight.stride(2) != 1:
        weight = weight.contiguous()
    x = native.rows(x)
    order, offsets = native.route(expert, n_experts)
    gathered, scattered = (
        order if index is None else index.index_select(0, order).to(torch.int32) for index in (gather, scatter)
    )
    scale = None if reduction is None else reduction.index_select(0, order).float()
    arguments = Cvmm(
        *(x.shape[0], n_out, expert.shape[0], n_experts, m, n),
        *(DTYPES[x.dtype], torch.get_num_threads()),
        *(x.data_ptr(), x.stride(0), weight.data_ptr(), *weight.stride()),
        *(pointer(t) for t in (offsets, gathered, scattered, scale)),
    )
    return arguments, (x, weight, offsets, gathered, scattered, scale), order

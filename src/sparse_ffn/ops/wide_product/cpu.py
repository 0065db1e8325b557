"""Wide product in the native core: low-precision operands are multiplied as they are."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_ffn import native
from sparse_ffn.native import DTYPES, WideProduct


def forward(x: Tensor, w: Tensor) -> Tensor:
    """As the reference."""
    x = x if x.stride(2) == 1 else x.contiguous()
    w = w.contiguous()
    out = native.empty(*x.shape[:2], w.shape[1], dtype=torch.float32)
    arguments = WideProduct(
        *(*x.shape[:2], *w.shape[1:], *x.stride()[:2]),
        *(DTYPES[x.dtype], torch.get_num_threads(), x.data_ptr(), w.data_ptr()),
    )
    native.call("wide_product_forward", arguments, out.data_ptr())
    return out


def backward(grad: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and w. They are rounded to their dtype in any case: so may the factor be."""
    grad = grad.to(x.dtype)
    dx, dw = (native.empty(*t.shape, dtype=t.dtype) for t in (x, w))
    return torch.bmm(grad, w, out=dx), torch.bmm(grad.transpose(1, 2), x, out=dw)

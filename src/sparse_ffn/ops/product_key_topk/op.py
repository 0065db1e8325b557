"""Product-key top-k: the torch.library op, its fake, and the choice of the backend. Indices carry no gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_ffn.backend import choose
from sparse_ffn.ops.library import define
from sparse_ffn.ops.product_key_topk import cpu as native
from sparse_ffn.ops.product_key_topk import reference
from sparse_ffn.ops.product_key_topk import torch as plain


def product_key_topk(first: Tensor, second: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of the n x n sums of two score tables; arguments are trusted to fit.

    Shapes: first and second [..., n] -> scores [..., k], differentiable, and value indices int64 [..., k].
    """
    chosen = choose(first)
    if chosen == "reference":
        index = reference.product_key_topk(first.detach(), second.detach(), k)
    else:
        index = _op(first.detach(), second.detach(), k, chosen)
    n = first.shape[-1]
    return first.gather(-1, index // n) + second.gather(-1, index % n), index


_KERNELS = {
    "torch": plain.product_key_topk,
    "cpu": native.product_key_topk,
    "cuda": plain.product_key_topk,  # csrc/cuda has no kernel for it
}


def _kernel(first: Tensor, second: Tensor, k: int, backend: str) -> Tensor:
    return _KERNELS[backend](first, second, k)


def _fake(first: Tensor, second: Tensor, k: int, backend: str) -> Tensor:
    return first.new_empty((*first.shape[:-1], k), dtype=torch.int64)


_op = define("product_key_topk(Tensor first, Tensor second, int k, str backend) -> Tensor", _kernel, _fake)

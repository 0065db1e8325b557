"""Product-key top-k: the torch.library op, its fake, its autograd, and the choice of the backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_ffn.backends.choice import choose
from sparse_ffn.ops.indices import check_indices
from sparse_ffn.ops.library import define, implementation, refuse_double_backward, set_autograd
from sparse_ffn.ops.product_key_topk import reference


def product_key_topk(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of the n x n sums of two score tables; arguments are trusted to fit.

    Shapes: scores [T, H, 2, n], of any strides without gaps -> sums [T, H, k], differentiable, and value indices int64
    [T, H, k].
    """
    chosen = choose(scores)
    if chosen == "reference":
        first, second = scores.unbind(2)
        index = reference.product_key_topk(first.detach(), second.detach(), k)
        return reference.sums(first, second, index), index
    best, index = _forward(scores, k, chosen)
    return best, index


def _forward_kernel(scores: Tensor, k: int, backend: str) -> tuple[Tensor, Tensor]:
    out: tuple[Tensor, Tensor] = implementation("product_key_topk", backend).forward(scores, k)
    return out


def _forward_fake(scores: Tensor, k: int, backend: str) -> tuple[Tensor, Tensor]:
    best = scores.new_empty(*scores.shape[:2], k)
    return best, torch.empty_like(best, dtype=torch.int64)


def _backward_kernel(grad: Tensor, index: Tensor, n: int, stride: list[int], backend: str) -> Tensor:
    check_indices(backend, ("index", index, n * n, False))
    out: Tensor = implementation("product_key_topk", backend).backward(grad, index, n, stride)
    return out


def _backward_fake(grad: Tensor, index: Tensor, n: int, stride: list[int], backend: str) -> Tensor:
    return torch.empty_strided((*grad.shape[:2], 2, n), stride, dtype=grad.dtype, device=grad.device)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    scores, _, chosen = inputs
    ctx.save_for_backward(output[1])  # not the scores: they are large, and their shape is enough
    ctx.options = scores.shape[-1], scores.stride(), chosen
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx: Any, grad: Tensor, unused: Any) -> tuple[Tensor | None, ...]:
    return _backward(grad, *ctx.saved_tensors, *ctx.options), None, None


_forward = define(
    "product_key_topk(Tensor scores, int k, str backend) -> (Tensor best, Tensor index)", _forward_kernel, _forward_fake
)
_backward = define(
    "product_key_topk_backward(Tensor grad, Tensor index, SymInt n, SymInt[] stride, str backend) -> Tensor",
    _backward_kernel,
    _backward_fake,
)
_forward = set_autograd(_forward, _autograd, _setup_context)
_backward = refuse_double_backward(_backward)

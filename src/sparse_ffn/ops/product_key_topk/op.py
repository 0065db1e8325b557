"""Product-key top-k: the operator, and the choice of the backend."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_ffn.backends.choice import choose
from sparse_ffn.ops.indices import Indices
from sparse_ffn.ops.operator import Operator
from sparse_ffn.ops.product_key_topk import reference
from sparse_ffn.ops.product_key_topk.backend import Backend, Best


def product_key_topk(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of the n x n sums of two score tables; arguments are trusted to fit.

    Shapes: scores [T, H, 2, n], not expanded -> sums [T, H, k], differentiable, and the indices of
    their values int64 [T, H, k].
    """
    chosen = choose(scores)
    if chosen == "reference":
        first, second = scores.unbind(2)
        index = reference.product_key_topk(first.detach(), second.detach(), k)
        return reference.sums(first, second, index), index
    best, index = _op.forward(scores, k, chosen)
    return best, index


@functools.cache
def implementation(backend: str) -> Backend:
    """A backend's module, imported when it is first asked for: triton takes a second, and is not everywhere."""
    from sparse_ffn.ops.product_key_topk import cpu, torch

    if backend == "triton":
        from sparse_ffn.ops.product_key_topk import triton

        return triton
    others: dict[str, Backend] = {"cpu": cpu, "cuda": torch, "torch": torch}  # csrc/cuda has no kernel for it
    return others[backend]


def _shapes(scores: Tensor, k: int, backend: str) -> Best:
    best = scores.new_empty(*scores.shape[:2], k)
    return Best(best, torch.empty_like(best, dtype=torch.int64))


def _backward_indices(grad: Tensor, selected: Tensor, size: Sequence[int], stride: Sequence[int]) -> tuple[Indices]:
    return (("index", selected, size[-1] ** 2, False),)


_op = Operator("product_key_topk", Backend, _shapes, implementation=implementation, indices=(None, _backward_indices))

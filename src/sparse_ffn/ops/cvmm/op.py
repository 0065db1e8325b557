"""CVMM: the operator, and the choice of the backend."""

from __future__ import annotations

import functools

from torch import Tensor

from sparse_ffn.backends.choice import choose
from sparse_ffn.ops.autocast import autocast_dtype, cast, casts_inside
from sparse_ffn.ops.cvmm import reference
from sparse_ffn.ops.cvmm.backend import Backend, Slots
from sparse_ffn.ops.indices import Indices, checked
from sparse_ffn.ops.operator import Operator
from sparse_ffn.ops.products import product_dtype
from sparse_ffn.ops.segments import is_transposed


def cvmm(
    x: Tensor,
    weight: Tensor,
    expert: Tensor,
    *,
    gather: Tensor | None = None,
    scatter: Tensor | None = None,
    reduction: Tensor | None = None,
    n_out: int | None = None,
) -> Tensor:
    """out[scatter[s]] += reduction[s] · x[gather[s]] @ weight[expert[s]]; arguments are trusted to fit.

    Shapes: x [N, M], weight [E, M, L], expert, gather, scatter int64 [S], reduction [S] (its own dtype); result
    [n_out, L] in x's dtype or autocast's. Without gather slot s reads row s, without scatter it writes row s. A slot
    whose expert is E is void: it adds 0 and reads no matrix.
    """
    dtype = autocast_dtype(x)
    rows = expert.shape[0] if n_out is None else n_out
    chosen = choose(x)
    inner = product_dtype(chosen, weight, expert.shape[0], dtype)
    x = cast(x, inner)
    weight = weight if casts_inside(chosen) else weight.to(inner)
    if chosen == "reference":
        slots = Slots(expert, gather, scatter, reduction)
        expert, gather, scatter = (checked(*indices) for indices in _indices(x, weight, slots, rows))
        return reference.cvmm(x, weight, Slots(expert, gather, scatter, reduction), rows)
    out: Tensor = _op.forward(x, weight, expert, gather, scatter, reduction, rows, chosen)
    return out.to(dtype)


@functools.cache
def implementation(backend: str) -> Backend:
    """A backend's module, imported when it is first asked for: triton takes a second, and is not everywhere."""
    from sparse_ffn.ops.cvmm import cpu, cuda, torch

    if backend == "triton":
        from sparse_ffn.ops.cvmm import triton

        return triton
    others: dict[str, Backend] = {"cpu": cpu, "cuda": cuda, "torch": torch}
    return others[backend]


def _shapes(x: Tensor, weight: Tensor, slots: Slots, n_out: int, backend: str) -> Tensor:
    return x.new_empty(n_out, weight.shape[2])


def _gradient(like: Tensor) -> Tensor:
    if like.ndim == 3 and is_transposed(like):
        return like.new_empty(like.mT.shape).mT
    return like.new_empty(like.shape)


def _indices(x: Tensor, weight: Tensor, slots: Slots, n_out: int) -> tuple[Indices, ...]:
    return (
        ("expert_index", slots.expert, weight.shape[0], True),
        ("gather_index", slots.gather, x.shape[0], False),
        ("scatter_index", slots.scatter, n_out, False),
    )


def _backward_indices(grad: Tensor, x: Tensor, weight: Tensor, slots: Slots, needs: bool) -> tuple[Indices, ...]:
    return _indices(x, weight, slots, grad.shape[0])


_op = Operator(
    "cvmm",
    Backend,
    _shapes,
    implementation=implementation,
    indices=(_indices, _backward_indices),
    gradient=_gradient,
)

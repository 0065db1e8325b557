"""CVMM by quantised rows: the operator, and the choice of the backend."""

from __future__ import annotations

import functools

from torch import Tensor

from sparse_ffn.backends.choice import choose
from sparse_ffn.ops.autocast import autocast_dtype, cast
from sparse_ffn.ops.codes import Codes
from sparse_ffn.ops.cvmm.backend import Slots
from sparse_ffn.ops.indices import Indices, checked
from sparse_ffn.ops.operator import Operator
from sparse_ffn.ops.products import product_dtype
from sparse_ffn.ops.quantized_cvmm import reference
from sparse_ffn.ops.quantized_cvmm.backend import Backend


def quantized_cvmm(
    x: Tensor,
    codes: Codes,
    expert: Tensor,
    *,
    down: bool,
    gather: Tensor | None = None,
    scatter: Tensor | None = None,
    reduction: Tensor | None = None,
    n_out: int | None = None,
) -> Tensor:
    """out[scatter[s]] += reduction[s] · x[gather[s]] @ W[expert[s]] by the codes of rows [E, G, C].

    Up, a row is an output's: W[e] is rows[e].T, [C, G]. Down, a row is an input's: W[e] is rows[e], [G, C]. x is never
    quantised: this is ``cvmm`` with the numbers that the codes stand for, in x's dtype (autocast's under autocast), and
    with its other arguments. The codes have no gradient.
    """
    dtype = autocast_dtype(x)
    rows = expert.shape[0] if n_out is None else n_out
    chosen = choose(x)
    inner = product_dtype(chosen, codes.scale, expert.shape[0], dtype)
    x, codes = cast(x, inner), codes.to(inner)
    if chosen == "reference":
        slots = Slots(expert, gather, scatter, reduction)
        expert, gather, scatter = (checked(*indices) for indices in _indices(x, codes, slots, down, rows))
        return reference.quantized_cvmm(x, codes, Slots(expert, gather, scatter, reduction), down, rows)
    out: Tensor = _op.forward(x, *codes, expert, gather, scatter, reduction, down, rows, chosen)
    return out.to(dtype)


@functools.cache
def implementation(backend: str) -> Backend:
    """A backend's module, imported when it is first asked for; cuda has no kernels of its own and takes torch's way."""
    from sparse_ffn.ops.quantized_cvmm import cpu, torch

    if backend == "triton":
        from sparse_ffn.ops.quantized_cvmm import triton

        return triton
    return cpu if backend == "cpu" else torch


def _shapes(x: Tensor, codes: Codes, slots: Slots, down: bool, n_out: int, backend: str) -> Tensor:
    return x.new_empty(n_out, codes.shape[2 if down else 1])


def _indices(x: Tensor, codes: Codes, slots: Slots, down: bool, n_out: int) -> tuple[Indices, ...]:
    return (
        ("expert_index", slots.expert, codes.qdata.shape[0], True),
        ("gather_index", slots.gather, x.shape[0], False),
        ("scatter_index", slots.scatter, n_out, False),
    )


def _backward_indices(grad: Tensor, x: Tensor, codes: Codes, slots: Slots, down: bool) -> tuple[Indices, ...]:
    return _indices(x, codes, slots, down, grad.shape[0])


_op = Operator("quantized_cvmm", Backend, _shapes, implementation=implementation, indices=(_indices, _backward_indices))

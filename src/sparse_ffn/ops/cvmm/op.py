"""CVMM: the torch.library op, its fake, its autograd, and the choice of the backend."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sparse_ffn.backends.choice import choose
from sparse_ffn.ops.autocast import autocast_dtype, cast, weights_for
from sparse_ffn.ops.cvmm import reference
from sparse_ffn.ops.indices import Indices, check_indices, checked
from sparse_ffn.ops.library import absent, define, implementation, refuse_double_backward, set_autograd
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
    x = cast(x, dtype)
    rows = expert.shape[0] if n_out is None else n_out
    chosen = choose(x)
    (weight,) = weights_for(chosen, dtype, weight)
    if chosen == "reference":
        expert, gather, scatter = (checked(*indices) for indices in _indices(x, weight, expert, gather, scatter, rows))
        return reference.cvmm(x, weight, expert, gather, scatter, reduction, rows)
    out: Tensor = _forward(x, weight, expert, gather, scatter, reduction, rows, chosen)
    return out


def _indices(
    x: Tensor, weight: Tensor, expert: Tensor, gather: Tensor | None, scatter: Tensor | None, n_out: int
) -> tuple[Indices, ...]:
    return (
        ("expert_index", expert, weight.shape[0], True),
        ("gather_index", gather, x.shape[0], False),
        ("scatter_index", scatter, n_out, False),
    )


def _forward_kernel(*args: Any) -> Tensor:
    x, weight, expert, gather, scatter, _, n_out, backend = args
    check_indices(backend, *_indices(x, weight, expert, gather, scatter, n_out))
    out: Tensor = implementation("cvmm", backend).forward(*args[:-1])
    return out


def _forward_fake(
    x: Tensor,
    weight: Tensor,
    expert: Tensor,
    gather: Tensor | None,
    scatter: Tensor | None,
    reduction: Tensor | None,
    n_out: int,
    backend: str,
) -> Tensor:
    return x.new_empty(n_out, weight.shape[2])


def _backward_kernel(grad: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, expert, gather, scatter, _, backend = rest
    check_indices(backend, *_indices(x, weight, expert, gather, scatter, grad.shape[0]))
    out: tuple[Tensor, Tensor, Tensor] = implementation("cvmm", backend).backward(grad.contiguous(), *rest[:-1])
    return out


def _backward_fake(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    expert: Tensor,
    gather: Tensor | None,
    scatter: Tensor | None,
    reduction: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dreduction = absent(x) if reduction is None else reduction.new_empty(reduction.shape)
    E, M, L = weight.shape
    if is_transposed(weight):
        return x.new_empty(x.shape), weight.new_empty(E, L, M).transpose(1, 2), dreduction
    return x.new_empty(x.shape), weight.new_empty(E, M, L), dreduction


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, _, ctx.chosen = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    dx, dweight, dreduction = _backward(grad, *saved, ctx.chosen)
    return dx, dweight, None, None, None, None if saved[5] is None else dreduction, None, None


_forward = define(
    "cvmm(Tensor x, Tensor weight, Tensor expert, Tensor? gather, Tensor? scatter, Tensor? reduction, SymInt n_out, "
    "str backend) -> Tensor",
    _forward_kernel,
    _forward_fake,
)
_backward = define(
    "cvmm_backward(Tensor grad, Tensor x, Tensor weight, Tensor expert, Tensor? gather, Tensor? scatter, "
    "Tensor? reduction, str backend) -> (Tensor dx, Tensor dweight, Tensor dreduction)",
    _backward_kernel,
    _backward_fake,
)
_forward = set_autograd(_forward, _autograd, _setup_context)
_backward = refuse_double_backward(_backward)

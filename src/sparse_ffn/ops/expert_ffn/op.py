"""Expert FFN: the operator, and the choice of the backend."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from sparse_ffn.backends.choice import choose
from sparse_ffn.ops.autocast import autocast_dtype, cast, casts_inside
from sparse_ffn.ops.expert_ffn import reference
from sparse_ffn.ops.expert_ffn.backend import Backend, Saved
from sparse_ffn.ops.indices import Indices, checked
from sparse_ffn.ops.operator import Operator, wanted
from sparse_ffn.ops.products import product_dtype
from sparse_ffn.ops.units import Units


def expert_ffn(
    x: Tensor,
    experts: Units,
    index: Tensor,
    gate: Tensor,
    *,
    dropout_mask: Tensor | None = None,
    activation: str = "relu",
) -> Tensor:
    """y[t] = sum_j gate[t, j] * values[e].T h(x[t]; e) with e = index[t, j]; arguments are trusted to fit.

    Shapes: x [T, D], experts of keys [E, G, D] and values [E, G, O], index int64 [T, K], gate [T, K] (its own dtype),
    dropout_mask [T, K, G] (dropout's multiplier, no gradient); result [T, O] in x's dtype or autocast's. A slot whose
    index is E is void: it adds 0, reads no weights, and its gate's gradient is 0.
    """
    dtype = autocast_dtype(x)
    chosen = choose(x)
    inner = product_dtype(chosen, experts.keys, index.numel(), dtype)
    x, dropout_mask = cast(x, inner), cast(dropout_mask, inner)
    experts = experts if casts_inside(chosen) else experts.to(inner)
    if chosen == "reference":
        index = checked("index", index, experts.keys.shape[0], True)
        return reference.expert_ffn(x, experts, index, gate, dropout_mask, activation)
    arguments = (x, *experts, index, gate, dropout_mask, activation, chosen)
    out: Tensor = _op.forward(*arguments)[0] if wanted(x, *experts, gate) else _op.inference(*arguments)
    return out.to(dtype)


@functools.cache
def implementation(backend: str) -> Backend:
    """A backend's module, imported when it is first asked for: triton takes a second, and is not everywhere."""
    from sparse_ffn.ops.expert_ffn import cpu, cuda, torch

    if backend == "triton":
        from sparse_ffn.ops.expert_ffn import triton

        return triton
    others: dict[str, Backend] = {"cpu": cpu, "cuda": cuda, "torch": torch}
    return others[backend]


def shapes(x: Tensor, experts: Units, index: Tensor, *rest: object) -> tuple[Tensor, Saved]:
    """The output and what is kept, uninitialised."""
    (n_experts, size, d_out), slots = experts.values.shape, index.shape[0] * index.shape[1]
    order, offsets = (index.new_empty(n, dtype=torch.int32) for n in (slots, n_experts + 1))
    up = x.new_empty(slots, size)
    glu_gate = None if experts.gate_keys is None else torch.empty_like(up)
    return x.new_empty(x.shape[0], d_out), Saved(order, offsets, up, glu_gate)


def _indices(x: Tensor, experts: Units, index: Tensor, *rest: object) -> tuple[Indices]:
    return (("index", index, experts.keys.shape[0], True),)


_op = Operator("expert_ffn", Backend, shapes, implementation=implementation, indices=(_indices, None))

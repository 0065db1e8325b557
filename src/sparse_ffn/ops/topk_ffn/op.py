"""Top-k FFN: the operator, and the choice of the backend."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from sparse_ffn.backends.choice import choose
from sparse_ffn.ops.autocast import autocast_dtype, cast, casts_inside, without_autocast
from sparse_ffn.ops.operator import Operator, wanted
from sparse_ffn.ops.products import product_dtype
from sparse_ffn.ops.topk_ffn import reference
from sparse_ffn.ops.topk_ffn.backend import Backend, Saved
from sparse_ffn.ops.units import Units


def topk_ffn(
    x: Tensor,
    units: Units,
    k: int,
    *,
    dropout_mask: Tensor | None = None,
    activation: str = "relu",
    norm_aware: bool = False,
    rank_by: str = "hidden",
) -> Tensor:
    """Two-layer FFN of which only the k hidden units of the largest |h| count; arguments are trusted to fit.

    With ``rank_by="gate"``, of a GLU, those whose activated gate alone is the largest count.

    Shapes: x [T, D], units of keys [F, D] and values [F, O], dropout_mask [T, F] (dropout's multiplier, applied before
    the selection, no gradient); result [T, O] in x's dtype or autocast's.
    """
    dtype = autocast_dtype(x)
    chosen = choose(x)
    inner = product_dtype(chosen, units.keys, x.shape[0] * units.keys.shape[0], dtype)
    x, dropout_mask = cast(x, inner), cast(dropout_mask, inner)
    units = units if casts_inside(chosen) else units.to(inner)
    if chosen == "reference":
        return reference.topk_ffn(x, units, k, dropout_mask, activation, norm_aware, rank_by)
    arguments = (x, *units, k, dropout_mask, activation, norm_aware, rank_by, chosen)
    with without_autocast(x):
        out: Tensor = _op.forward(*arguments)[0] if wanted(x, *units) else _op.inference(*arguments)
    return out.to(dtype)


@functools.cache
def implementation(backend: str) -> Backend:
    """A backend's module, imported when it is first asked for: triton takes a second, and is not everywhere."""
    from sparse_ffn.ops.topk_ffn import cpu, torch

    if backend == "triton":
        from sparse_ffn.ops.topk_ffn import triton

        return triton
    others: dict[str, Backend] = {"cpu": cpu, "cuda": torch, "torch": torch}  # csrc/cuda has no kernel for it
    return others[backend]


def _shapes(x: Tensor, units: Units, k: int, *rest: Any) -> tuple[Tensor, Saved]:
    T, (F, O), backend = x.shape[0], units.values.shape, rest[-1]
    selected = x.new_empty(T, (F + 31) // 32 if backend == "cpu" else k, dtype=torch.int32)
    up = x.new_empty(T, k)
    return x.new_empty(T, O), Saved(selected, up, None if units.gate_keys is None else torch.empty_like(up))


_op = Operator("topk_ffn", Backend, _shapes, implementation=implementation)

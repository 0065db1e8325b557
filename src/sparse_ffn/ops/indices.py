"""Indices are checked where they are read: inside the ops, so that no way of calling them goes past the check.

On the CPU only: elsewhere it would wait for the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_ffn.ops.library import define

Indices = tuple[str, Tensor | None, int, bool]
"""The name of an argument, its indices (None: not given), what they must be below, and whether they may be that, too.

That is so of experts: one past the last names none.
"""


def check_indices(*arguments: Indices) -> None:
    """Raise IndexError unless all indices are in their range."""
    for name, index, limit, void in arguments:
        if index is None or not index.is_cpu or index.numel() == 0:
            continue
        low, high = (bound.item() for bound in index.aminmax())
        if low < 0 or high >= limit + void:
            raise IndexError(f"{name} must be in [0, {limit}{']' if void else ')'}, got values from {low} to {high}")


def checked(name: str, index: Tensor | None, limit: int, void: bool) -> Any:
    """The indices, once they have been checked: for code outside of the ops, which may be traced or transformed.

    torch.jit.trace would keep the example's limit as a constant: its traces check nothing.
    """
    if index is None or not index.is_cpu or torch._C._get_tracing_state():
        return index
    return _checked(index, limit, void, name)


def _kernel(index: Tensor, limit: int, void: bool, name: str) -> Tensor:
    check_indices((name, index, limit, void))
    return index.clone()  # what an op returns may not be what it was given


def _fake(index: Tensor, limit: int, void: bool, name: str) -> Tensor:
    return torch.empty_like(index)


def _batched(
    info: Any, in_dims: tuple[int | None, ...], index: Tensor, limit: int, void: bool, name: str
) -> tuple[Tensor, Any]:
    return _checked(index, limit, void, name), in_dims[0]


_checked = define(
    "checked_index(Tensor index, SymInt limit, bool void, str name) -> Tensor", _kernel, _fake, vmap=_batched
)

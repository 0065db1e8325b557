"""Outputs: the tensors in what a model returns, whatever holds them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def tensors_in(output: Any) -> list[Tensor]:
    """The tensors of an output, in its order: those of containers, and of objects that pytree knows nothing of."""
    from torch.utils._pytree import tree_leaves  # here: it would double the library's import time

    found: list[Tensor] = []
    entered: dict[int, Any] = {}  # the objects too: another could get the id of one that is gone

    def enter(value: Any) -> None:
        for leaf in tree_leaves(value):
            if isinstance(leaf, Tensor):
                found.append(leaf)
            elif id(leaf) not in entered and not isinstance(leaf, nn.Module):  # parameters are no outputs
                entered[id(leaf)] = leaf
                enter(_parts(leaf))

    enter(output)
    return found


def _parts(value: Any) -> list[Any]:
    """What an object holds."""
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, (list, tuple)):
        return list(value)
    if dataclasses.is_dataclass(value):  # which need not have a __dict__
        return [getattr(value, field.name, None) for field in dataclasses.fields(value)]
    return list(getattr(value, "__dict__", {}).values())

"""Tied weights of transformers' models whose FFNs became layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import transformers
from torch import Tensor

from sparse_ffn.layers import SparseFFN


@contextmanager
def tied(model: Any) -> Iterator[None]:
    """The ties of a model that is being loaded, which transformers puts off: tied FFNs become one layer."""

    def put(name: str, tensor: Tensor) -> None:
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, tensor)

    own = {name: model.get_parameter(name) for name in model.all_tied_weights_keys}
    for name, source in model.all_tied_weights_keys.items():
        put(name, model.get_parameter(source))
    yield
    left = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name in own.keys() & left:
        put(name, own[name])


def shared(model: Any) -> dict[str, str]:
    """What converted layers that are in several places hold: each further name of a tensor, and the first one."""
    first: dict[int, str] = {}
    layers = [(f"{n}.", m) for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, SparseFFN)]
    tensors = [(path + n, t) for path, m in layers for n, t in (*m.named_parameters(), *m.named_buffers())]
    return {name: place for name, tensor in tensors if (place := first.setdefault(id(tensor), name)) != name}


def tie(model: Any) -> None:
    """Tell transformers which tensors converted layers share, in place of those that went with the FFNs."""
    for part in model.modules():
        if not isinstance(part, transformers.PreTrainedModel):
            continue
        left = {name for name, _ in part.named_parameters(remove_duplicate=False)}
        known = {target: source for target, source in part.all_tied_weights_keys.items() if {target, source} <= left}
        several = shared(part)
        if several or known != part.all_tied_weights_keys:
            part.all_tied_weights_keys = known | {name: place for name, place in several.items() if name in left}
            part._tied_weights_keys = known | several

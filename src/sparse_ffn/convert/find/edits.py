"""Edits: how a layer is put into a model, attribute by attribute, and how all of it is undone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Edit:
    """One attribute of a module within the enclosing one, and the value that it gets when a layer is put in."""

    owner: str
    attribute: str
    value: object


def apply(root: nn.Module, edits: Iterable[Edit]) -> list[Callable[[], None]]:
    """Make the edits; returns what undoes each, to be called in reverse."""
    return [
        set_attribute(root.get_submodule(e.owner), e.attribute, e.value() if callable(e.value) else e.value)
        for e in edits
    ]


def set_attribute(owner: nn.Module, attribute: str, value: object) -> Callable[[], None]:
    """Set an attribute that may hold a module, a function or a number; returns what undoes it."""
    modules, others = dict(owner._modules), dict(owner.__dict__)

    def undo() -> None:
        owner._modules.clear()
        owner._modules.update(modules)
        for name in owner.__dict__.keys() - others.keys():
            del owner.__dict__[name]
        owner.__dict__.update(others)

    if isinstance(value, nn.Module):
        owner.__dict__.pop(attribute, None)
        owner._modules[attribute] = value
    else:
        setattr(owner, attribute, value)
    return undo


def switch_off_fast_path(module: nn.Module) -> list[Callable[[], None]]:
    """Keep torch.nn's Transformer layers from reading ``linear1.weight`` in evaluation; returns what undoes it."""
    flags = {"activation_relu_or_gelu": 0, "use_nested_tensor": False}
    return [set_attribute(module, name, off) for name, off in flags.items() if vars(module).get(name)]

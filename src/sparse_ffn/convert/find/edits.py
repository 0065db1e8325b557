"""Edits: how a layer is put into a model, attribute by attribute, and how all of it is undone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Edit:
    """One attribute of a module within the enclosing one that gets a new value when a layer is put in."""

    owner: str
    attribute: str
    value: object


def put(root: nn.Module, edits: Iterable[Edit]) -> list[Callable[[], None]]:
    """Make the edits; returns what undoes each, to be called in reverse."""
    undo: list[Callable[[], None]] = []
    for edit in edits:
        owner = root.get_submodule(edit.owner)
        value = edit.value() if callable(edit.value) else edit.value
        undo.append(set_attribute(owner, edit.attribute, value))
    return undo


def set_attribute(owner: nn.Module, attribute: str, value: object) -> Callable[[], None]:
    """Set an attribute that may hold a module, a function or a number; returns what undoes it."""
    modules, plain = dict(owner._modules), dict(owner.__dict__)

    def undo() -> None:
        owner._modules.clear()
        owner._modules.update(modules)
        for name in owner.__dict__.keys() - plain.keys():
            del owner.__dict__[name]
        owner.__dict__.update(plain)

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

"""Places: where modules are in a model, and for which of its FFNs a layer can stand there."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from types import MethodType
from typing import NamedTuple

from torch import nn

from sparse_ffn.checks import held
from sparse_ffn.convert.config_base import FFNConfig
from sparse_ffn.convert.find.edits import apply, set_attribute, switch_off_fast_path
from sparse_ffn.convert.find.examples import Examples
from sparse_ffn.convert.find.found import Found
from sparse_ffn.convert.find.match import rejection
from sparse_ffn.convert.init.weights import FFNWeights


class Place(NamedTuple):
    """An attribute that holds a module."""

    owner: nn.Module
    attribute: str
    name: str
    """The module's full name."""


Places = Mapping[nn.Module, list[Place]]


def places_of(model: nn.Module) -> Places:
    """All places of each module inside a model."""
    places: dict[nn.Module, list[Place]] = defaultdict(list)
    for path, owner in model.named_modules():
        for attribute, child in owner._modules.items():
            if child is not None:
                places[child].append(Place(owner, attribute, f"{path}.{attribute}" if path else attribute))
    return places


def twins(f: Found, config: FFNConfig) -> object:
    """Equal for FFNs that have the same parameters and become the same: one new layer stands in all their places."""
    parameters = tuple(id(p) for linear in f.linears for p in linear.module.parameters())
    return parameters, f.formula, f.dropout, f.out_dropout, repr(config)


def mixed(ffn: FFNWeights) -> str | None:
    """Why parameters of several kinds do not become one layer's."""
    kinds = {f"{t.dtype} on {t.device}" for t in ffn.tensors().values()}
    if len(kinds) > 1:
        return f"its parameters differ in dtype or device: {', '.join(sorted(kinds))}"
    trains = ffn.trainable
    if ffn.gate_bias is not None and trains and trains["gate_bias"] != trains["gate_keys"]:
        return "the weight and the bias of its gate would become one matrix, and only one of them trains"
    return None


def replaceable(
    model: nn.Module,
    wanted: list[Found],
    groups: Mapping[str, object],
    places: Places,
    unknown: dict[str, str],
    examples: Examples,
) -> list[Found]:
    """The FFNs that a layer can stand for, by the groups of ``twins``; the others become unknown, with the reason."""
    owners: dict[int, set[nn.Module]] = defaultdict(set)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)].add(module)
    elsewhere = _held_outside(model, {f.module for f in wanted}, places)
    left = {f.name: why for f in wanted if (why := _unfit(model, f, places, examples)) is not None}
    left |= {f.name: why for f in wanted if f.name not in left and (why := elsewhere.get(f.module)) is not None}
    while True:
        unknown.update(left)
        wanted = [f for f in wanted if f.name not in left]
        group_of = {linear.module: groups[f.name] for f in wanted for linear in f.linears}
        uses = {f.name: _use_elsewhere(f, groups[f.name], group_of, owners, places) for f in wanted}
        left = {name: why for name, why in uses.items() if why is not None}
        if not left:  # an FFN that is left can tie down another
            return wanted


def _held_outside(model: nn.Module, wanted: set[nn.Module], places: Places) -> dict[nn.Module, str]:
    """Of these modules those that an attribute elsewhere holds which is no place for a module: it would go on.

    What holds one in a place is tried with a layer there: see ``rejection``.
    """
    found: dict[nn.Module, str] = {}

    known = {module: {*module.modules(), *(place.owner for place in places[module])} for module in wanted}

    def look(holder: nn.Module, value: object, where: str, depth: int) -> None:
        if isinstance(value, nn.Module):
            if value in wanted and holder not in known[value]:
                found.setdefault(value, f"{where} holds it, too, and would go on with it")
        elif depth and type(value) in (list, tuple, dict, set):
            for inner in value.values() if isinstance(value, dict) else value:  # type: ignore[attr-defined]
                look(holder, inner, where, depth - 1)
        elif isinstance(value, MethodType):
            look(holder, value.__self__, where, 0)

    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if attribute not in _OF_MODULES:
                look(module, value, f"{type(module).__name__}'s attribute {name}{'.' * bool(name)}{attribute}", 3)
    return found


_OF_MODULES = {name for name in vars(nn.Module()) if name.startswith("_")}
"""Attributes in which torch keeps a module's parts and hooks."""


def _unfit(model: nn.Module, f: Found, places: Places, examples: Examples) -> str | None:
    """Why an FFN cannot be replaced, whatever becomes of the others."""
    holders = {place.owner: place.attribute for place in places[f.module]}
    if "_orig_mod" in holders.values():
        return "it is compiled by itself, and would go on as it was: convert first, then compile"
    away = held(model, f.weights().keys)
    reasons = (away and f"it is {away}", mixed(f.weights()), *(rejection(f, holder, examples) for holder in holders))
    return next((why for why in reasons if why is not None), None)


def _use_elsewhere(
    f: Found,
    group: object,
    group_of: Mapping[nn.Module, object],
    owners: Mapping[int, set[nn.Module]],
    places: Places,
) -> str | None:
    """Which part of an FFN something uses that is not replaced alike."""
    own = {linear.module for linear in f.linears}
    why = None
    for linear in f.linears:
        names = [place.name for place in places[linear.module]]
        parameters = list(linear.module.parameters())
        if len(names) > 1 and own != {f.module}:  # a dense layer of this library is replaced as a whole
            why = f"{linear.name} is used in several places: {', '.join(names)}"
        elif any(group_of.get(owner) != group for p in parameters for owner in owners[id(p)]):
            why = f"parameters of {linear.name} are tied to something that is not replaced alike"
        elif any(len(owners[id(p)] & own) > 1 for p in parameters):
            why = f"parameters of {linear.name} are tied to other ones of the same FFN"
    return why


def put(model: nn.Module, plan: Iterable[tuple[Found, nn.Module]], places: Places) -> list[Callable[[], None]]:
    """Put new modules in the places of FFNs; on any error take all out again.

    Returns:
        What takes them out, to be called in reverse.
    """
    undo: list[Callable[[], None]] = []
    try:
        for f, new in plan:
            undo += [set_attribute(place.owner, place.attribute, new) for place in places[f.module]]
            if f.edits:
                enclosing = model.get_submodule(f.enclosing)
                undo += apply(enclosing, f.edits)
                for module in model.modules():
                    if any(inner is enclosing for inner in module.modules()):
                        undo += switch_off_fast_path(module)
    except BaseException:
        take_out(undo)
        raise
    return undo


def take_out(undo: list[Callable[[], None]]) -> None:
    """Undo what ``put`` did."""
    for step in reversed(undo):
        step()

"""Finding the FFNs of a model by what modules compute, not by what they are called."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import replace

from torch import nn

from sparse_ffn.checks import check_module
from sparse_ffn.convert.find.examples import Examples
from sparse_ffn.convert.find.found import Found
from sparse_ffn.convert.find.known import from_values
from sparse_ffn.convert.find.linear import Linear, hooks, linear_maps
from sparse_ffn.convert.find.match import match_block, match_dense, match_pair
from sparse_ffn.convert.find.probe import Unknown
from sparse_ffn.layers import DenseFFN, LatentMoE
from sparse_ffn.layers.shared_expert import SharedExpertMoE

ROOT = "the model itself is the FFN: from_dense makes a layer of it"


def find(model: nn.Module, examples: Examples) -> tuple[list[Found], dict[str, str]]:
    """All FFNs of a model, in its order, and the names and reasons of what looked like one and is none.

    Args:
        model: any.
        examples: what modules are called with that do not run by themselves.

    Raises:
        TypeError: the model is no module.
        ValueError: a parameter has no shape yet, or what is known does not fit the model.
    """
    check_module("model", model)
    linears = linear_maps(model)
    shared = {m.shared for m in model.modules() if isinstance(m, SharedExpertMoE)}
    search = _Search(examples)
    by_name = {linear.name: linear for linear in linears.values()}
    for name, values in examples.known.items():
        search.found.append(f := from_values(model, name, values, by_name))
        search.decide(*f.linears)
    loose: list[tuple[Linear, Linear, str]] = []
    for name, module in reversed(list(model.named_modules())):  # from the inside out
        if module in linears or module in shared:
            continue
        path = f"{name}." if name else ""  # a map that is elsewhere too is named by its place here
        inside = [replace(linears[m], name=path + at) for at, m in module.named_modules() if m in linears]
        if isinstance(module, LatentMoE):  # it is sparse already
            search.decide(*inside)
        elif isinstance(module, (nn.ModuleList, nn.ModuleDict)):  # what holds it may be the FFN
            loose += [(up, down, type(module).__name__) for up, down in pairs(name, module, inside)]
        elif type(module) is DenseFFN:
            search.dense(name, module)
        else:
            search.module(name, module, inside)
    for up, down, kind in loose:
        if up.n_out > up.n_in and search.undecided(up, down):
            search.unknown[up.name] = f"its linear maps lie in a {kind}, which computes nothing: make the FFN a module"
    order = {name: i for i, (name, _) in enumerate(model.named_modules(remove_duplicate=False))}
    found = sorted(search.found, key=lambda f: order[f.name])
    return found, {name: search.unknown[name] for name in sorted(search.unknown, key=order.__getitem__)}


def find_one(module: nn.Module) -> Found:
    """A module that is an FFN itself.

    Raises:
        TypeError: it is no module.
        ValueError: it is none; the message says why and what was seen.
    """
    check_module("ffn", module)
    inside = list(linear_maps(module).values())
    roles = block_roles(module, inside)
    try:
        if type(module) is DenseFFN:
            return match_dense("", module)
        if roles is None:
            more = crowded(module, inside)
            raise Unknown("its matrices are not those of a two-layer FFN" if more is None else more[1])
        return match_block("", module, *roles)
    except Unknown as why:
        raise ValueError(f"ffn is no FFN that is known here: {why}; {_seen(module)}") from None


class _Search:
    """What is found while modules come from the inside out; each linear map is decided about once."""

    def __init__(self, examples: Examples) -> None:
        self.examples = examples
        self.found: list[Found] = []
        self.unknown: dict[str, str] = {}
        self.decided: set[nn.Module] = set()

    def undecided(self, *linears: Linear) -> bool:
        """Whether none of the linear maps belongs to something that was found or refused."""
        return not self.decided & {linear.module for linear in linears}

    def decide(self, *linears: Linear) -> None:
        """Keep these linear maps from modules further out."""
        self.decided |= {linear.module for linear in linears}

    def leave(self, name: str, why: str, module: nn.Module, inside: list[Linear]) -> None:
        """Leave a module as it is, for a reason."""
        self.unknown[name] = f"{why}; {_seen(module)}"
        self.decide(*inside)

    def dense(self, name: str, layer: DenseFFN) -> None:
        """A dense layer of this library."""
        try:
            dense = match_dense(name, layer)
            if not name:
                raise Unknown(ROOT)
            self.found.append(dense)
        except Unknown as why:
            self.unknown[name] = str(why)

    def module(self, name: str, module: nn.Module, inside: list[Linear]) -> None:
        """Any other module, with the linear maps inside: an FFN itself, the holder of pairs, or neither."""
        reasons: list[str] = []
        block = block_roles(module, inside) if self.undecided(*inside) else None
        if block is not None:
            try:
                whole = match_block(name, module, *block)
                if not name:
                    raise Unknown(ROOT)
                self.found.append(whole)
                return self.decide(*inside)
            except Unknown as why:
                reasons.append(str(why))
        obstacles = [linear.obstacle for linear in inside if linear.obstacle is not None]
        # an FFN with hooks, a GLU and one that cannot be replaced are a whole, which is not taken apart into pairs
        if block is None or not (obstacles or hooks(module) or block[0][0].n_out * len(block[0]) != block[1].n_in):
            self.match_pairs(name, module, inside, reasons)
        if (more := crowded(module, inside)) is not None:
            named = self.unknown.keys() | {linear.name for f in self.found for linear in f.linears}
            if not named & {linear.name for linear in inside}:
                self.leave(*more, module, inside)
        # attention has matrices of fitting shapes too, but none that widen: it is left without a reason
        if block is not None and self.undecided(*inside) and block[1].n_in > block[0][0].n_in:
            self.leave(name, [*reasons, *obstacles, ROOT][0], module, inside)
        return None

    def match_pairs(self, name: str, module: nn.Module, inside: list[Linear], reasons: list[str]) -> None:
        """FFNs of two linear maps in a larger module."""
        for up, down in pairs(name, module, inside):
            if not self.undecided(up, down):
                continue
            try:
                self.found.append(match_pair(name, module, up, down, self.examples))
            except Unknown as why:
                reasons.append(str(why))
                if up.n_out > up.n_in:
                    self.unknown[up.name] = f"{'; '.join(dict.fromkeys(reasons))}; {_seen(module)}"
            self.decide(up, down)


def block_roles(module: nn.Module, inside: list[Linear]) -> tuple[list[Linear], Linear] | None:
    """The linear maps of a module that by its shapes can be an FFN and nothing else: the first ones, the last one."""
    theirs = [parameter for linear in inside for parameter in linear.module.parameters()]
    if len(inside) not in (2, 3) or sum(1 for _ in module.parameters()) != len(theirs):
        return None
    for down in reversed(inside):
        ups = [linear for linear in inside if linear is not down]
        widths = {(up.n_in, up.n_out) for up in ups}
        if len(widths) == 1 and ups[0].n_out in ((down.n_in, 2 * down.n_in) if len(ups) == 1 else (down.n_in,)):
            return ups, down
    return None


def pairs(name: str, module: nn.Module, inside: list[Linear]) -> Iterator[tuple[Linear, Linear]]:
    """Neighbouring linear maps, at most two steps down, whose innermost common module this is."""
    for up, down in itertools.pairwise(inside):
        if up.n_out != down.n_in or (up.n_in == up.n_out and not isinstance(module, nn.Sequential)):
            continue
        a, b = (linear.within(name).split(".") for linear in (up, down))
        if len(a) <= 2 and len(b) <= 2 and (a[0] != b[0] or len(a) == 1 or len(b) == 1):
            yield up, down


def crowded(module: nn.Module, inside: list[Linear]) -> tuple[str, str] | None:
    """A linear map that widens, in a module that has one back and more parameters than these: its name and the reason.

    Attention and state-space mixers, which may widen too, have two further maps or more.
    """
    own = [linear for linear in inside if linear.module in module._modules.values()]
    for up in own:
        ups = [linear for linear in own if (linear.n_in, linear.n_out) == (up.n_in, up.n_out)]
        widths = (up.n_out, up.n_out // 2) if len(ups) == 1 else (up.n_out,)
        downs = [linear for linear in own if linear.n_out == up.n_in < linear.n_in and linear.n_in in widths]
        if len(downs) != 1 or len(ups) > 2 or len(own) - len(ups) - 1 > 1:
            continue
        theirs = {parameter for linear in (*ups, *downs) for parameter in linear.module.parameters()}
        others = [without_numbers(name) for name, parameter in module.named_parameters() if parameter not in theirs]
        names = ", ".join(linear.attribute for linear in (*ups, *downs))
        if others:
            return up.name, f"more than {names} and an activation: it has {', '.join(dict.fromkeys(others))}"
    return None


def without_numbers(name: str) -> str:
    """A module's or parameter's name with a star for each number: the same for all layers."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def _seen(module: nn.Module) -> str:
    kinds = [type(m).__name__ for m in module.modules() if not any(True for _ in m.children())]
    return f"seen in {type(module).__name__}: {', '.join(dict.fromkeys(kinds))}"

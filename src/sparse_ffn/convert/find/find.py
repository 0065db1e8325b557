"""Finding the FFNs of a model by what modules compute, not by what they are called."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from sparse_ffn.checks import check_module
from sparse_ffn.convert.find.blocks import block_roles, crowded, match_block, match_dense
from sparse_ffn.convert.find.found import Found, Unknown
from sparse_ffn.convert.find.linear import Linear, hooks, linear_maps
from sparse_ffn.convert.find.pairs import match_pair, pairs
from sparse_ffn.layers import DenseFFN
from sparse_ffn.layers.shared_expert import SharedExpertMoE

ROOT = "the model itself is the FFN: from_dense makes a layer of it"


def find(model: nn.Module) -> tuple[list[Found], dict[str, str]]:
    """All FFNs of a model, in its order, and the names and reasons of what looked like one and is none.

    Raises:
        TypeError: the model is no module.
        ValueError: a parameter has no shape yet.
    """
    check_module("model", model)
    linears = linear_maps(model)
    found: list[Found] = []
    unknown: dict[str, str] = {}
    loose: list[tuple[Linear, Linear, str]] = []
    done: set[nn.Module] = set()
    shared = {m.shared for m in model.modules() if isinstance(m, SharedExpertMoE)}
    for name, module in reversed(list(model.named_modules())):  # from the inside out
        if module in linears:
            continue
        path = f"{name}." if name else ""  # a map that is elsewhere too is named by its place here
        inside = [replace(linears[m], name=path + at) for at, m in module.named_modules() if m in linears]
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)):  # what holds it may be the FFN
            widening = [(up, down) for up, down in pairs(name, module, inside) if up.n_out > up.n_in]
            loose += [(up, down, type(module).__name__) for up, down in widening]
            continue
        reasons: list[str] = []
        obstacles = [linear.obstacle for linear in inside if linear.obstacle is not None]
        if type(module) is DenseFFN and module not in shared:
            try:
                dense = match_dense(name, module)
            except Unknown as why:
                unknown[name] = str(why)
            else:
                if name:
                    found.append(dense)
                else:
                    unknown[name] = ROOT
        block = block_roles(module, inside) if not done & {linear.module for linear in inside} else None
        if block is not None and name:
            try:
                found.append(match_block(name, module, *block))
                done |= {linear.module for linear in inside}
                continue
            except Unknown as why:
                reasons.append(str(why))
        # hooks go with the module, a GLU is not put in piecewise, and what cannot be replaced is named as a whole
        whole = block is not None and (
            bool(obstacles) or hooks(module) is not None or block[0][0].n_out * len(block[0]) != block[1].n_in
        )
        for up, down in pairs(name, module, inside):
            if done & {up.module, down.module} or whole:
                continue
            try:
                found.append(match_pair(name, module, up, down))
            except Unknown as why:
                reasons.append(str(why))
                if up.n_out > up.n_in:
                    unknown[up.name] = f"{'; '.join(dict.fromkeys(reasons))}; {_seen(module)}"
            done |= {up.module, down.module}
        if (more := crowded(module, inside)) is not None:
            named = unknown.keys() | {linear.name for f in found for linear in (*f.ups, f.down)}
            if not named & {linear.name for linear in inside}:
                unknown[more[0]] = f"{more[1]}; {_seen(module)}"
                done |= {linear.module for linear in inside}
        # attention too has matrices of fitting shapes, but none that widen: what does not widen goes without a reason
        if block is not None and not done & {linear.module for linear in inside} and block[1].n_in > block[0][0].n_in:
            unknown[name] = f"{[*reasons, *obstacles, ROOT][0]}; {_seen(module)}"
            done |= {linear.module for linear in inside}
    for up, down, kind in loose:
        if not done & {up.module, down.module}:
            unknown[up.name] = f"its linear maps lie in a {kind}, which computes nothing: make the FFN a module"
    order = {name: i for i, (name, _) in enumerate(model.named_modules(remove_duplicate=False))}
    return sorted(found, key=lambda f: order[f.name]), {n: unknown[n] for n in sorted(unknown, key=order.__getitem__)}


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


def _seen(module: nn.Module) -> str:
    kinds = [type(m).__name__ for m in module.modules() if not any(True for _ in m.children())]
    return f"seen in {type(module).__name__}: {', '.join(dict.fromkeys(kinds))}"
